"""Find, check and load a checkpoint: a diffusers folder or a single file.

Any problem raises ModelUnavailable with one sentence that names the catalog entry and the file.
Files are checked before anything is loaded, so a truncated file is reported by name within
milliseconds. This module doesn't depend on families or placements.
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
from jobs.errors import ModelUnavailable, first_line
from pipelines.loading import examination, hub, sources
from pipelines.loading.components import Source, check_file, component_class, naming, read_component
from pipelines.loading.examination import INDEX
from pipelines.loading.headers import read_header
from pipelines.loading.packages import missing_packages
from pipelines.loading.processors import tokenizers_of
from pipelines.loading.sources import Assembly, listed
from pipelines.loading.transient import may_pass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose index has been read. `components` maps each name to its class name.

    `elsewhere` has the components whose weights aren't in the folder, such as those of a single
    file; the folder then has the configs. Components in `left_out` are None in the pipeline.
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
        """Load one component in the model's dtype onto `device`; see `read_component`.

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
        """The diffusers class named in the index. Raises ModelUnavailable."""
        diffusers = importlib.import_module("diffusers")
        _hush()
        kind = getattr(diffusers, self.class_name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ModelUnavailable(
                f"model {model.name!r}: diffusers {diffusers.__version__} has no pipeline "
                f"{self.class_name!r} (named in {self.folder / INDEX}){self._versions()}"
            )
        if "prompt" not in inspect.signature(kind.__call__).parameters:
            raise ModelUnavailable(
                f"model {model.name!r}: {self.class_name} (named in {self.folder / INDEX}) takes "
                "no prompt; set path to a text-to-image model"
            )
        return kind

    def load(self, model: Model, quantize: Any = None, **arguments: Any) -> Any:
        """Load the diffusers pipeline in the model's dtype on the CPU.

        `quantize` maps a component to its quantizer's config. `arguments` are components that are
        already loaded; they're passed to `from_pretrained`. Raises ModelUnavailable.
        """
        look_over(model, self)
        kind = self.pipeline_class(model)
        quantizer_configs = dict(quantize or {})
        for name in self.elsewhere:
            if name not in arguments:
                config = quantizer_configs.pop(name, None)
                arguments[name] = self.read(model, name, quantize=config)
        if quantizer_configs:
            diffusers = importlib.import_module("diffusers")
            arguments["quantization_config"] = diffusers.PipelineQuantizationConfig(
                quant_mapping=quantizer_configs
            )
        parameters = inspect.signature(kind.__init__).parameters
        left_out: dict[str, Any] = {name: None for name in self.left_out if name in parameters}
        try:
            tokenizers = tokenizers_of(self.folder, self.components, loaded=arguments)
            left_out |= dict.fromkeys(tokenizers)
            pipe = kind.from_pretrained(
                self.folder,
                dtype=getattr(torch, model.dtype),
                variant=model.variant,
                use_safetensors=True,
                **{**left_out, **arguments},
            )
            pipe.register_modules(**tokenizers)
        except Exception as error:  # from any library: the checkpoint is broken or too new
            raise ModelUnavailable(
                f"model {model.name!r}: can't load {self.folder}: "
                f"{missing_packages(error) or first_line(error)}{self._versions()}",
                may_pass=may_pass(error),
            ) from error
        self._check_filled(model, {n: c for n, c in pipe.components.items() if n not in arguments})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _check_filled(self, model: Model, components: Mapping[str, Any]) -> None:
        """Refuse modules with tensors that diffusers left empty because the files lack them."""
        for name, module in components.items():
            tensors = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
            for key, tensor in tensors:
                if tensor.is_meta:
                    raise ModelUnavailable(
                        f"model {model.name!r}: the weights in {self.folder / name} are missing "
                        f"{key}; download the whole model"
                    )

    def _versions(self) -> str:
        """The version of diffusers that saved the checkpoint, if it's newer than ours."""
        from diffusers import __version__ as installed
        from packaging.version import InvalidVersion, Version

        written = self.index.get("_diffusers_version")
        try:
            is_newer = written is not None and Version(str(written)) > Version(installed)
        except InvalidVersion:
            return ""
        return (
            f"; diffusers {written} saved the folder, but {installed} is installed: upgrade "
            "diffusers"
            if is_newer
            else ""
        )


def find_checkpoint(model: Model, *, weights: bool = True) -> Checkpoint:
    """Find the model's folder or file; a hub id is downloaded unless it's in the hub's cache.

    Without `weights`, only configs are fetched for hub ids. Raises ModelUnavailable.
    """
    with naming(model.name):
        if sources.is_file(model.path):
            assembly = sources.of_file(model, weights=weights)
        else:
            folder = Path(model.path) if model.local else _from_hub(model, weights)
            if not os.path.isfile(folder / INDEX):  # also False if it can't be read
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
    """Whether any component's weights are on disk; a plan doesn't need them."""
    sources = (checkpoint.source(name) for name in checkpoint.components)
    return any(source.is_file or any(source.weights.glob("*.safetensors")) for source in sources)


def look_over(model: Model, checkpoint: Checkpoint) -> None:
    """Check that every component exists and is complete, reading headers only.

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
    except Exception as error:  # the hub client, its HTTP library and diffusers share no base class
        raise ModelUnavailable(hub.hub_trouble(model.path, error), may_pass=True) from error
    return Path(folder)


def _hush() -> None:
    """Disable progress bars and advice on stderr, because a worker's log isn't a terminal."""
    for name in ("diffusers", "transformers"):
        library = importlib.import_module(name)
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
