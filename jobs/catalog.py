"""Reads `models.toml` into frozen models, and checks requests against them.

Every mistake in the file is a ConfigurationError that names the entry and the field. Bounds of a
request that hold for every model are in `jobs/fields.py`. This module imports no torch and loads no
weights, so only workers can tell whether a hub id or checkpoint is usable.
"""

import math
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from jobs.errors import ConfigurationError, FieldProblem, UnknownModel
from jobs.fields import FIELDS
from jobs.options import CONTEXT_PARALLEL, PIPELINED, PLACEMENTS, RULES, refusal
from jobs.request import MAX_PROMPT_CHARACTERS, MAX_SEED, ImageRequest
from jobs.toml_table import Entry

BUILT_IN = Path(__file__).with_name("models.toml")
"""The catalog for folders without one; also what `imagemill init` writes."""

BUNDLED = {"bundled:demo": Path(__file__).resolve().parents[1] / "demo" / "model"}
"""Paths that name a model of ours, wherever it's installed."""

SMALLEST_SIDE = 16
"""Shortest width or height in pixels."""

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("fp8", "int8")
CACHES = ("taylorseer",)
"""The only one of diffusers' feature caches that works with batches. It's lossy, and a worker
refuses it if the model can't use it. `first_block` decides by the mean over all rows, so an image
would depend on the others in its batch. The other caches need numbers that only a model's authors
have."""
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAME_RULE = "use up to 100 letters, digits, '.', '_' and '-'"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)+")
_HUB_FILE = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*){2,}")
_WEIGHT_FILES = (".safetensors", ".gguf", ".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for what the caller leaves out. Sides are in pixels.

    The values here are for a model without defaults of its own; see `Model.unset`.
    """

    width: int = 1024
    height: int = 1024
    steps: int = 28
    guidance_scale: float = 3.5
    negative_prompt: str | None = None


DERIVED = ("width", "height", "steps", "guidance_scale")
"""Fields of `Defaults` that a model can have values of its own for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a caller may ask for. Sides are multiples of `multiple`; empty `sizes` allow any."""

    max_pixels: int = 4 * 1024 * 1024
    max_steps: int = 200
    max_prompts: int = 10_000
    max_guidance_scale: float = 30.0
    multiple: int = 16
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the catalog. `path` is an absolute folder or file if `local`, else a hub id.

    `config` and the values of `components` are absolute paths or hub ids; a component that is None
    is left out. `quantization` is the denoiser's, or maps components to theirs. With `workers` None
    there's one per device or device group. `max_memory` maps a device to bytes or a size such as
    "16GB". `unset` names the fields of `defaults` that the entry doesn't set. The model's own
    values replace them (`jobs.defaults`) once its folder has been read. `aliases` are further names
    that requests may use.
    """

    name: str
    path: str
    local: bool = False
    revision: str | None = None
    variant: str | None = None
    dtype: str = "bfloat16"
    placement: str = "replica"
    workers: int | None = None
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    max_sequence_length: int | None = None
    devices: tuple[str, ...] = ()
    max_memory: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    unload: bool = False
    ring: int = 1
    ulysses: int = 1
    cfg: int = 1
    tensor: int = 1
    stages: int = 1
    chunks: int = 1
    attention_backend: str | None = None
    compile: bool = False
    cuda_graphs: bool = False
    quantization: str | Mapping[str, str] | None = field(default=None, hash=False)
    cache: str | None = None
    unset: tuple[str, ...] = ()
    config: str | None = None
    components: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Names the weights on any machine: a hub id or the end of the path, and the revision."""
        place = "/".join(Path(self.path).parts[-2:]) if self.local else self.path
        return f"{place}@{self.revision}" if self.revision else place

    @property
    def quantization_text(self) -> str | None:
        """`quantization` as text, such as `transformer=fp8, text_encoder_2=int8`."""
        if isinstance(self.quantization, Mapping):
            return ", ".join(f"{name}={scheme}" for name, scheme in self.quantization.items())
        return self.quantization

    @property
    def options(self) -> frozenset[str]:
        """The options with rules (`jobs.options`) that the entry sets."""
        # `fields` doesn't show the default of `max_memory`, because it's made by a factory.
        default_of = {item.name: item.default for item in fields(Model)} | {"max_memory": {}}
        named = {rule.option for rule in RULES}
        return frozenset(name for name in named if getattr(self, name) != default_of[name])

    @property
    def ranks(self) -> int:
        """How many processes make up one worker: 1, or the size of its group.

        A context-parallel group has ring x ulysses x cfg x tensor ranks; a pipelined one has one
        rank per stage.
        """
        return self.ring * self.ulysses * self.cfg * self.tensor * self.stages


@dataclass(frozen=True, slots=True)
class Catalog:
    """The models that a deployment serves, in file order."""

    models: Mapping[str, Model]

    def get(self, name: str) -> Model:
        """The model with that name or alias. Raises UnknownModel."""
        named = next((model for model in self if name in (model.name, *model.aliases)), None)
        if named is None:
            raise UnknownModel(name, tuple(self.models))
        return named

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models.values())

    def __len__(self) -> int:
        return len(self.models)


def load_catalog(path: Path) -> Catalog:
    """Read a `models.toml`. Raises ConfigurationError naming the file, the entry and the field."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"no catalog at {path}; set IMAGEMILL_MODELS to its path, or write one with "
            "`imagemill init`"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    top = Entry(str(path), document)
    models = top.table("models")
    top.finish()
    if not models.names:
        raise ConfigurationError(f"{path}: no [models.NAME] entry")
    folder = path.absolute().parent
    catalog = Catalog({name: _model(name, models.table(name), folder) for name in models.names})
    _check_aliases(models, catalog)
    return catalog


def problems(model: Model, request: ImageRequest, pointer: str) -> list[FieldProblem]:
    """Everything in `request` that `model` doesn't allow. `pointer` is the JSON pointer to it."""
    limits = model.limits
    wrong = [*_size_problems(limits, request), *_prompt_problems(request)]
    if not 1 <= request.steps <= limits.max_steps:
        wrong.append(("steps", f"must be between 1 and {limits.max_steps}"))
    if not 0 <= request.guidance_scale <= limits.max_guidance_scale:
        wrong.append(("guidance_scale", f"must be between 0 and {limits.max_guidance_scale:g}"))
    if not 0 <= request.seed <= MAX_SEED:
        wrong.append(("seed", f"must be between 0 and {MAX_SEED}"))
    for name, request_field in FIELDS.items():
        if request_field.choices and not request_field.accepts(getattr(request, name)):
            wrong.append((name, f"must be one of {', '.join(request_field.choices)}"))
    return [FieldProblem(f"{pointer}/{name}", f"{name} {detail}") for name, detail in wrong]


def _prompt_problems(request: ImageRequest) -> Iterator[tuple[str, str]]:
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name) or ""
        if len(text) > MAX_PROMPT_CHARACTERS:
            yield name, f"must be at most {MAX_PROMPT_CHARACTERS} characters"
        if _LONE_SURROGATE.search(text):
            yield name, "must be valid Unicode; it contains an unpaired surrogate"


