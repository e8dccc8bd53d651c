"""Find the optional package behind an error of diffusers or transformers, and how to install it.

Both libraries import optional packages only if they're installed, and fail later on an undefined
name if not. This module doesn't depend on any model.
"""

import traceback

EXTRAS = {"torchvision": "imagemill[vision]", "torchao": "imagemill[quantization]"}
"""Packages to install through an extra of imagemill, which picks the build that fits its torch."""


def missing_packages(error: BaseException) -> str | None:
    """A sentence about what to install, if missing packages explain the error.

    The optional packages of the module that failed are those it checks for with an
    `is_..._available` function.
    """
    if isinstance(error, ImportError):
        names = [name for name in EXTRAS if name in str(error).lower()]
        names = names or ([error.name] if error.name else [])
    elif isinstance(error, NameError):
        names = _absent(error)
    else:
        return None
    if not names:
        return None
    ways = ", ".join(f"`pip install '{EXTRAS.get(name, name)}'`" for name in names)
    return f"this model needs {', '.join(names)}: {ways}"


def _absent(error: BaseException) -> list[str]:
    """Packages that the failing module checked for and didn't find."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    checks = {
        name.removeprefix("is_").removesuffix("_available"): check
        for name, check in frame.f_globals.items()
        if name.startswith("is_") and name.endswith("_available") and callable(check)
    }
    return sorted(name for name, check in checks.items() if name != "torch_xla" and not check())
