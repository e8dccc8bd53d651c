"""Which optional package an error of diffusers or transformers is about, and how to get it.

Both import optional packages only where they are installed, and then fail later over a name that
isn't defined. Knows no model.
"""

import traceback

EXTRAS = {"torchvision": "imagemill[vision]", "torchao": "imagemill[quantization]"}
"""Packages that an extra of this one brings, in the build that fits its torch."""


def missing_packages(error: BaseException) -> str | None:
    """What to install, as a sentence, if packages that aren't there explain the error.

    The module that failed says which packages it can do without, by its `is_..._available`.
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
    """Packages that the module where the error arose looked for in vain."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    checks = {
        name.removeprefix("is_").removesuffix("_available"): check
        for name, check in frame.f_globals.items()
        if name.startswith("is_") and name.endswith("_available") and callable(check)
    }
    return sorted(name for name, check in checks.items() if name != "torch_xla" and not check())
