"""Text embeddings kept for prompts that come again: exact, least recently used first out.

An embedding taken from here is the tensor that the text encoder made, so a hit changes no bit of
a picture. Bounded by bytes, on the device where the encoders left the tensors. Knows no model; not
for several threads at once.
"""

from collections import OrderedDict
from collections.abc import Callable

from pipelines.seam import Conditioning

DEFAULT_BYTES = 256 * 2**20
"""Room for some sixty FLUX.1 prompts of 512 tokens in bfloat16, 4 MiB each."""


class EmbeddingCache:
    """(role, prompt) to embeddings; an entry larger than the whole budget is not kept."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[tuple[str, str | None], Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, role: str, text: str | None, encode: Callable[[], Conditioning]) -> Conditioning:
        """The embeddings of `text` in `role`; calls `encode` when they are not kept."""
        key = (role, text)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        made = encode()
        self._keep(key, made)
        return made

    def _keep(self, key: tuple[str, str | None], made: Conditioning) -> None:
        if made.size > self.max_bytes:
            return
        self._entries[key] = made
        self.size += made.size
        while self.size > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size -= oldest.size
