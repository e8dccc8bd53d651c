"""Fixtures of the tests that need a CUDA device; all of them are skipped where there is none."""

from collections.abc import Iterator

import pytest
import torch

from tests.pipelines.conftest import tiny_folder, tiny_pipe

__all__ = ["tiny_folder", "tiny_pipe"]

DEVICE = "cuda:0"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip where there is no CUDA device; called for the tests of this folder only."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions in float32 keep all its bits; by default cuDNN's round to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
