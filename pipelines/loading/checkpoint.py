"""A checkpoint on disk, a diffusers folder or a single file: found, looked over, loaded.

Everything that can be wrong with one ends as ModelUnavailable: one sentence that names the catalog
entry and the file. Files are looked over before anything is loaded, so that a truncated file is
found in milliseconds and by name. Knows no family and no placement.
"""

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines.loading import examination, hub, sources
from pipelines.loading.components import Source, check_file, component_class, naming, read_component
from pipelines.loading.examination import INDEX
from pipelines.loading.headers import first_line, read_header
from pipelines.loading.packages import missing_packages
from pipelines.loading.processors import tokenizers_of
from pipelines.loading.sources import Assembly, listed
from pipelines.loading.transient import may_pass


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

    def pipeline_class(self, model: Model) -> Any:
        """The diffusers class that the index names. Raises ModelUnavailable."""
        diffusers = importlib.import_module("diffusers")
        _hush()
        kind = getattr(diffusers, self.class_name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ModelUnavailable(
                f"model {model.name!r}: diffusers {diffusers.__version__} has no pipeline "
                f"{self.class_name!r}, which {self.folder / INDEX} names{self._versions()}"
            )
        if "prompt" not in inspect.signature(kind.__call__).parameters:
            raise ModelUnavailable(
                f"model {model.name!r}: {self.class_name}, which {self.folder / INDEX} names, "
                "takes no prompt; set path to a text-to-image model"
            )
        return kind

    def load(self, model: Model, quantize: Any = None, **arguments: Any) -> Any:
        """The diffusers pipeline in the model's dtype, on the CPU.

        `quantize` maps a component to its quantizer's config. `arguments` go to `from_pretrained`:
        components to take. Raises ModelUnavailable.
        """
        look_over(model, self)
        kind = self.pipeline_class(model)
        wanted = dict(quantize or {})
        for name in self.elsewhere:
            if name not in arguments:
                arguments[name] = self.read(model, name, quantize=wanted.pop(name, None))
        if wanted:
            diffusers = importlib.import_module("diffusers")
            arguments["quantization_config"] = diffusers.PipelineQuantizationConfig(
                quant_mapping=wanted
            )
        takes = inspect.signature(kind.__init__).parameters
        left_out: dict[str, Any] = {name: None for name in self.left_out if name in takes}
        try:
            tokenizers = tokenizers_of(self.folder, self.components, given=arguments)
            left_out |= dict.fromkeys(tokenizers)
            pipe = kind.from_pretrained(
                self.folder,
                dtype=getattr(torch, model.dtype),
                variant=model.variant,
                use_safetensors=True,
                **{**left_out, **arguments},
            )
            pipe.register_modules(**tokenizers)
        except Exception as error:  # any library's; the checkpoint is at fault or too new
            raise ModelUnavailable(
                f"model {model.name!r}: {self.folder} cannot be loaded: "
                f"{missing_packages(error) or first_line(error)}{self._versions()}",
                may_pass=may_pass(error),
            ) from error
        self._check_filled(model, {n: c for n, c in pipe.components.items() if n not in arguments})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _check_filled(self, model: Model, components: Mapping[str, Any]) -> None:
        """Refuse modules that diffusers leaves without data, because their files lack a tensor."""
        for name, module in components.items():
            tensors = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
            for key, tensor in tensors:
                if tensor.is_meta:
                    raise ModelUnavailable(
                        f"model {model.name!r}: the weights in {self.folder / name} lack {key}; "
                        "download the whole model"
                    )

    def _versions(self) -> str:
        """Which diffusers wrote the checkpoint, where that may be why it can't be loaded."""
        from diffusers import __version__ as installed
        from packaging.version import InvalidVersion, Version

        written = self.index.get("_diffusers_version")
        try:
            is_newer = written is not None and Version(str(written)) > Version(installed)
        except InvalidVersion:
            return ""
        return (
            f"; diffusers {written} wrote the folder, and {installed} is installed: install a "
            "newer diffusers"
            if is_newer
            else ""
        )


def find_checkpoint(model: Model, *, weights: bool = True) -> Checkpoint:
    """The model's folder or file, downloaded or taken from the hub's cache if it has a hub id.

    Without `weights`, only the configs of hub ids are fetched. Raises ModelUnavailable.
    """
    with naming(model.name):
        if sources.is_file(model.path):
            assembly = sources.of_file(model, weights=weights)
        else:
            folder = Path(model.path) if model.local else _from_hub(model, weights)
            if not os.path.isfile(folder / INDEX):  # False also where it can't be read
                raise examination.without_index(folder)
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
    """Check that every component is there and whole, reading headers only.

    Raises ModelUnavailable.
    """
    parts: dict[str, examination.Part] = {}
    with naming(model.name):
        for name in checkpoint.components:
            library, class_name = checkpoint.index[name]
            source = checkpoint.source(name)
            if source.is_file:
                kind = component_class(library, class_name)
                check_file(name, kind, source, read_header(source.weights))
            elif name in checkpoint.elsewhere:
                examination.look_over({name: (source.weights, library, class_name)}, None)
            else:
                parts[name] = (source.weights, library, class_name)
        examination.look_over(parts, model.variant)


def _from_hub(model: Model, weights: bool) -> Path:
    from diffusers import DiffusionPipeline

    if not weights:
        return hub.fetch(model.path, hub.CONFIGS, model.revision)
    try:
        folder = DiffusionPipeline.download(
            model.path, revision=model.revision, variant=model.variant, use_safetensors=True
        )
    except Exception as error:  # the hub's client, its HTTP library and diffusers all have theirs
        raise ModelUnavailable(hub.hub_trouble(model.path, error), may_pass=True) from error
    return Path(folder)


def _hush() -> None:
    """No progress bars and no advice on standard error: a worker's log is not a terminal."""
    for name in ("diffusers", "transformers"):
        library = importlib.import_module(name)
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