def _size_problems(limits: Limits, request: ImageRequest) -> Iterator[tuple[str, str]]:
    for name in ("width", "height"):
        side = getattr(request, name)
        if side < SMALLEST_SIDE or side % limits.multiple:
            yield name, f"must be a multiple of {limits.multiple} and at least {SMALLEST_SIDE}"
    if request.pixels > limits.max_pixels:
        size = f"{request.width}x{request.height}"
        side = math.isqrt(limits.max_pixels) // limits.multiple * limits.multiple
        yield (
            "width",
            (
                f"and height make {size}, more than {limits.max_pixels} pixels; "
                f"the largest square is {side}x{side}"
            ),
        )
    elif limits.sizes and (request.width, request.height) not in limits.sizes:
        allowed = ", ".join(f"{width}x{height}" for width, height in limits.sizes)
        yield "width", f"and height must be one of {allowed}"


def _model(name: str, entry: Entry, folder: Path) -> Model:
    if not _MODEL_NAME.fullmatch(name):
        raise entry.wrong("", f"is an invalid name: {_NAME_RULE}")
    path, local = _weights(entry, folder)
    defaults, unset = _defaults(entry.table("defaults"))
    limits = _limits(entry.table("limits"))
    model = Model(
        name=name,
        path=path,
        local=local,
        revision=entry.text("revision"),
        variant=entry.text("variant"),
        dtype=entry.one_of("dtype", DTYPES, "bfloat16"),
        placement=entry.one_of("placement", PLACEMENTS, "replica"),
        workers=entry.whole_or_none("workers"),
        defaults=defaults,
        unset=unset,
        limits=limits,
        max_sequence_length=entry.whole_or_none("max_sequence_length"),
        devices=entry.texts("devices"),
        max_memory=entry.memory("max_memory"),
        unload=entry.flag("unload"),
        attention_backend=entry.text("attention_backend"),
        compile=entry.flag("compile"),
        cuda_graphs=entry.flag("cuda_graphs"),
        quantization=entry.choices("quantization", QUANTIZATIONS),
        cache=entry.one_of_or_none("cache", CACHES),
        config=_config(entry, path, folder),
        components=_components(entry, folder),
        aliases=entry.texts("aliases"),
        **{part: entry.whole(part, 1) for part in _GROUP_FIELDS},
    )
    entry.finish()
    model = _with_default_degree(entry, model)
    _check_placement(entry, model)
    _check_defaults(entry, model)
    return model


def _check_aliases(models: Entry, catalog: Catalog) -> None:
    """Refuse an alias that isn't a valid name, or that another model has as name or alias."""
    owners = {model.name: model.name for model in catalog}
    for model in catalog:
        for alias in model.aliases:
            entry = models.table(model.name)
            if not _MODEL_NAME.fullmatch(alias):
                raise entry.wrong("aliases", f"has an invalid name {alias!r}: {_NAME_RULE}")
            owner = owners.setdefault(alias, model.name)
            if owner != model.name or alias == model.name:
                raise entry.wrong("aliases", f"has {alias!r}, which already means {owner!r}")


