"""OpenAI's `usage`: tokens of the prompt and the images.

Prompt tokens are counted with the model's own tokenizer, image tokens are those that its
transformer processes. If either is unknown, there's no usage, because someone might bill by it.
"""

from collections.abc import Sequence

from pydantic import BaseModel

from jobs.job import ImageView
from service.context import ServiceContext


class InputTokens(BaseModel):
    """Input tokens by kind; there are never any image tokens."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's `usage` object."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens


def usage(context: ServiceContext, images: Sequence[ImageView]) -> Usage | None:
    """The tokens of one prompt and of its `images`."""
    request = images[0].request
    card = context.cards.of(request.model)
    count = context.lengths.tokens(request.model, card)
    measured = card.measured if card else None
    if count is None or measured is None or measured.image_tokens_per_pixel is None:
        return None
    per_pixel = measured.image_tokens_per_pixel
    input_tokens = count(request.prompt)
    if request.negative_prompt:
        input_tokens += count(request.negative_prompt)
    output_tokens = sum(round(image.request.pixels * per_pixel) for image in images)
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=input_tokens + output_tokens,
        input_tokens_details=InputTokens(text_tokens=input_tokens),
    )
