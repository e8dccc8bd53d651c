"""A checkpoint's files looked over before anything is loaded, and folders that hold no checkpoint.

What a person can mend is found in milliseconds: each fault is a ModelUnavailable with one sentence
that names the file and says what to do. Only components that are torch modules need
a config and weights here; tokenizers, schedulers and guiders are left to the libraries' loaders.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from jobs.errors import ModelUnavailable
from pipelines.loading.components import component_class
from pipelines.loading.headers import first_line
from pipelines.loading.transient import may_pass

INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_LFS_POINTER = "version https://git-lfs"
_NUMBER = r"-\d{5}-of-\d{5}"
_LORA_KEYS = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", "lora.up.", "lora.down.")


Part = tuple[Path, str, str]
"""A component's folder, its library and its class."""


def look_over(components: Mapping[str, Part], variant: str | None) -> None:
    """Check every component's folder: readable JSON, and whole weights where it is a module.

    Weights are those of `variant`. Raises ModelUnavailable for the first fault.
    """
    modules: list[Path] = []
    for place, library, class_name in components.values():
        if not place.is_dir():
            raise _wrong(f"the folder {place} is missing, which {INDEX} lists as {class_name}")
        documents = {path.name: _read(path) for path in sorted(place.glob("*.json"))}
        kind = component_class(library, class_name)
        if not isinstance(kind, type):
            continue  # the library's loader says what it lacks
        if issubclass(kind, nn.Module):
            _need(place / "config.json")
            modules.append(place)
            _check_module(place, documents, variant)
        elif class_name.endswith("Scheduler"):
            _need(place / _SCHEDULER)
    if variant and modules and not any(_of_variant(place, variant) for place in modules):
        known = sorted({each for place in modules for each in _variants(place)})
        advice = f'set variant = "{known[0]}"' if known else "leave variant out"
        raise _wrong(f"{modules[0].parent} holds no weights of variant {variant!r}: {advice}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ModelUnavailable."""
    document = _read_json(path)
    if not isinstance(document, dict):
        raise _wrong(f"{path} holds no JSON object; download it again")
    return document


def _read(path: Path) -> Any:
    """A component's JSON; what tokenizers keep may be a list."""
    is_object = path.name in ("config.json", _SCHEDULER) or ".index." in path.name
    return read_object(path) if is_object else _read_json(path)


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(_LFS_POINTER):
            raise _wrong(f"{path} is only a Git LFS pointer; `git lfs pull` fetches it")
        return json.loads(text)
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _wrong(
            f"{path} cannot be read: {first_line(error)}; download it again", error
        ) from error


def without_index(folder: Path) -> ModelUnavailable:
    """What to say of a folder without a model_index.json."""
    if not folder.exists():
        return _wrong(f"there is no folder {folder}")
    if not folder.is_dir():
        return _wrong(f"{folder} is a file, and path must be a diffusers folder")
    missing = f"{folder / INDEX} is missing"
    try:
        return _wrong(f"{missing}: {_what_else(folder)}")
    except OSError as error:
        sentence = f"{missing}, and the folder cannot be read: {first_line(error)}"
        return _wrong(sentence, error)


def _what_else(folder: Path) -> str:
    """What the folder is, and what to do."""
    if not any(folder.iterdir()):
        return "the folder is empty; download the model into it"
    if (folder / "modular_model_index.json").is_file():
        return "it is a modular pipeline, which isn't served; use the model's plain folder"
    if (folder.parent / INDEX).is_file():
        return f"it is one component of a model; set path to {folder.parent}"
    below = sorted(
        path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{INDEX}")
    )
    if below:
        return f"the model is in a folder below; set path to {' or '.join(map(str, below[:3]))}"
    if kind := _add_on(folder):
        return kind
    parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if parts:
        return f"it holds only {', '.join(parts)}; download the whole model, with its {INDEX}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    if files:
        return f"a single file is served by its own path; set path to {files[0]}"
    if pickles := _pickles(folder):
        return f"{pickles[0].name} is pickled, and pickles aren't loaded; use a safetensors version"
    return "it isn't a diffusers folder"


def _add_on(folder: Path) -> str | None:
    """A sentence for what isn't a model by itself: an adapter, a part, a language model."""
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() or any(map(_is_lora, weights)):
        return "it holds LoRA weights, which change a model; set path to a model"
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    name = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    if "ControlNet" in name:
        return f"it is a ControlNet ({name}), which guides a model; set path to a model"
    if "_class_name" in config:
        return f"it is only a {name}, one component; set path to the whole model's folder"
    kind = name or config.get("model_type")
    return f"it is {kind} of transformers, which makes no images; set path to a diffusers folder"


def _is_lora(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return any(part in key for key in file.keys() for part in _LORA_KEYS)  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _check_module(folder: Path, documents: Mapping[str, Any], variant: str | None) -> None:
    """Check a module's weights: that there are any to use, all shards, each file whole."""
    indexes = {name: text for name, text in documents.items() if ".safetensors.index" in name}
    for name, document in indexes.items():
        if name.endswith(f".index.{variant}.json" if variant else ".safetensors.index.json"):
            _check_shards(folder / name, document)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = _pickles(folder)
        if pickles:
            raise _wrong(
                f"{pickles[0]} is pickled, and pickles can run code when they are loaded; use a "
                "safetensors version of the model",
            )
        raise _wrong(f"{folder} holds no weights (*.safetensors); download the whole model")
    if not variant and not any(_variant_of(path) is None for path in files):
        known = sorted(_variants(folder))
        raise _wrong(
            f"{folder} holds only weights of variant {' and '.join(map(repr, known))}: "
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
            f"{path} holds weights as {dtype} and its config.json has no quantization_config that "
            "says how to read them; use a version in float16, bfloat16 or float32",
        )


def _whole_numbers(file: Any) -> str | None:
    """The dtype of matrices that are saved as whole numbers, which only a quantizer can read."""
    for key in file.keys():  # noqa: SIM118 - it is no mapping
        part = file.get_slice(key)
        if part.get_dtype() in ("I8", "U8") and len(part.get_shape()) > 1:
            return str(part.get_dtype())
    return None


def _trouble(path: Path, error: Exception) -> str:
    """Why a weight file cannot be opened, and what to do."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.resolve()}, which is missing; download the model again"
    if not path.is_file():
        return "is not a file"
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER.encode():
            return "is only a Git LFS pointer to the weights; `git lfs pull` fetches them"
    return f"is cut short or damaged: {first_line(error)}; download it again"


def _check_shards(path: Path, index: Mapping[str, Any]) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise _wrong(f"{path} has no weight_map; download it again")
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise _wrong(
                f"the file {path.parent / shard} is missing, which {path.name} lists; download it",
            )


def _variant_of(path: Path) -> str | None:
    """The variant in the name of a weight file: "fp16" in model.fp16-00001-of-00002.safetensors."""
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
