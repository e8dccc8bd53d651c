"""Where an entry's components come from: its folder, its single file, and what it names apart.

A single file needs configs: a diffusers folder or hub id in `config`, else those that diffusers
takes for the kind of model that the file holds. What neither the file nor that folder has, the
entry names in `components`. Reads headers and configs; loads nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines.loading.components import DENOISERS, Source, component_class
from pipelines.loading.contents import default_config, of_component, refuse_others
from pipelines.loading.examination import INDEX, read_object
from pipelines.loading.headers import SAFETENSORS, SUFFIXES, Header, read_header
from pipelines.loading.hub import CONFIGS, fetch, fetch_file

_OPTIONAL = ("safety_checker", "image_encoder")
"""Components that a single file goes without, as in diffusers, unless its entry names them."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """The folder with the configs, and its index as the entry changes it.

    `sources` are components from elsewhere; one of `left_out` is None in the pipeline.
    """

    folder: Path
    index: Mapping[str, Any]
    sources: Mapping[str, Source]
    left_out: tuple[str, ...]


def is_file(path: str) -> bool:
    """Whether a path names a weight file, or something that somebody takes for one."""
    return Path(path).suffix.lower() in SUFFIXES or Path(path).is_file()


def of_file(model: Model, *, weights: bool) -> Assembly:
    """What a single file makes, with its configs and the entry's components.

    Without `weights`, of hub ids only configs are fetched, and nothing is missing: for a plan.
    Raises ModelUnavailable without the model's name.
    """
    path = Path(model.path) if model.local else fetch_file(model.path, model.revision)
    header = read_header(path)
    refuse_others(header)
    config = model.config or default_config(header)
    folder = _folder(config, f'config = "{config}"', inferred=model.config is None, path=path)
    index = read_index(folder)
    sources: dict[str, Source] = {}
    missing: list[str] = []
    left_out: list[str] = []
    for name, library, class_name in listed(index):
        if name in model.components or not _has_weights(library, class_name):
            continue
        if name in DENOISERS or of_component(header.tensors, name, class_name):
            sources[name] = Source(path, folder / name)
        elif not _weights_in(folder / name):
            (left_out if name in _OPTIONAL else missing).append(name)
    if missing and (weights or Path(config).is_absolute()):
        _complete(model, header, folder, config, missing)
    return with_components(model, Assembly(folder, index, sources, tuple(left_out)), weights)


def _complete(model: Model, header: Header, folder: Path, config: str, missing: list[str]) -> None:
    """Fetch what the file lacks from the configs' hub id. Raises ModelUnavailable where none."""
    if not Path(config).is_absolute():
        fetch(config, [*CONFIGS, *(f"{name}/*{SAFETENSORS}" for name in missing)])
    lacking = [name for name in missing if not _weights_in(folder / name)]
    if lacking:
        example = ", ".join(f'{name} = "..."' for name in lacking)
        raise ModelUnavailable(
            f"{header.path} holds no {' and no '.join(lacking)}, and neither does {folder}: name "
            f"them in components = {{ {example} }}"
        )


def with_components(model: Model, assembly: Assembly, weights: bool) -> Assembly:
    """The assembly with what the entry's `components` say. Raises ModelUnavailable."""
    index = dict(assembly.index)
    sources, left_out = dict(assembly.sources), list(assembly.left_out)
    names = [name for name, *_ in listed(index, null=True)]
    for name, place in model.components.items():
        if name not in names:
            raise ModelUnavailable(
                f"components: {index['_class_name']} has no {name!r}; it has {', '.join(names)}"
            )
        if place is None and name in (*DENOISERS, "vae"):
            raise ModelUnavailable(f"components: {name} can't be left out")
        if place is None:
            left_out += [name, *_tokenizer_of(name, names, model)]
            continue
        source = _source(name, place, assembly.folder, weights)
        sources[name] = source
        index[name] = _class_of(source, index[name])
        if index[name][1] is None:
            raise ModelUnavailable(
                f"components.{name}: {source.weights} doesn't say of which class it is; it needs "
                "a folder with a config.json"
            )
    for name in left_out:
        index[name] = [None, None]
        sources.pop(name, None)
    return Assembly(assembly.folder, index, sources, tuple(dict.fromkeys(left_out)))


def _tokenizer_of(name: str, names: list[str], model: Model) -> Iterator[str]:
    """The tokenizer that goes with a text encoder that is left out."""
    tokenizer = name.replace("text_encoder", "tokenizer")
    if tokenizer != name and tokenizer in names and tokenizer not in model.components:
        yield tokenizer


def _source(name: str, place: str, configs: Path, weights: bool) -> Source:
    """A folder, the component's folder inside a diffusers folder, a single file, or a hub id."""
    what = f"components.{name}"
    if is_file(place):
        file = Path(place) if Path(place).is_absolute() else fetch_file(place)
        read_header(file)
        return Source(file, configs / name)
    if Path(place).is_absolute():
        folder = Path(place)
        if not folder.is_dir():
            raise ModelUnavailable(f"{what}: there is no file or folder {folder}")
        folder = folder / name if (folder / INDEX).is_file() else folder
    else:
        owner, repository, *inner = place.split("/")
        hub_id = f"{owner}/{repository}"
        root = fetch(hub_id, CONFIGS)
        inner = inner or ([name] if (root / INDEX).is_file() else [])
        pattern = "/".join([*inner, f"*{SAFETENSORS}"])
        folder = Path(fetch(hub_id, [*CONFIGS, pattern]) if weights else root, *inner)
    if not folder.is_dir():
        raise ModelUnavailable(f"{what}: the folder {folder} is missing")
    return Source(folder, folder)


def _class_of(source: Source, listed_class: Any) -> list[Any]:
    """Library and class: diffusers' models say it themselves; others are what the index says."""
    config = source.config / "config.json"
    if not source.is_file and config.is_file():
        name = read_object(config).get("_class_name")
        if isinstance(name, str):
            return ["diffusers", name]
    return list(listed_class)


def _folder(config: str, what: str, *, inferred: bool, path: Path) -> Path:
    """The folder with a pipeline's configs, out of a path or a hub id. Raises ModelUnavailable."""
    if Path(config).is_absolute():
        folder = Path(config)
        if not folder.is_dir():
            raise ModelUnavailable(f"{what}: there is no folder {folder}")
        return folder
    try:
        return fetch(config, CONFIGS)
    except ModelUnavailable as error:
        if not inferred:
            raise
        raise ModelUnavailable(
            f"{path} comes without configs, and those of {config}, which it seems to be, can't be "
            f'had ({error}): name a diffusers folder with them, config = "..."',
            may_pass=error.may_pass,
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json. Raises ModelUnavailable."""
    index = read_object(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ModelUnavailable(f"{folder / INDEX} names no diffusers pipeline in _class_name")
    return index


def listed(index: Mapping[str, Any], *, null: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """An index's components with library and class; with `null`, those that it leaves out too."""
    for name, value in index.items():
        is_pair = isinstance(value, list) and len(value) == 2
        if is_pair and (null or all(isinstance(each, str) for each in value)):
            yield name, value[0], value[1]


def _has_weights(library: str, class_name: str) -> bool:
    kind = component_class(library, class_name)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _weights_in(folder: Path) -> bool:
    return any(folder.glob(f"*{SAFETENSORS}"))
