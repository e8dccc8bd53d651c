"""A diffusers checkpoint on disk: found, looked over, loaded.

Everything that can be wrong with one ends as ModelUnavailable: one sentence that names the catalog
entry and the file. Files are looked over before anything is loaded, so that a truncated file is
found in milliseconds and by name. Knows no family and no placement.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines.packages import missing_packages

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
    """A folder whose index has been read. `components` maps a name to its class's name."""

    folder: Path
    class_name: str
    index: Mapping[str, Any]
    components: Mapping[str, str]

    def load(self, model: Model, **arguments: Any) -> Any:
        """The diffusers pipeline in the model's dtype, on the CPU.

        `arguments` go to `from_pretrained`: components to take, or how to quantize.

        Raises ModelUnavailable.
        """
        look_over(model, self)
        diffusers = importlib.import_module("diffusers")
        _hush(diffusers)
        if not hasattr(diffusers, self.class_name):
            raise ModelUnavailable(
                f"model {model.name!r}: diffusers {diffusers.__version__} has no pipeline "
                f"{self.class_name!r}, which {self.folder / INDEX} names"
            )
        try:
            pipe = getattr(diffusers, self.class_name).from_pretrained(
                self.folder,
                dtype=getattr(torch, model.dtype),
                variant=model.variant,
                **arguments,
            )
        except Exception as error:  # any library's; the checkpoint is at fault or too new
            raise ModelUnavailable(
                f"model {model.name!r}: {self.folder} cannot be loaded: "
                f"{missing_packages(error) or _first_line(error)}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe


def find_checkpoint(model: Model) -> Checkpoint:
    """The model's folder, downloaded or taken from the hub's cache if the entry has a hub id.

    Raises ModelUnavailable.
    """
    folder = Path(model.path) if model.local else _from_hub(model)
    if not folder.is_dir():
        raise ModelUnavailable(f"model {model.name!r}: there is no folder {folder}")
    index = _read_json(model, folder / INDEX)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ModelUnavailable(
            f"model {model.name!r}: {folder / INDEX} names no diffusers pipeline in _class_name"
        )
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    return Checkpoint(folder, class_name, index, components)


def look_over(model: Model, checkpoint: Checkpoint) -> None:
    """Check that every component has its folder, its config and whole weight files.

    Reads headers only. Raises ModelUnavailable for the first thing missing or damaged.
    """
    shards = f".safetensors.index.{model.variant}.json" if model.variant else INDEX_OF_SHARDS
    for name, class_name in checkpoint.components.items():
        folder = checkpoint.folder / name
        if not folder.is_dir():
            raise ModelUnavailable(
                f"model {model.name!r}: the folder {folder} is missing, "
                f"which {INDEX} lists as {class_name}"
            )
        for path in sorted(folder.glob("*.json")):
            document = _read_json(model, path)
            if path.name.endswith(shards):
                _check_shards(model, path, document)
        config = next(file for ending, file in _CONFIG_OF if class_name.endswith(ending))
        if config and not (folder / config).is_file():
            raise ModelUnavailable(f"model {model.name!r}: the file {folder / config} is missing")
        if config == "config.json":
            _check_weights(model, folder)


def _check_weights(model: Model, folder: Path) -> None:
    if not any(_weights(folder)):
        raise ModelUnavailable(f"model {model.name!r}: {folder} holds no weights (*.safetensors)")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            trouble = f"is cut short or damaged: {_first_line(error)}"
            if _is_lfs_pointer(path):
                trouble = "is only a Git LFS pointer to the weights; `git lfs pull` fetches them"
            raise ModelUnavailable(f"model {model.name!r}: {path} {trouble}") from error


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(32).startswith(b"version https://git-lfs")


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "*.bin"):
        yield from folder.glob(pattern)


def _check_shards(model: Model, path: Path, index: Mapping[str, Any]) -> None:
    for shard in sorted(set(index.get("weight_map", {}).values())):
        if not (path.parent / shard).is_file():
            raise ModelUnavailable(
                f"model {model.name!r}: the file {path.parent / shard} is missing, "
                f"which {path.name} lists"
            )


def _read_json(model: Model, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelUnavailable(f"model {model.name!r}: the file {path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelUnavailable(f"model {model.name!r}: {path} cannot be read: {error}") from error


def _from_hub(model: Model) -> Path:
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(
            model.path, revision=model.revision, variant=model.variant
        )
    except Exception as error:  # the hub's client, its HTTP library and diffusers all have theirs
        raise ModelUnavailable(f"model {model.name!r}: {_hub_trouble(model, error)}") from error
    return Path(folder)


def _hub_trouble(model: Model, error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    links, link = [error], error.__cause__
    while link is not None:
        links.append(link)
        link = link.__cause__
    answer = next((each for each in links if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return f"the hub does not hand out {model.path!r}: {_first_line(answer)}"
    return (
        f"{model.path!r} is not in the local cache and the hub cannot be reached: "
        f"{_first_line(links[-1])}"
    )


def _hush(diffusers: Any) -> None:
    """No progress bars and no advice on standard error: a worker's log is not a terminal."""
    transformers = importlib.import_module("transformers")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
