"""Check a checkpoint's files before anything is loaded, and explain folders without a checkpoint.

Problems that a user can fix are found within milliseconds. Each raises ModelUnavailable with one
sentence that names the file and says what to do. Only torch modules need a config and weights here;
tokenizers, schedulers and guiders are left to the libraries' loaders.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from jobs.errors import ModelUnavailable, first_line
from pipelines.loading.components import component_class
from pipelines.loading.transient import may_pass

INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_LFS_POINTER = "version https://git-lfs"
_NUMBER = r"-\d{5}-of-\d{5}"
_LORA_KEYS = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", "lora.up.", "lora.down.")


Part = tuple[Path, str, str]
"""A component's folder, library and class name."""


def look_over(components: Mapping[str, Part], variant: str | None) -> None:
    """Check every component's folder: its JSON is readable, and a module's weights are complete.

    Weights of `variant` are expected. Raises ModelUnavailable for the first problem.
    """
    modules: list[Path] = []
    for place, library, class_name in components.values():
        if not place.is_dir():
            raise _wrong(f"the folder {place} is missing ({INDEX} lists it as {class_name})")
        documents = {path.name: _read(path) for path in sorted(place.glob("*.json"))}
        kind = component_class(library, class_name)
        if not isinstance(kind, type):
            continue  # the library's loader reports what's missing
        if issubclass(kind, nn.Module):
            _need(place / "config.json")
            modules.append(place)
            _check_module(place, documents, variant)
        elif class_name.endswith("Scheduler"):
            _need(place / _SCHEDULER)
    if variant and modules and not any(_of_variant(place, variant) for place in modules):
        known = sorted({name for place in modules for name in _variants(place)})
        advice = f'set variant = "{known[0]}"' if known else "leave variant out"
        raise _wrong(f"{modules[0].parent} has no weights of variant {variant!r}; {advice}")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must be an object. Raises ModelUnavailable."""
    document = _read_json(path)
    if not isinstance(document, dict):
        raise _wrong(f"{path} isn't a JSON object; download it again")
    return document


def _read(path: Path) -> Any:
    """A component's JSON; a tokenizer's files may also be lists."""
    is_object = path.name in ("config.json", _SCHEDULER) or ".index." in path.name
    return read_object(path) if is_object else _read_json(path)


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(_LFS_POINTER):
            raise _wrong(f"{path} is only a Git LFS pointer; run `git lfs pull` to fetch it")
        return json.loads(text)
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _wrong(f"can't read {path}: {first_line(error)}; download it again", error) from error


def without_index(folder: Path) -> ModelUnavailable:
    """The error for a folder without a model_index.json."""
    if not folder.exists():
        return _wrong(f"the folder {folder} doesn't exist")
    if not folder.is_dir():
        return _wrong(f"{folder} is a file, but path must be a diffusers folder")
    missing = f"{folder / INDEX} is missing"
    try:
        return _wrong(f"{missing}: {_what_else(folder)}")
    except OSError as error:
        sentence = f"{missing}, and the folder can't be read: {first_line(error)}"
        return _wrong(sentence, error)


def _what_else(folder: Path) -> str:
    """What the folder is instead of a model, and what to do."""
    if not any(folder.iterdir()):
        return "the folder is empty; download the model into it"
    if (folder / "modular_model_index.json").is_file():
        return "modular pipelines aren't supported; use the model's plain folder"
    if (folder.parent / INDEX).is_file():
        return f"this is one component of a model; set path to {folder.parent}"
    below = sorted(
        path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{INDEX}")
    )
    if below:
        return f"the model is in a subfolder; set path to {' or '.join(map(str, below[:3]))}"
    if kind := _add_on(folder):
        return kind
    parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if parts:
        return f"the folder has only {', '.join(parts)}; download the whole model with its {INDEX}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    if files:
        return f"to serve a single file, set path to {files[0]}"
    if pickles := _pickles(folder):
        return (
            f"{pickles[0].name} is a pickle, which can run code when it's loaded; use a "
            "safetensors version"
        )
    return "this isn't a diffusers folder"


def _add_on(folder: Path) -> str | None:
    """What to say about a folder with an adapter, one component or a language model."""
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() or any(map(_is_lora, weights)):
        return "the folder has LoRA weights, not a model; set path to a model"
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    name = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    if "ControlNet" in name:
        return f"this is a ControlNet ({name}), not a model; set path to a model"
    if "_class_name" in config:
        return f"this is only a {name}, one component; set path to the whole model's folder"
    kind = name or config.get("model_type")
    return (
        f"this is a transformers model ({kind}), which doesn't generate images; set path to a "
        "diffusers folder"
    )


def _is_lora(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return any(part in key for key in file.keys() for part in _LORA_KEYS)  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _check_module(folder: Path, documents: Mapping[str, Any], variant: str | None) -> None:
    """Check a module's weights: some are usable, no shard is missing, each file is complete."""
    indexes = {name: text for name, text in documents.items() if ".safetensors.index" in name}
    for name, document in indexes.items():
        if name.endswith(f".index.{variant}.json" if variant else ".safetensors.index.json"):
            _check_shards(folder / name, document)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = _pickles(folder)
        if pickles:
            raise _wrong(
                f"{pickles[0]} is a pickle, which can run code when it's loaded; use a "
                "safetensors version of the model",
            )
        raise _wrong(f"{folder} has no weights (*.safetensors); download the whole model")
    if not variant and not any(_variant_of(path) is None for path in files):
        known = sorted(_variants(folder))
        raise _wrong(
            f"{folder} has only weights of variant {' and '.join(map(repr, known))}; "
            f'set variant = "{known[0]}"',
        )
    is_quantized = "quantization_config" in documents.get("config.json", {})
    for path in files:
        _check_file(path, is_quantized)


