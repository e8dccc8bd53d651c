"""A1111's JSON, as far as we support it.

Its clients send dozens of fields. Fields that would change the image in an unsupported way are
refused unless they're off; other unknown fields are ignored and listed in the response's `info`. As
in A1111, numbers may be texts or have a fraction of zero. Doesn't depend on the store.
"""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

from jobs.errors import FieldProblem
from jobs.fields import FIELDS, PER_PROMPT
from jobs.request import MAX_COPIES, MAX_SEED
from service.submit.schemas import AnyPrompt, NegativePrompt, PromptItem, Side, SubmitJob, bounds

_NAMES = {
    **{field.name: field.a1111 for field in FIELDS.values() if field.a1111},
    "prompts": "prompt",
    "model": "override_settings",
}
"""A1111's names of our fields."""


def _off(value: bool) -> bool:
    if value:
        raise ValueError("isn't supported: must be false or left out")
    return value


def _no_script(name: str) -> str:
    if name.lower() not in ("", "none"):
        raise ValueError(f"{name[:80]!r} isn't supported: must be empty, 'None' or left out")
    return name


def _no_scripts(scripts: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name, script in scripts.items():
        if not _is_disabled(script):
            raise ValueError(f"{name[:80]!r} isn't supported: disable it or leave it out")
    return scripts


def _is_disabled(script: JsonValue) -> bool:
    """Whether a script's arguments turn it off.

    By convention the first argument says whether it's on, or `enabled` in each of its arguments.
    """
    args = script.get("args") if isinstance(script, dict) else script
    if isinstance(args, dict):
        args = [args]
    if not isinstance(args, list):
        return args is None
    if args and args[0] is False:
        return True
    return all(isinstance(arg, dict) and arg.get("enabled") is False for arg in args)


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
"""An unsupported flag."""

TaskId = Annotated[str, Field(min_length=1, max_length=200)]


class TextToImage(BaseModel):
    """`POST /sdapi/v1/txt2img`. Seed -1 means random; `override_settings` may name the model."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    prompt: AnyPrompt | None = None
    negative_prompt: NegativePrompt | None = None
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = None
    steps: Annotated[int, bounds("steps")] | None = None
    cfg_scale: Annotated[float, bounds("guidance_scale")] | None = None
    width: Side | None = None
    height: Side | None = None
    batch_size: Annotated[int, bounds("n")] | None = None
    n_iter: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None
    override_settings: dict[str, JsonValue] | None = None
    send_images: bool | None = None
    enable_hr: Off | None = None
    restore_faces: Off | None = None
    tiling: Off | None = None
    script_name: Annotated[str, AfterValidator(_no_script)] | None = None
    styles: Annotated[list[str], Field(max_length=0)] | None = None
    alwayson_scripts: Annotated[dict[str, JsonValue], AfterValidator(_no_scripts)] | None = None
    init_images: Annotated[list[str], Field(max_length=0)] | None = None
    force_task_id: TaskId | None = None

    @field_validator("n_iter")
    @classmethod
    def _check_images(cls, n_iter: int | None, others: ValidationInfo) -> int | None:
        images = (others.data.get("batch_size") or 1) * (n_iter or 1)
        if images > MAX_COPIES:
            raise ValueError(f"batch_size and n_iter make {images} images, more than {MAX_COPIES}")
        return n_iter

    @property
    def ignored(self) -> list[str]:
        """Fields that have no effect."""
        settings = self.override_settings or {}
        known = {"sd_model_checkpoint"}
        return sorted(
            [*(self.model_extra or {}), *(name for name in settings if name not in known)]
        )

    def as_job(self, default_model: str, session: str) -> SubmitJob:
        """The equivalent job of one prompt; `session` is its caller's. Raises ValidationError."""
        checkpoint: Any = (self.override_settings or {}).get("sd_model_checkpoint")
        names = {name: a1111 for name in PER_PROMPT if (a1111 := FIELDS[name].a1111)}
        values = {name: getattr(self, a1111) for name, a1111 in names.items()}
        values["seed"] = None if self.seed == -1 else self.seed
        metadata: dict[str, Any] = {"api": "sdapi", "session": session}
        if self.force_task_id is not None:
            metadata["task"] = self.force_task_id
        values["n"] = (self.batch_size or 1) * (self.n_iter or 1)
        return SubmitJob(
            model=default_model if checkpoint is None else checkpoint,
            # A1111 takes an empty prompt, which `PromptItem` would refuse.
            prompts=[PromptItem.model_construct(prompt=self.prompt or "")],
            metadata=metadata,
            **values,
        )

    def field_of(self, problem: FieldProblem) -> FieldProblem:
        """A problem of the job, mapped to the field that the caller wrote."""
        name = problem.pointer.split("/")[1] if problem.pointer else ""
        if name == "prompts":
            name = "n" if problem.pointer == "/prompts" else "prompts"
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


class TaskToFollow(BaseModel):
    """`POST /internal/progress`: the `force_task_id` of a txt2img."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id_task: TaskId
    live_preview: bool = True
    id_live_preview: int = -1


class TaskProgress(BaseModel):
    """Progress of one txt2img. `live_preview` is a data URL."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int = -1
    textinfo: str | None = None


class Checkpoint(BaseModel):
    """A model of the catalog."""

    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class Options(BaseModel):
    """The options that clients read. Only the model can be chosen."""

    sd_model_checkpoint: Annotated[str, Field(description="The model of the next txt2img.")]
    sd_checkpoint_hash: str = ""
    sd_vae: str = "Automatic"
    samples_format: str = "png"
    CLIP_stop_at_last_layers: int = 1


class ChosenOptions(BaseModel):
    """`POST /sdapi/v1/options`: `sd_model_checkpoint`; other options have no effect."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    sd_model_checkpoint: (
        Annotated[str, Field(min_length=1, max_length=100, description="A model's name.")] | None
    ) = None


class OptionsSet(BaseModel):
    """The options that have no effect, among those that were set to another value."""

    ignored: list[str]


class PngToRead(BaseModel):
    """`POST /sdapi/v1/png-info`: an image in base64 or as a data URL."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    image: Annotated[
        str,
        Field(min_length=1, json_schema_extra={"contentEncoding": "base64"}),
    ]


class PngInfo(BaseModel):
    """An image's generation parameters."""

    info: str
    items: dict[str, JsonValue]
    parameters: dict[str, JsonValue]
