"""Fixtures for tests that need a CUDA device. Without one, they're all skipped."""

from collections.abc import Iterator

import pytest
import torch

from tests.pipelines.conftest import tiny_folder, tiny_pipe

__all__ = ["tiny_folder", "tiny_pipe"]

DEVICE = "cuda:0"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip without a CUDA device; called for the tests of this folder only."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Run convolutions in full float32; by default cuDNN rounds to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
