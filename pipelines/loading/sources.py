"""Find where an entry's components come from: its folder, its single file, or its `components`.

A single file needs configs. They come from the diffusers folder or hub id in `config`, or else are
those that diffusers uses for the file's kind of model. Components that neither the file nor the
config's folder has must be listed in the entry's `components`. Only headers and configs are read.
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
"""Components that are optional with a single file, as in diffusers, unless its entry lists them."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """The folder with the configs, and its index with the entry's changes.

    `sources` has the components that come from elsewhere. Those in `left_out` are None in the
    pipeline.
    """

    folder: Path
    index: Mapping[str, Any]
    sources: Mapping[str, Source]
    left_out: tuple[str, ...]


def is_file(path: str) -> bool:
    """Whether a path is a single file, or has the name of a weight file."""
    return Path(path).suffix.lower() in SUFFIXES or Path(path).is_file()


def of_file(model: Model, *, weights: bool) -> Assembly:
    """Assemble a single file, its configs and the entry's components.

    Without `weights`, only configs are fetched for hub ids and missing weights are ignored, because
    a plan doesn't need them. Raises ModelUnavailable without the model's name.
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
    """Fetch the missing components from the configs' hub id. Raises ModelUnavailable."""
    if not Path(config).is_absolute():
        fetch(config, [*CONFIGS, *(f"{name}/*{SAFETENSORS}" for name in missing)])
    lacking = [name for name in missing if not _weights_in(folder / name)]
    if lacking:
        example = ", ".join(f'{name} = "..."' for name in lacking)
        raise ModelUnavailable(
            f"neither {header.path} nor {folder} has {' or '.join(lacking)}; set components = "
            f"{{ {example} }}"
        )


def with_components(model: Model, assembly: Assembly, weights: bool) -> Assembly:
    """Apply the entry's `components` to the assembly. Raises ModelUnavailable."""
    index = dict(assembly.index)
    sources, left_out = dict(assembly.sources), list(assembly.left_out)
    names = [name for name, *_ in listed(index, null=True)]
    for name, place in model.components.items():
        if name not in names:
            raise ModelUnavailable(
                f"components: {index['_class_name']} has no {name!r}; expected one of "
                f"{', '.join(names)}"
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
                f"components.{name}: can't tell the class of {source.weights}; use a folder with "
                "a config.json"
            )
    for name in left_out:
        index[name] = [None, None]
        sources.pop(name, None)
    return Assembly(assembly.folder, index, sources, tuple(dict.fromkeys(left_out)))


def _tokenizer_of(name: str, names: list[str], model: Model) -> Iterator[str]:
    """The tokenizer of a text encoder that is left out; it's left out too."""
    tokenizer = name.replace("text_encoder", "tokenizer")
    if tokenizer != name and tokenizer in names and tokenizer not in model.components:
        yield tokenizer


def _source(name: str, place: str, configs: Path, weights: bool) -> Source:
    """Resolve a single file, a folder, a diffusers folder with the component, or a hub id."""
    what = f"components.{name}"
    if is_file(place):
        file = Path(place) if Path(place).is_absolute() else fetch_file(place)
        read_header(file)
        return Source(file, configs / name)
    if Path(place).is_absolute():
        folder = Path(place)
        if not folder.is_dir():
            raise ModelUnavailable(f"{what}: no file or folder at {folder}")
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
    """Library and class: from the config of a diffusers model, otherwise from the index."""
    config = source.config / "config.json"
    if not source.is_file and config.is_file():
        name = read_object(config).get("_class_name")
        if isinstance(name, str):
            return ["diffusers", name]
    return list(listed_class)


def _folder(config: str, what: str, *, inferred: bool, path: Path) -> Path:
    """The folder with a pipeline's configs, from a path or a hub id. Raises ModelUnavailable."""
    if Path(config).is_absolute():
        folder = Path(config)
        if not folder.is_dir():
            raise ModelUnavailable(f"{what}: the folder {folder} doesn't exist")
        return folder
    try:
        return fetch(config, CONFIGS)
    except ModelUnavailable as error:
        if not inferred:
            raise
        raise ModelUnavailable(
            f"{path} has no configs, and those of {config}, which it seems to be, aren't available "
            f'({error}); set config = "..." to a diffusers folder that has them',
            may_pass=error.may_pass,
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """Read a folder's model_index.json. Raises ModelUnavailable."""
    index = read_object(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ModelUnavailable(f"{folder / INDEX} doesn't name a diffusers pipeline (_class_name)")
    return index


def listed(index: Mapping[str, Any], *, null: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """An index's components with library and class; `null` includes those set to null."""
    for name, value in index.items():
        is_pair = isinstance(value, list) and len(value) == 2
        if is_pair and (null or all(isinstance(item, str) for item in value)):
            yield name, value[0], value[1]


def _has_weights(library: str, class_name: str) -> bool:
    kind = component_class(library, class_name)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _weights_in(folder: Path) -> bool:
    return any(folder.glob(f"*{SAFETENSORS}"))
