"""What families that step sample by sample have in common unless they say otherwise.

Images of one size and one number of rows share a forward pass; guidance above 1 is classifier-free
and doubles the rows; an absent negative prompt is the empty one. A family sets `card` and `count`.
"""

from collections.abc import Hashable, Mapping

from jobs.request import ImageRequest
from pipelines.families.family import Role
from pipelines.seam import Card
from pipelines.text import TokenCounter


class Stepped:
    """Answers about requests; the mathematics is the families'."""

    card: Card
    count: TokenCounter

    def tokenizer_json(self) -> str | None:
        """The counter's tokenizer, where the card says how prompts are prepared for it."""
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
        """Cells of the model's grid: its patches, or its latent pixels where it has no patches."""
        return (request.width // self.card.multiple) * (request.height // self.card.multiple)

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The prompt, and the negative one where it counts."""
        texts: dict[Role, str | None] = {"positive": request.prompt}
        if self.guided(request):
            texts["negative"] = request.negative_prompt or ""
        return texts
