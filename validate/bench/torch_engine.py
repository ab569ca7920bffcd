"""PyTorch as an engine of the runtime: the reference, `torch-eager`, `torch-compile` and `naive`.

The runtime's pipeline drives all of them, so that every engine does the same work. The one exception is the
auto-regressive model, which draws as the published samplers do: its own cache, guidance by a doubled batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddexport.runtime.backends import Arrays, Backend, Configuration
from ddexport.runtime.bundle import PREFIXES, TEACHER, Graph, Manifest, resolve
from ddexport.runtime.conditions import Conditions, Texts
from ddexport.runtime.labels import read_labels
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.schedule import Span
from ddexport.runtime.teacher import Pick, by_uniforms
from ddexport.runtime.text import Features
from ddexport.validate.bench.plan import COMPILED, NAIVE
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.reference import TorchReference, build_reference

REFERENCE = "reference"  # the float32 modules that outputs are compared with


class TorchEngine(Backend):
    """The modules that a bundle was made from, or what `naive` makes of its student."""

    name = "torch"

    def __init__(
        self, root: Path, manifest: Manifest, configuration: Configuration, threads: int,
        files: Mapping[str, Path | None], weights: str | None,
    ) -> None:  # fmt: skip
        """The threads are those of the whole process. Raises DDError where the modules cannot be loaded."""
        super().__init__(root, manifest, configuration, threads)
        self._reference = partial(build_reference, manifest, files, weights, threads, encoder=False)
        parts: TorchReference = self._reference()
        self._kind, self._recipe = configuration.backend, parts.recipe
        self._student, self._tokenizer, self._module = parts._student, parts._tokenizer, parts.module
        self._precision, self._device = configuration.precision, configuration.device
        self._forms: dict[str, Any] = {}

    @classmethod
    def configurations(cls, *_: Any) -> list[Configuration]:
        """None: it is no engine of a user's."""
        return []

    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        """A module; the teacher's is loaded only here, else it would count as memory of every row."""
        import torch

        from ddexport.graph.spec import GraphSpec
        from ddexport.graph.wrappers import graph_module
        from ddexport.validate.bench.torch_int8 import Int8

        if graph.role == TEACHER:
            return self._in_precision(self._reference(teacher=True).teacher, graph).to(self._device)
        if graph.role not in self._forms:
            self._forms[graph.role] = self._form(graph)
        spec = GraphSpec(graph.role, "", *self.manifest.tensors(graph), 0.0, graph.split)
        module = graph_module(spec, self._forms[graph.role], self._tokenizer)
        module = self._naive(module) if self._kind == NAIVE and graph.role == "student" else module
        if self._kind != COMPILED:
            return module
        if self._precision == "int8":
            return Int8(module)
        return torch.compile(module, dynamic=False)

    def _form(self, graph: Graph) -> Any:
        """The module of a role: of `torch-eager` and `torch-compile` in the form that the bundle's graph was
        traced from, but with the group norms that PyTorch has a kernel for."""
        from ddexport.graph.wrappers import graph_part

        module = self._module(graph.role)
        if self._kind in (REFERENCE, NAIVE):
            return module
        if graph.role not in PREFIXES.values():
            module = self._in_precision(graph_part(module, "fp32", group_norm="instance"), graph)
        return module.to(self._device)

    def _in_precision(self, module: Any, graph: Graph) -> Any:
        from ddexport.precision.cast import in_precision

        precision = "fp32" if self._precision == "int8" else self._precision
        return in_precision(module, precision, graph.keep_fp32)

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        """Every output is computed, whichever are wanted."""
        import torch

        with torch.inference_mode():
            given = (torch.from_numpy(np.array(array)).to(self._device) for array in feeds.values())
            outputs = session(*given)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = dict(zip(_outputs(feeds), tensors, strict=True))
        return {name: outputs[name].cpu().numpy() for name in names}

    def generate(self, condition: Arrays, prefix: IntArray, span: Span, pick: Pick, cfg: float) -> IntArray:
        """The tokens (B, end) of a span behind a prefix, as the published samplers draw them. condition:
        labels, or of texts features and mask."""
        import torch

        from ddexport.distill.trainers import trainer

        def choose(logits: Any, positions: slice) -> Any:
            return torch.from_numpy(pick(logits.float().cpu().numpy(), positions)).to(self._device)

        teacher = self.open(self.manifest.graph(TEACHER, self.configuration.graphs))
        first = torch.from_numpy(prefix).to(self._device) if span.start else None
        given = tuple(torch.from_numpy(array).to(self._device) for array in condition.values())
        with torch.inference_mode():
            draw = trainer(teacher.family).generate
            tokenizer = self._tokenizer.to(self._device)
            tokens = draw(teacher, tokenizer, given, choose, cfg, first, span.end)
        return np.asarray(tokens.cpu().numpy(), dtype=np.int64)

    def _naive(self, student: Any) -> Callable[..., Any]:
        """latents [B, L, Cv], label [B], known [B] of equal numbers -> sequence, tokens [B, S], logits."""
        from ddexport.validate.bench.naive import naive_step

        assert self._recipe is not None
        step, split = naive_step(self._recipe, student), student.geometry.split

        def run(latents: Any, label: Any, known: Any) -> tuple[Any, Any, Any]:
            sequence, logits, _ = step(latents, label, int(known[0]))
            return sequence, logits[:, :split].argmax(-1), logits[:, :split]

        return run


def _outputs(feeds: Arrays) -> Sequence[str]:
    """The outputs of the module that is fed so."""
    if "features" in feeds:
        return ("values", "log_count", "condition")
    return ("sequence", "tokens", "logits") if "known" in feeds else ("image",)


class TorchPipeline(Pipeline):
    """The runtime's pipeline on a `TorchEngine`."""

    backend: TorchEngine

    def __init__(self, engine: TorchEngine) -> None:
        labels = read_labels(resolve(engine.root, engine.manifest.labels.file), engine.manifest.classes)
        super().__init__(engine.root, engine.manifest, labels, engine)
        self.texts = TorchTexts(engine.root, engine.manifest, engine) if engine.manifest.text else None

    def _teacher_backend(self) -> Any:
        return self.backend

    def _text_backend(self) -> Any:
        return self.backend

    def _continued(
        self, given: Conditions, uniforms: Any, sampling: Any, on_pass: Any, span: Span, prefix: IntArray
    ) -> IntArray:
        pick = by_uniforms(uniforms, sampling)
        return self.backend.generate(given.feeds(TEACHER), prefix, span, pick, sampling.guidance_scale)


class TorchTexts(Texts):
    """The runtime's texts, but for the teacher, which reads them itself."""

    def _prefix(self, features: Features, role: str) -> dict[str, Any]:
        if role == TEACHER:
            return {"features": features.features, "features_mask": features.mask}
        return super()._prefix(features, role)