def _check_file(path: Path, is_quantized: bool) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            dtype = None if is_quantized else _whole_numbers(file)
    except (SafetensorError, OSError) as error:
        raise _wrong(f"{path} {_trouble(path, error)}", error) from error
    if dtype is not None:
        raise _wrong(
            f"{path} stores weights as {dtype}, but its config.json has no quantization_config "
            "for them; use a version in float16, bfloat16 or float32",
        )


def _whole_numbers(file: Any) -> str | None:
    """The dtype of matrices stored as integers, which only a quantizer can read."""
    for key in file.keys():  # noqa: SIM118 - it isn't a mapping
        part = file.get_slice(key)
        if part.get_dtype() in ("I8", "U8") and len(part.get_shape()) > 1:
            return str(part.get_dtype())
    return None


def _trouble(path: Path, error: Exception) -> str:
    """Why a weight file can't be opened, and what to do."""
    if path.is_symlink() and not path.exists():
        return f"is a broken link to {path.resolve()}; download the model again"
    if not path.is_file():
        return "isn't a file"
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER.encode():
            return "is only a Git LFS pointer to the weights; run `git lfs pull` to fetch them"
    return f"is truncated or corrupt: {first_line(error)}; download it again"


def _check_shards(path: Path, index: Mapping[str, Any]) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise _wrong(f"{path} has no weight_map; download it again")
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise _wrong(
                f"the file {path.parent / shard} is missing ({path.name} lists it); download it",
            )


def _variant_of(path: Path) -> str | None:
    """The variant in a weight file's name: "fp16" in model.fp16-00001-of-00002.safetensors."""
    match = re.fullmatch(rf"[^.]+\.(.+?)(?:{_NUMBER})?\.safetensors", path.name)
    return match[1] if match else None


def _variants(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") if (name := _variant_of(path))}


def _of_variant(folder: Path, variant: str) -> bool:
    return variant in _variants(folder)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for pattern in _PICKLES for path in folder.glob(pattern))


def _need(path: Path) -> None:
    if not path.is_file():
        raise _missing(path)


def _missing(path: Path) -> ModelUnavailable:
    return _wrong(f"the file {path} is missing; download the whole model")


def _wrong(sentence: str, cause: Exception | None = None) -> ModelUnavailable:
    return ModelUnavailable(sentence, may_pass=may_pass(cause))
