"""The CUDA device that a thread's work goes to where nothing else says so.

Each thread has a current device of its own, which begins as the first one: there streams are made,
graphs recorded and compiled kernels launched, wherever the tensors are.
"""

import torch


def use_device(device: torch.device | None) -> None:
    """Make it the calling thread's current device; nothing for the CPU, or for no device."""
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
