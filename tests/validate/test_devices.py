"""Devices by name: what PyTorch has, and no silent loss of precision there."""

from __future__ import annotations

import pytest
import torch

from ddexport.runtime.errors import DDError
from ddexport.validate.devices import torch_device


def test_the_cpu_is_there_and_products_keep_float32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert torch_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_that_is_not_there(monkeypatch):
    for seen in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        with pytest.raises(DDError, match="cuda:1"):
            torch_device("cuda:1")
    assert torch_device("cuda") == torch.device("cuda")
    for name in ("gpu", "meta", ""):
        with pytest.raises(DDError):
            torch_device(name)
