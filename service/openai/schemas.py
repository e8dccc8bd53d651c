"""OpenAI's Images API as we speak it: its request with our extra fields, and its events.

A field of theirs that means nothing here is taken only at a value that asks for nothing; anything
else is refused, so that nobody is silently given something other than asked for. Knows no store.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from jobs.errors import FieldProblem
from jobs.fields import PER_PROMPT
from jobs.request import ImageFormat
from service.openai.usage import Usage
from service.submit.schemas import ImageSettings, Prompt, SubmitJob, bounds

_SIZE = r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"


class GenerateImages(ImageSettings):
    """`POST /v1/images/generations`; seed, steps, guidance_scale and so on are our extra body."""

    prompt: Prompt
    model: Annotated[
        str | None, Field(min_length=1, max_length=100, description="Default: the first model.")
    ] = None
    n: Annotated[int | None, Field(ge=1, le=10)] = None
    size: Annotated[str, Field(pattern=_SIZE, description="WIDTHxHEIGHT or auto.")] | None = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="Left out: both are given.")
    ] = None
    output_format: ImageFormat | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    priority: Annotated[int | None, bounds("priority")] = None
    reproducible: Annotated[bool, bounds("reproducible")] = True
    user: Annotated[str | None, Field(max_length=500)] = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None

    def as_job(self, default_model: str) -> SubmitJob:
        """The same as a job of one prompt."""
        given: dict[str, Any] = {name: getattr(self, name) for name in PER_PROMPT}
        if self.size not in (None, "auto"):
            given["width"], given["height"] = map(int, str(self.size).split("x"))
        if self.priority is not None:  # else it is the caller's own
            given["priority"] = self.priority
        return SubmitJob(
            model=self.model or default_model,
            prompts=[self.prompt],
            format=self.output_format or "png",
            reproducible=self.reproducible,
            metadata={"user": self.user} if self.user else {},
            **given,
        )

    def field_of(self, problem: FieldProblem) -> FieldProblem:
        """A problem of the job as one of the field that the caller wrote."""
        name = problem.pointer.split("/")[1] if problem.pointer else ""
        if name == "prompts":
            name = "n" if problem.pointer == "/prompts" else "prompt"
        if name in ("width", "height") and self.size:
            name = "size"
        return FieldProblem(f"/{name}", problem.detail)


class GeneratedImage(BaseModel):
    """One image of the answer; the seed is ours."""

    b64_json: str | None
    url: str | None
    revised_prompt: None = None
    seed: int
    index: int


class GeneratedImages(BaseModel):
    """The answer to a request that does not stream."""

    created: int
    data: list[GeneratedImage]
    size: str
    output_format: ImageFormat
    usage: Annotated[
        Usage | None, Field(description="Tokens; null where no worker has told how to count.")
    ] = None
    job: Annotated[str, Field(description="The job behind it, at /v1/jobs.")]


class OpenAIErrorDetail(BaseModel):
    """What went wrong; `param` is the bad field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """OpenAI's error envelope."""

    error: OpenAIErrorDetail
