"""int8 as PyTorch does it: torchao's quantization of an exported program, compiled by Inductor.

Source: "PyTorch 2 Export Quantization with X86 Backend through Inductor", pytorch.org/ao.
"""

from __future__ import annotations

from typing import Any


class Int8:
    """A module whose linear layers and convolutions are int8: weights by channel, activations by the ranges
    of the first inputs, which are those that are timed. Compiled with frozen weights for each batch size."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._compiled: dict[int, Any] = {}

    def __call__(self, *given: Any) -> Any:
        size = len(given[0])
        if size not in self._compiled:
            self._compiled[size] = _compile(self._module, given)
        return self._compiled[size](*given)


def _export(module: Any, given: tuple[Any, ...]) -> Any:
    """The program of a module. torchao fails at a convolution that runs several times, as those of VAR's
    quantizer do: they lose what it finds them by, and stay float32, as in the bundle."""
    import torch
    from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

    program = torch.export.export(module, given).module()
    kinds = [torch.nn.Conv2d, torch.nn.functional.conv2d]
    for partitions in get_source_partitions(program.graph, kinds).values():
        for partition in (one for one in partitions if len(one.output_nodes) > 1):
            for node in partition.nodes:
                for name in ("source_fn_stack", "torch_fn", "nn_module_stack"):
                    node.meta.pop(name, None)
    return program


def _compile(module: Any, given: tuple[Any, ...]) -> Any:
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.inference_mode(False), torch.no_grad():
        given = tuple(tensor.clone() for tensor in given)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(_export(module, given), quantizer)
        prepared(*given)
        converted = convert_pt2e(prepared)
    torch._inductor.config.freezing = True
    return torch.compile(converted, dynamic=False)
