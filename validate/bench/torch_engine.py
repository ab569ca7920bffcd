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
from ddexport.runtime.bundle import Graph, Manifest, resolve
from ddexport.runtime.labels import read_labels
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.schedule import Span
from ddexport.runtime.teacher import Pick, by_uniforms
from ddexport.validate.bench.plan import COMPILED, NAIVE
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.reference import TorchReference, build_reference

REFERENCE = "reference"  # the float32 modules that outputs are compared with
OUTPUTS = {"student": ("sequence", "tokens", "logits"), "decoder": ("image",)}


class TorchEngine(Backend):
    """The modules that a bundle was made from, or what `naive` makes of its student."""

    name = "torch"

    def __init__(
        self, root: Path, manifest: Manifest, configuration: Configuration, threads: int,
        files: Mapping[str, Path | None], weights: str | None,
    ) -> None:  # fmt: skip
        """The threads are those of the whole process. Raises DDError where the modules cannot be loaded."""
        from ddexport.precision.cast import in_precision

        super().__init__(root, manifest, configuration, threads)
        self._reference = partial(build_reference, manifest, files, weights, threads)
        parts: TorchReference = self._reference()
        self._kind, self._recipe = configuration.backend, parts.recipe
        self._student, self._tokenizer, self._module = parts._student, parts._tokenizer, parts.module
        keep = manifest.graph("student", configuration.graphs).keep_fp32
        self._cast = partial(in_precision, precision=configuration.precision, keep_fp32=keep)
        if self._kind not in (REFERENCE, NAIVE):
            self._student.tabulate()

    @classmethod
    def configurations(cls, *_: Any) -> list[Configuration]:
        """None: it is no engine of a user's."""
        return []

    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        """A module; the teacher's is loaded only here, else it would count as memory of every row."""
        if graph.role == "teacher":
            return self._cast(self._reference(teacher=True).teacher)
        module = self._cast(self._module(graph.role))
        if graph.role == "student":
            module = module.at_split(graph.split) if graph.split else module
            module = self._naive(module) if self._kind == NAIVE else module
        if self._kind == COMPILED:
            import torch

            return torch.compile(module, dynamic=False)
        return module

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        """Every output is computed, whichever are wanted."""
        import torch

        with torch.inference_mode():
            outputs = session(*(torch.from_numpy(np.array(array)) for array in feeds.values()))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = dict(zip(OUTPUTS["student" if "known" in feeds else "decoder"], tensors, strict=True))
        return {name: outputs[name].numpy() for name in names}

    def generate(self, labels: IntArray, prefix: IntArray, span: Span, pick: Pick, cfg: float) -> IntArray:
        """The tokens (B, end) of a span behind a prefix, as the published samplers draw them."""
        import torch

        from ddexport.distill.trainers import trainer

        def choose(logits: Any, positions: slice) -> Any:
            return torch.from_numpy(pick(logits.float().numpy(), positions))

        teacher = self.open(self.manifest.graph("teacher", self.configuration.graphs))
        first = torch.from_numpy(prefix) if span.start else None
        with torch.inference_mode():
            draw = trainer(teacher.family).generate
            tokens = draw(teacher, self._tokenizer, torch.from_numpy(labels), choose, cfg, first, span.end)
        return np.asarray(tokens.numpy(), dtype=np.int64)

    def _naive(self, student: Any) -> Callable[..., Any]:
        """latents [B, L, Cv], label [B], known [B] of equal numbers -> sequence, tokens [B, S], logits."""
        from ddexport.validate.bench.naive import naive_step

        assert self._recipe is not None
        step, split = naive_step(self._recipe, student), student.geometry.split

        def run(latents: Any, label: Any, known: Any) -> tuple[Any, Any, Any]:
            sequence, logits, _ = step(latents, label, int(known[0]))
            return sequence, logits[:, :split].argmax(-1), logits[:, :split]

        return run


class TorchPipeline(Pipeline):
    """The runtime's pipeline on a `TorchEngine`."""

    backend: TorchEngine

    def __init__(self, engine: TorchEngine) -> None:
        labels = read_labels(resolve(engine.root, engine.manifest.labels.file), engine.manifest.classes)
        super().__init__(engine.root, engine.manifest, labels, engine)

    def _teacher_backend(self) -> Any:
        return self.backend

    def _continued(
        self, labels: IntArray, uniforms: Any, sampling: Any, on_pass: Any, span: Span, prefix: IntArray
    ) -> IntArray:
        pick = by_uniforms(uniforms, sampling)
        return self.backend.generate(labels, prefix, span, pick, sampling.guidance_scale)
