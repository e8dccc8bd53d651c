"""The JSON of OpenAI's Images API: its request, with our extra fields, and its response.

Unsupported fields of theirs are only accepted with a value that means the default. Other values are
refused, because ignoring them would silently return something else than requested. No store here.
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
    """`POST /v1/images/generations`; seed, steps, guidance_scale etc. are extra fields of ours."""

    prompt: Prompt
    model: Annotated[
        str | None, Field(min_length=1, max_length=100, description="Default: the first model.")
    ] = None
    n: Annotated[int | None, Field(ge=1, le=10)] = None
    size: Annotated[str, Field(pattern=_SIZE, description="WIDTHxHEIGHT or auto.")] | None = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="Default: both.")
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
        """The equivalent job of one prompt."""
        values: dict[str, Any] = {name: getattr(self, name) for name in PER_PROMPT}
        if self.size not in (None, "auto"):
            values["width"], values["height"] = map(int, str(self.size).split("x"))
        if self.priority is not None:  # otherwise, the caller's default applies
            values["priority"] = self.priority
        return SubmitJob(
            model=self.model or default_model,
            prompts=[self.prompt],
            format=self.output_format or "png",
            reproducible=self.reproducible,
            metadata={"user": self.user} if self.user else {},
            **values,
        )

    def field_of(self, problem: FieldProblem) -> FieldProblem:
        """A problem of the job, mapped to the field that the caller wrote."""
        name = problem.pointer.split("/")[1] if problem.pointer else ""
        if name == "prompts":
            name = "n" if problem.pointer == "/prompts" else "prompt"
        if name in ("width", "height") and self.size:
            name = "size"
        return FieldProblem(f"/{name}", problem.detail)


class GeneratedImage(BaseModel):
    """One image of the response; `seed` and `index` are our additions."""

    b64_json: str | None
    url: str | None
    revised_prompt: None = None
    seed: int
    index: int


class GeneratedImages(BaseModel):
    """The response to a request without `stream`."""

    created: int
    data: list[GeneratedImage]
    size: str
    output_format: ImageFormat
    usage: Annotated[
        Usage | None, Field(description="Tokens; null until a worker has published how to count.")
    ] = None
    job: Annotated[str, Field(description="Id of its job, for /v1/jobs.")]


class OpenAIErrorDetail(BaseModel):
    """What went wrong; `param` is the invalid field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """OpenAI's error envelope."""

    error: OpenAIErrorDetail
