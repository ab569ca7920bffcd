"""Where PyTorch computes: a device by its name, checked before the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddexport.runtime.errors import DDError

if TYPE_CHECKING:
    import torch


def torch_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:1`, where float32 stays float32. Raises DDError if it is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        hint = "give cpu, cuda, or cuda:1 and so on"
        raise DDError(f"--device {name}: not a device", hint)
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        devices = {0: "no CUDA device", 1: "1 CUDA device"}.get(seen, f"{seen} CUDA devices")
        raise DDError(
            f"--device {name}: this PyTorch sees {devices}",
            "install a PyTorch with CUDA that fits the driver, or use --device cpu",
        )
    # TF32 rounds the factors of products to 10 bits, as fp16 does: that is no float32 reference. PyTorch
    # allows it in convolutions unless it is told not to.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device
