"""The JSON of OpenAI's Images API: its request, with our extra fields, and its response.

A field that can't be honoured is refused if ignoring it would return something else than requested,
such as an opaque image for a transparent one. Fields that only tune how a provider works are
accepted and named in the response's `warnings`. Names that other diffusion servers use are accepted
too. No store here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, JsonValue, model_validator

from jobs.errors import FieldProblem
from jobs.fields import FIELDS, PER_PROMPT
from jobs.request import ImageFormat
from service.openai.usage import Usage
from service.submit.schemas import ImageSettings, Prompt, SubmitJob, bounds

_SIZE = r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"


_ENGINE_NAMES = {field.name: field.engine for field in FIELDS.values() if field.engine}


def _not_per_request(value: float) -> float:
    raise ValueError("isn't supported: the shift is the model's own; leave it out")


def _no_lora(value: JsonValue) -> JsonValue:
    if value:
        raise ValueError("isn't supported: leave it out; a merged model can be in the catalog")
    return value


def _no_upscaling(value: bool) -> bool:
    if value:
        raise ValueError("isn't supported: must be false or left out; ask for a larger size")
    return value


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
    reproducible: Annotated[bool | None, bounds("reproducible")] = None
    user: Annotated[str | None, Field(max_length=500)] = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    num_inference_steps: Annotated[int | None, bounds("steps")] = None
    true_cfg_scale: Annotated[float | None, bounds("guidance_scale")] = None
    max_sequence_length: Annotated[int | None, Field(ge=1, le=100_000)] = None
    generator_device: (
        Annotated[
            Literal["cpu"], Field(description="Noise is drawn on the CPU, the same on any device.")
        ]
        | None
    ) = None
    flow_shift: Annotated[float, AfterValidator(_not_per_request)] | None = None
    lora: Annotated[JsonValue, AfterValidator(_no_lora)] = None
    enable_upscaling: Annotated[bool, AfterValidator(_no_upscaling)] | None = None
    extra_body: Annotated[
        dict[str, JsonValue] | None, Field(description="More fields of this request.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _with_extra_body(cls, value: Any) -> Any:
        """Take the fields of `extra_body`, which some clients send as it is."""
        extra = value.get("extra_body") if isinstance(value, dict) else None
        if not isinstance(extra, dict) or "extra_body" in extra:
            return value
        return {**extra, **{name: field for name, field in value.items() if name != "extra_body"}}

    @model_validator(mode="after")
    def _with_one_step_count(self) -> Self:
        if None not in (self.steps, self.num_inference_steps) and (
            self.steps != self.num_inference_steps
        ):
            raise ValueError(
                f"steps is {self.steps} and num_inference_steps is "
                f"{self.num_inference_steps}: they mean the same, so send one of them"
            )
        return self

    @property
    def warnings(self) -> list[str]:
        """What was accepted and has no effect."""
        usual = {"quality": ("auto", "standard"), "output_compression": (100,)}
        names = ("quality", "style", "output_compression")
        values = {name: getattr(self, name) for name in names}
        return [
            f"{name} has no effect"
            for name, value in values.items()
            if value is not None and value not in usual.get(name, ())
        ]

    def as_job(self, default_model: str) -> SubmitJob:
        """The equivalent job of one prompt. Raises ValidationError."""
        values: dict[str, Any] = {name: getattr(self, name) for name in PER_PROMPT}
        for name, engine in _ENGINE_NAMES.items():
            values[name] = values[name] if values[name] is not None else getattr(self, engine)
        if self.size not in (None, "auto"):
            values["width"], values["height"] = map(int, str(self.size).split("x"))
        if self.priority is not None:  # otherwise, the caller's default applies
            values["priority"] = self.priority
        return SubmitJob(
            model=self.model or default_model,
            prompts=[self.prompt],
            format=self.output_format or "png",
            reproducible=self.reproducible is not False,
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
        engine = _ENGINE_NAMES.get(name)
        if engine and getattr(self, name) is None and getattr(self, engine) is not None:
            name = engine
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
    warnings: Annotated[list[str], Field(description="What was accepted and has no effect.")] = []


class OpenAIErrorDetail(BaseModel):
    """What went wrong; `param` is the invalid field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """OpenAI's error envelope."""

    error: OpenAIErrorDetail
