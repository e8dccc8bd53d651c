"""A diffusers checkpoint on disk: found, looked over, loaded.

Everything that can be wrong with one ends as ModelUnavailable: one sentence that names the catalog
entry and the file. Knows no family and no placement.
"""

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines import examination
from pipelines.examination import INDEX, first_line, read_object
from pipelines.processors import tokenizers_of
from pipelines.transient import may_pass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose index has been read. `components` maps a name to its class's name."""

    folder: Path
    class_name: str
    index: Mapping[str, Any]
    components: Mapping[str, str]

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

    def load(self, model: Model, **arguments: Any) -> Any:
        """The diffusers pipeline in the model's dtype, on the CPU.

        `arguments` go to `from_pretrained`: components to take, or how to quantize.

        Raises ModelUnavailable.
        """
        look_over(model, self)
        kind = self.pipeline_class(model)
        try:
            tokenizers = tokenizers_of(self.folder, self.components, given=arguments)
            left_out = self._left_out(kind) | dict.fromkeys(tokenizers)
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
                f"{first_line(error)}{self._versions()}",
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

    def _left_out(self, kind: Any) -> dict[str, None]:
        """The components that the index says the model goes without, as SD3 does without T5."""
        takes = inspect.signature(kind.__init__).parameters
        return {
            name: None
            for name, value in self.index.items()
            if name in takes and value == [None, None]
        }

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


def find_checkpoint(model: Model) -> Checkpoint:
    """The model's folder, downloaded or taken from the hub's cache if the entry has a hub id.

    Raises ModelUnavailable.
    """
    folder = Path(model.path) if model.local else _from_hub(model)
    if not os.path.isfile(folder / INDEX):  # False also where the folder can't be read
        raise examination.without_index(model, folder)
    index = read_object(model, folder / INDEX)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ModelUnavailable(
            f"model {model.name!r}: {folder / INDEX} names no diffusers pipeline in _class_name"
        )
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    }
    return Checkpoint(folder, class_name, index, components)


def look_over(model: Model, checkpoint: Checkpoint) -> None:
    """Check that every component is there and whole, reading headers only.

    Raises ModelUnavailable.
    """
    listed = {name: tuple(checkpoint.index[name]) for name in checkpoint.components}
    examination.look_over(model, checkpoint.folder, listed)


def _from_hub(model: Model) -> Path:
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(
            model.path, revision=model.revision, variant=model.variant, use_safetensors=True
        )
    except Exception as error:  # the hub's client, its HTTP library and diffusers all have theirs
        sentence = f"model {model.name!r}: {_hub_trouble(model, error)}"
        raise ModelUnavailable(sentence, may_pass=True) from error
    return Path(folder)


def _hub_trouble(model: Model, error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    links, link = [error], error.__cause__
    while link is not None:
        links.append(link)
        link = link.__cause__
    answer = next((each for each in links if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return f"the hub does not hand out {model.path!r}: {first_line(answer)}"
    if "safetensors" in str(error):
        return f"{model.path!r} has no safetensors weights, and pickles aren't loaded"
    return (
        f"{model.path!r} is not in the local cache and the hub cannot be reached: "
        f"{first_line(links[-1])}"
    )


def _hush() -> None:
    """No progress bars and no advice on standard error: a worker's log is not a terminal."""
    for name in ("diffusers", "transformers"):
        library = importlib.import_module(name)
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