_GROUP_FIELDS = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks")


def _weights(entry: Entry, folder: Path) -> tuple[str, bool]:
    """The absolute folder or file and True, or the hub id and False."""
    text = entry.text("path")
    if text is None:
        raise entry.wrong(
            "path", "is missing; expected a diffusers folder, a weight file or a hub id"
        )
    location = _location(entry, "path", text, folder)
    return location, Path(location).is_absolute()


def _config(entry: Entry, path: str, folder: Path) -> str | None:
    text = entry.text("config")
    if text is not None and Path(path).suffix.lower() not in _WEIGHT_FILES:
        raise entry.wrong("config", "is only allowed if path is a single file")
    return None if text is None else _location(entry, "config", text, folder)


def _components(entry: Entry, folder: Path) -> dict[str, str | None]:
    texts = entry.places("components").items()
    return {
        name: text and _location(entry, f"components.{name}", text, folder) for name, text in texts
    }


def _location(entry: Entry, field_name: str, text: str, folder: Path) -> str:
    """The absolute path of `text`, which is relative to `folder`, or `text` if it's a hub id."""
    if text in BUNDLED:
        return str(BUNDLED[text])
    if text.startswith(("/", "./", "../")) or (folder / text).exists():
        return str((folder / text).resolve())
    # A file on the hub is OWNER/REPOSITORY/PATH; a component may also be such a folder.
    is_file = Path(text).suffix.lower() in _WEIGHT_FILES
    in_folder = _HUB_FOLDER if field_name.startswith("components") else _HUB_ID
    pattern = _HUB_FILE if is_file else in_folder
    if not pattern.fullmatch(text):
        kind = "file" if is_file else "folder"
        raise entry.wrong(
            field_name, f"{text!r} is neither a {kind} next to the catalog nor a hub id"
        )
    return text


def _defaults(entry: Entry) -> tuple[Defaults, tuple[str, ...]]:
    """The entry's defaults, and the fields it doesn't set."""
    fallback = Defaults()
    unset = tuple(name for name in DERIVED if name not in entry.names)
    defaults = Defaults(
        width=entry.whole("width", fallback.width),
        height=entry.whole("height", fallback.height),
        steps=entry.whole("steps", fallback.steps),
        guidance_scale=entry.number("guidance_scale", fallback.guidance_scale),
        negative_prompt=entry.text("negative_prompt"),
    )
    entry.finish()
    return defaults, unset


def _limits(entry: Entry) -> Limits:
    fallback = Limits()
    limits = Limits(
        max_pixels=entry.whole("max_pixels", fallback.max_pixels),
        max_steps=entry.whole("max_steps", fallback.max_steps),
        max_prompts=entry.whole("max_prompts", fallback.max_prompts),
        max_guidance_scale=entry.number("max_guidance_scale", fallback.max_guidance_scale),
        multiple=entry.whole("multiple", fallback.multiple),
        sizes=entry.sizes("sizes"),
    )
    entry.finish()
    return limits


def _with_default_degree(entry: Entry, model: Model) -> Model:
    """The model, with Ulysses over all listed devices if a context-parallel entry sets no degree.

    Ulysses moves less data than a ring, and handles heads and sizes that don't divide evenly.
    """
    has_no_degree = model.ring == model.ulysses == model.tensor == 1
    if model.placement != "context_parallel" or not has_no_degree or len(model.devices) < 2:
        return model
    degree, remainder = divmod(len(model.devices), model.cfg)
    if remainder:
        raise entry.wrong("cfg", f"does not divide the {len(model.devices)} devices evenly")
    return replace(model, ulysses=degree)


def _check_placement(entry: Entry, model: Model) -> None:
    """Refuse options that don't go together, and groups of one."""
    rule = refusal(model.placement, model.options)
    if rule:
        raise entry.wrong(rule.option, rule.detail())
    if model.placement == CONTEXT_PARALLEL and model.ranks < 2:
        raise entry.wrong("ring", "or ulysses, cfg or tensor must be 2 or more")
    if model.placement == PIPELINED and model.stages < 2:
        raise entry.wrong("stages", "must be 2 or more")


def _check_defaults(entry: Entry, model: Model) -> None:
    """Refuse defaults that the entry sets and its limits don't allow."""
    # The model's own defaults are clamped to the limits later (`jobs.defaults`). Until its width
    # and height are known, the size can't be checked, only each side that the entry sets.
    if {"width", "height"} & set(model.unset):
        model = replace(model, limits=replace(model.limits, max_pixels=sys.maxsize, sizes=()))
    values = {item.name: getattr(model.defaults, item.name) for item in fields(Defaults)}
    request = ImageRequest(model=model.name, prompt="a prompt", seed=0, **values)
    for problem in problems(model, request, ""):
        name = problem.pointer.removeprefix("/")
        if name not in model.unset:
            raise entry.wrong(f"defaults.{name}", problem.detail.removeprefix(f"{name} "))
