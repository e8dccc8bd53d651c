"""A1111's read-only lists, which its clients read when they connect, and the calls we refuse.

Most lists are empty: a model brings its own sampler and VAE, and there are no upscalers, LoRAs or
scripts. They aren't in the OpenAPI document, because they exist for clients that know A1111's API.
"""

import os
from typing import Any, NoReturn

from fastapi import APIRouter

from jobs.errors import FieldProblem, InvalidRequest
from service.context import Context

router = APIRouter(include_in_schema=False)

_PREFIX = "/sdapi/v1"

_LISTS: dict[str, list[dict[str, Any]] | dict[str, Any]] = {
    "samplers": [{"name": "Default", "aliases": ["default"], "options": {}}],
    "schedulers": [
        {
            "name": "automatic",
            "label": "Automatic",
            "aliases": None,
            "default_rho": -1,
            "need_inner_model": False,
        }
    ],
    "upscalers": [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}
    ],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
}
"""`Default` and `Automatic` stand for the model's own sampler and schedule."""

_REFRESHED = ("checkpoints", "vae", "loras", "embeddings")

_REFUSED = {
    "img2img": "init_images",
    "extra-single-image": "image",
    "extra-batch-images": "imageList",
    "interrogate": "image",
}
"""Calls that take a picture, and the field with the picture."""


def _add_list(name: str, content: Any) -> None:
    async def read() -> Any:
        return content

    router.add_api_route(f"{_PREFIX}/{name}", read, methods=["GET"], name=f"sdapi {name}")


def _add_refresh(name: str) -> None:
    async def refresh() -> dict[str, Any]:
        """Nothing to do, because the catalog is read at the start."""
        return {}

    router.add_api_route(f"{_PREFIX}/refresh-{name}", refresh, methods=["POST"])


def _add_refusal(name: str, field: str) -> None:
    async def refuse() -> NoReturn:
        detail = f"{name} isn't supported: images are made from text only; use txt2img"
        raise InvalidRequest(detail, (FieldProblem(f"/{field}", detail),))

    router.add_api_route(f"{_PREFIX}/{name}", refuse, methods=["POST"], response_model=None)


for _name, _content in _LISTS.items():
    _add_list(_name, _content)
for _name in _REFRESHED:
    _add_refresh(_name)
for _name, _field in _REFUSED.items():
    _add_refusal(_name, _field)


@router.get(f"{_PREFIX}/cmd-flags")
async def flags(context: Context) -> dict[str, Any]:
    """The command-line flags that clients look at."""
    return {"api": True, "listen": not context.settings.loopback, "port": context.settings.port}


@router.get(f"{_PREFIX}/memory")
async def memory() -> dict[str, Any]:
    """The service's memory in bytes; that of the workers' devices is in `/v1/workers`."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    ram = {"free": free, "used": total - free, "total": total}
    return {"ram": ram, "cuda": {"error": "see /v1/workers"}}


@router.get("/config")
async def config() -> dict[str, Any]:
    """Gradio's description of a page, which plugins search for upscalers and scripts."""
    return {"mode": "blocks", "components": [], "dependencies": []}
