"""A1111's JSON, as far as it asks for what we do.

Its clients send dozens of fields. Those that would change the picture in a way we do not do are
refused unless they ask for nothing; the rest is let pass and named in the answer's `info`. Knows no
store.
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
"""Our fields, by the names that callers know them under."""


def _off(value: bool) -> bool:
    if value:
        raise ValueError("must be false: this is not done here")
    return value


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
"""What is not done here. (A literal would take 0 for false.)"""


class TextToImage(BaseModel):
    """`POST /sdapi/v1/txt2img`. `seed` -1 draws one; `override_settings` may name the model."""

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
        """Fields that have no effect here."""
        settings = self.override_settings or {}
        known = {"sd_model_checkpoint"}
        return sorted(
            [*(self.model_extra or {}), *(name for name in settings if name not in known)]
        )

    def as_job(self, default_model: str) -> SubmitJob:
        """The same as a job of one prompt. Raises ValidationError."""
        checkpoint: Any = (self.override_settings or {}).get("sd_model_checkpoint")
        given = {name: getattr(self, a1111) for name in PER_PROMPT if (a1111 := FIELDS[name].a1111)}
        given["seed"] = None if self.seed == -1 else self.seed
        given["n"] = (self.batch_size or 1) * (self.n_iter or 1)
        return SubmitJob(
            model=default_model if checkpoint is None else checkpoint,
            prompts=[self.prompt],
            metadata={"api": "sdapi"},
            **given,
        )

    def field_of(self, problem: FieldProblem) -> FieldProblem:
        """A problem of the job as one of the field that the caller wrote."""
        name = problem.pointer.split("/")[1] if problem.pointer else ""
        if problem.pointer == "/prompts":
            name = "n"
        return FieldProblem(f"/{_NAMES.get(name, name)}", problem.detail)


class Pictures(BaseModel):
    """The answer to txt2img: PNGs in base64, what was asked, and `info`, JSON in a text."""

    images: list[str]
    parameters: dict[str, JsonValue]
    info: str


class ProgressState(BaseModel):
    """Where the job is that is being made."""

    skipped: bool = False
    interrupted: bool = False
    job: str
    job_count: int
    job_no: int
    job_timestamp: str
    sampling_step: int
    sampling_steps: int


class Progress(BaseModel):
    """How far the caller's oldest unfinished txt2img is; 0 when there is none."""

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
    """`POST /sdapi/v1/png-info`: a picture in base64, or as a data URL."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image: Annotated[
        str,
        Field(min_length=1, json_schema_extra={"contentEncoding": "base64"}),
    ]


class PngInfo(BaseModel):
    """What a picture says of how it was made."""

    info: str
    items: dict[str, JsonValue]
    parameters: dict[str, JsonValue]
