"""An LRU cache of text embeddings for repeated prompts.

A hit returns the same tensors that the text encoder made, so it doesn't change a single bit of a
picture. The size is limited in bytes; the tensors stay on the device where the encoders left them.
Not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Callable

from pipelines.seam import Conditioning

DEFAULT_BYTES = 256 * 2**20
"""Enough for about sixty FLUX.1 prompts of 512 tokens in bfloat16, 4 MiB each."""


class EmbeddingCache:
    """Maps (role, prompt) to embeddings; an entry larger than the whole budget isn't cached."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[tuple[str, str | None], Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, role: str, text: str | None, encode: Callable[[], Conditioning]) -> Conditioning:
        """The embeddings of `text` in `role`; calls `encode` if they aren't cached."""
        key = (role, text)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        embeddings = encode()
        self._store(key, embeddings)
        return embeddings

    def _store(self, key: tuple[str, str | None], embeddings: Conditioning) -> None:
        if embeddings.size > self.max_bytes:
            return
        self._entries[key] = embeddings
        self.size += embeddings.size
        while self.size > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size -= oldest.size
