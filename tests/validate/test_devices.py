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


@pytest.mark.parametrize("seen", [0, 1])
def test_a_gpu_that_is_not_there(monkeypatch, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    said = "sees no CUDA device" if seen == 0 else "sees 1 CUDA device"
    with pytest.raises(DDError, match=f"--device cuda:1: this PyTorch {said}$") as error:
        torch_device("cuda:1")
    assert "cpu" in error.value.hint
    if seen:
        assert torch_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta", ""])
def test_names_of_no_device(name):
    with pytest.raises(DDError, match="not a device"):
        torch_device(name)
