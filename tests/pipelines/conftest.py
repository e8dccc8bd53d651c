"""Fixtures: tiny models built once per session, on one thread."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.tiny import load_tiny, save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny pipeline -> its folder, saved at the first call."""

    @cache
    def folder(name: str) -> Path:
        return save_tiny(name, tmp_path_factory.mktemp("tiny") / name)

    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Name of a tiny pipeline -> diffusers' own pipeline, freshly loaded."""

    def pipe(name: str) -> Any:
        loaded = load_tiny(tiny_folder(name))
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return pipe
