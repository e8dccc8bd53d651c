"""OpenAI's `usage`: tokens of the prompt and of the images, where a worker has told how to count.

The prompt's are those of the model's own tokenizer, the images' those that its transformer works
on. Where either cannot be known there is no usage: a made-up number would be billed.
"""

from collections.abc import Sequence

from pydantic import BaseModel

from jobs.job import ImageView
from service.context import ServiceContext


class InputTokens(BaseModel):
    """The input by kind; no image is ever among it."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """What a request came to, in OpenAI's words."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens


def usage(context: ServiceContext, images: Sequence[ImageView]) -> Usage | None:
    """The tokens of one prompt and of its `images`."""
    request = images[0].request
    card = context.cards.of(request.model)
    count = context.lengths.tokens(request.model, card)
    per_pixel = (card or {}).get("image_tokens_per_pixel")
    if count is None or not isinstance(per_pixel, int | float):
        return None
    read = count(request.prompt)
    if request.negative_prompt:
        read += count(request.negative_prompt)
    made = sum(round(image.request.pixels * per_pixel) for image in images)
    return Usage(
        input_tokens=read,
        output_tokens=made,
        total_tokens=read + made,
        input_tokens_details=InputTokens(text_tokens=read),
    )
