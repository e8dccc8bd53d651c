"""A checkpoint on disk, a diffusers folder or a single file: found, looked over, loaded.

Everything that can be wrong with one ends as ModelUnavailable: one sentence that names the catalog
entry and the file. Files are looked over before anything is loaded, so that a truncated file is
found in milliseconds and by name. Knows no family and no placement.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines import hub, sources
from pipelines.components import (
    Source,
    check_file,
    check_folder,
    component_class,
    naming,
    read_component,
)
from pipelines.headers import first_line, read_header
from pipelines.sources import Assembly, listed, read_json

INDEX = "model_index.json"
INDEX_OF_SHARDS = ".safetensors.index.json"
_CONFIG_OF = (
    ("Scheduler", "scheduler_config.json"),
    ("Tokenizer", None),
    ("TokenizerFast", None),
    ("Processor", None),
    ("FeatureExtractor", None),
    ("", "config.json"),
)
"""Ending of a component's class name -> the file that its folder must have; first match counts."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose index has been read. `components` maps a name to its class's name.

    `elsewhere` are components whose weights aren't in the folder, such as those of a single file;
    the folder then has the configs. Those of `left_out` are None in the pipeline.
    """

    folder: Path
    class_name: str
    index: Mapping[str, Any]
    components: Mapping[str, str]
    elsewhere: Mapping[str, Source] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def source(self, name: str) -> Source:
        """Where a component's weights and config are."""
        return self.elsewhere.get(name, Source(self.folder / name, self.folder / name))

    def read(self, model: Model, name: str, device: str = "cpu", quantize: Any = None) -> Any:
        """One component in the model's dtype, on `device`; see `read_component`.

        Raises ModelUnavailable.
        """
        library, class_name = self.index[name]
        with naming(model.name):
            return read_component(
                name,
                component_class(library, class_name),
                self.source(name),
                getattr(torch, model.dtype),
                device=device,
                variant=None if name in self.elsewhere else model.variant,
                quantize=quantize,
            )

    def load(self, model: Model, quantize: Any = None, **arguments: Any) -> Any:
        """The diffusers pipeline in the model's dtype, on the CPU.

        `quantize` maps a component to its quantizer's config. `arguments` go to `from_pretrained`:
        components to take. Raises ModelUnavailable.
        """
        look_over(model, self)
        diffusers = importlib.import_module("diffusers")
        _hush(diffusers)
        if not hasattr(diffusers, self.class_name):
            raise ModelUnavailable(
                f"model {model.name!r}: diffusers {diffusers.__version__} has no pipeline "
                f"{self.class_name!r}, which {self.folder / INDEX} names"
            )
        wanted = dict(quantize or {})
        for name in self.elsewhere:
            if name not in arguments:
                arguments[name] = self.read(model, name, quantize=wanted.pop(name, None))
        arguments |= dict.fromkeys(self.left_out)
        if wanted:
            arguments["quantization_config"] = diffusers.PipelineQuantizationConfig(
                quant_mapping=wanted
            )
        try:
            pipe = getattr(diffusers, self.class_name).from_pretrained(
                self.folder,
                dtype=getattr(torch, model.dtype),
                variant=model.variant,
                use_safetensors=True,
                **arguments,
            )
        except Exception as error:  # any library's; the checkpoint is at fault or too new
            raise ModelUnavailable(
                f"model {model.name!r}: {self.folder} cannot be loaded: {first_line(error)}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe


def find_checkpoint(model: Model, *, weights: bool = True) -> Checkpoint:
    """The model's folder or file, downloaded or taken from the hub's cache if it has a hub id.

    Without `weights`, only the configs of hub ids are fetched. Raises ModelUnavailable.
    """
    with naming(model.name):
        if sources.is_file(model.path):
            assembly = sources.of_file(model, weights=weights)
        else:
            folder = Path(model.path) if model.local else _from_hub(model, weights)
            if not folder.is_dir():
                raise ModelUnavailable(f"there is no folder or file {folder}")
            assembly = Assembly(folder, sources.read_index(folder), {}, ())
            assembly = sources.with_components(model, assembly, weights)
    return Checkpoint(
        assembly.folder,
        assembly.index["_class_name"],
        assembly.index,
        {name: class_name for name, _, class_name in listed(assembly.index)},
        assembly.sources,
        tuple(name for name, library, _ in listed(assembly.index, null=True) if library is None),
    )


def has_weights(checkpoint: Checkpoint) -> bool:
    """Whether any component has its weights here; a plan needs none."""
    places = (checkpoint.source(name) for name in checkpoint.components)
    return any(each.is_file or any(each.weights.glob("*.safetensors")) for each in places)


def look_over(model: Model, checkpoint: Checkpoint) -> None:
    """Check that every component has its folder, its config and whole weight files.

    Reads headers only. Raises ModelUnavailable for the first thing missing or damaged.
    """
    with naming(model.name):
        for name, class_name in checkpoint.components.items():
            source = checkpoint.source(name)
            if source.is_file:
                kind = component_class(*checkpoint.index[name])
                check_file(name, kind, source, read_header(source.weights))
            else:
                _look_over_folder(model, source.weights, class_name)


def _look_over_folder(model: Model, folder: Path, class_name: str) -> None:
    if not folder.is_dir():
        raise ModelUnavailable(
            f"the folder {folder} is missing, which {INDEX} lists as {class_name}"
        )
    shards = f".safetensors.index.{model.variant}.json" if model.variant else INDEX_OF_SHARDS
    for path in sorted(folder.glob("*.json")):
        document = read_json(path)
        if path.name.endswith(shards):
            _check_shards(path, document)
    config = next(file for ending, file in _CONFIG_OF if class_name.endswith(ending))
    if config and not (folder / config).is_file():
        raise ModelUnavailable(f"the file {folder / config} is missing")
    if config == "config.json":
        check_folder(folder)


def _check_shards(path: Path, index: Mapping[str, Any]) -> None:
    for shard in sorted(set(index.get("weight_map", {}).values())):
        if not (path.parent / shard).is_file():
            raise ModelUnavailable(
                f"the file {path.parent / shard} is missing, which {path.name} lists"
            )


def _from_hub(model: Model, weights: bool) -> Path:
    from diffusers import DiffusionPipeline

    if not weights:
        return hub.fetch(model.path, hub.CONFIGS, model.revision)
    try:
        folder = DiffusionPipeline.download(
            model.path, revision=model.revision, variant=model.variant
        )
    except Exception as error:  # the hub's client, its HTTP library and diffusers all have theirs
        raise ModelUnavailable(hub.hub_trouble(model.path, error)) from error
    return Path(folder)


def _hush(diffusers: Any) -> None:
    """No progress bars and no advice on standard error: a worker's log is not a terminal."""
    transformers = importlib.import_module("transformers")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
