"""A1111's JSON, as far as we support it.

Its clients send dozens of fields. Fields that would change the image in an unsupported way are
refused unless they're off; other unknown fields are ignored and listed in the response's `info`.
Doesn't depend on the store.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from jobs.errors import FieldProblem
from jobs.fields import FIELDS, PER_PROMPT
from jobs.request import MAX_COPIES, MAX_SEED
from service.submit.schemas import NegativePrompt, Prompt, Side, SubmitJob, bounds

_NAMES = {
    **{field.name: field.a1111 for field in FIELDS.values() if field.a1111},
    "prompts": "prompt",
    "model": "override_settings",
}
"""A1111's names of our fields."""


def _off(value: bool) -> bool:
    if value:
        raise ValueError("not supported: must be false")
    return value


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
"""An unsupported flag. (A `Literal[False]` would also accept 0.)"""


class TextToImage(BaseModel):
    """`POST /sdapi/v1/txt2img`. Seed -1 means random; `override_settings` may name the model."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Prompt
    negative_prompt: NegativePrompt | None = None
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = None
    steps: Annotated[int, bounds("steps")] | None = None
    cfg_scale: Annotated[float, bounds("guidance_scale")] | None = None
    width: Side | None = None
    height: Side | None = None
    batch_size: Annotated[int, bounds("n")] | None = None
    n_iter: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None
    override_settings: dict[str, JsonValue] | None = None
    send_images: bool = True
    enable_hr: Off | None = None
    restore_faces: Off | None = None
    tiling: Off | None = None
    script_name: Literal[""] | None = None
    styles: Annotated[list[str], Field(max_length=0)] | None = None
    alwayson_scripts: Annotated[dict[str, JsonValue], Field(max_length=0)] | None = None
    init_images: Annotated[list[str], Field(max_length=0)] | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields that have no effect."""
        settings = self.override_settings or {}
        known = {"sd_model_checkpoint"}
        return sorted(
            [*(self.model_extra or {}), *(name for name in settings if name not in known)]
        )

    def as_job(self, default_model: str) -> SubmitJob:
        """The equivalent job of one prompt. Raises ValidationError."""
        checkpoint: Any = (self.override_settings or {}).get("sd_model_checkpoint")
        names = {name: a1111 for name in PER_PROMPT if (a1111 := FIELDS[name].a1111)}
        values = {name: getattr(self, a1111) for name, a1111 in names.items()}
        values["seed"] = None if self.seed == -1 else self.seed
        values["n"] = (self.batch_size or 1) * (self.n_iter or 1)
        return SubmitJob(
            model=default_model if checkpoint is None else checkpoint,
            prompts=[self.prompt],
            metadata={"api": "sdapi"},
            **values,
        )

    def field_of(self, problem: FieldProblem) -> FieldProblem:
        """A problem of the job, mapped to the field that the caller wrote."""
        name = problem.pointer.split("/")[1] if problem.pointer else ""
        if problem.pointer == "/prompts":
            name = "n"
        return FieldProblem(f"/{_NAMES.get(name, name)}", problem.detail)


class Pictures(BaseModel):
    """The response to txt2img: base64 PNGs, the request, and `info`, a string of JSON."""

    images: list[str]
    parameters: dict[str, JsonValue]
    info: str


class ProgressState(BaseModel):
    """State of the running job."""

    skipped: bool = False
    interrupted: bool = False
    job: str
    job_count: int
    job_no: int
    job_timestamp: str
    sampling_step: int
    sampling_steps: int


class Progress(BaseModel):
    """Progress of the caller's oldest unfinished txt2img; 0 if there isn't one."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None
    textinfo: str | None


class Checkpoint(BaseModel):
    """A model of the catalog."""

    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class PngToRead(BaseModel):
    """`POST /sdapi/v1/png-info`: an image in base64 or as a data URL."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image: Annotated[
        str,
        Field(min_length=1, json_schema_extra={"contentEncoding": "base64"}),
    ]


class PngInfo(BaseModel):
    """An image's generation parameters."""

    info: str
    items: dict[str, JsonValue]
    parameters: dict[str, JsonValue]
