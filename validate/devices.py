"""Where PyTorch computes."""

from __future__ import annotations

from typing import Any

from runtime.errors import DDError


def torch_device(name: str) -> Any:
    """The torch device of that name, such as cpu or cuda:1. Raises DDError where there is none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DDError(f"--device {name} is no device of PyTorch", "Name one such as cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DDError(f"--device {name}: this PyTorch sees no CUDA device", "Leave out --device for the CPU.")
    return device
