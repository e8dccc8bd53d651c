"""Defaults for families that step each sample on its own schedule.

Images of the same size and number of rows share a forward pass. Guidance above the card's
`guides_above` is classifier-free and doubles the rows. A missing negative prompt means an empty
one. A family sets `card` and `count`.
"""

from collections.abc import Hashable, Mapping

from jobs.request import ImageRequest
from pipelines.families.family import Role
from pipelines.seam import Card
from pipelines.text import TokenCounter


class Stepped:
    """What depends on the request alone; the families add the mathematics."""

    card: Card
    count: TokenCounter

    def tokenizer_json(self) -> str | None:
        """The counter's tokenizer as JSON, if the card says how prompts are prepared for it."""
        return self.count.to_json() if self.card.prompt else None

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return request.guidance_scale > self.card.guides_above

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Same size, same number of rows."""
        return request.width, request.height, self.guided(request)

    def rows(self, request: ImageRequest) -> int:
        """Two under classifier-free guidance."""
        return 2 if self.guided(request) else 1

    def tokens(self, request: ImageRequest) -> int:
        """Cells of the model's grid: its patches, or its latent pixels if it has no patches."""
        return (request.width // self.card.multiple) * (request.height // self.card.multiple)

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The prompt, and the negative prompt if guidance uses it."""
        texts: dict[Role, str | None] = {"positive": request.prompt}
        if self.guided(request):
            texts["negative"] = request.negative_prompt or ""
        return texts
