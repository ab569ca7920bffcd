"""PyTorch's runners: the project's modules, the same compiled, the published code's, and the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.runtime.bundle import TEACHER, Manifest, Schedule
from ddexport.runtime.sampler import Step
from ddexport.runtime.teacher import Arrays, Pick
from ddexport.validate.bench.runners import Runner
from ddexport.validate.bench.workload import COMPILED, PUBLISHED, REFERENCE, Job
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.reference import TorchReference, build_reference

if TYPE_CHECKING:
    from torch import Tensor

    from ddexport.recipe import Recipe

Module = Callable[..., Any]


def open_torch(job: Job, manifest: Manifest) -> Runner:
    """The runner of a job; its threads are those of the whole process. Raises DDError."""
    import torch

    torch.set_num_threads(job.runner.threads_each)
    backend, precision = job.runner.backend, job.runner.precision

    def reference(teacher: bool = False) -> TorchReference:
        return build_reference(manifest, job.files or {}, job.weights, teacher=teacher)

    def read_teacher() -> Any:
        """Only when it is run: else it would count as memory of rows that have no use for it."""
        return reference(teacher=True)._teacher

    parts = reference()
    student, tokenizer = parts._student, parts._tokenizer
    if backend == REFERENCE:
        return TorchRunner(student, tokenizer, read_teacher)
    if backend == PUBLISHED:
        assert parts.recipe is not None
        return PublishedRunner(student, tokenizer, parts.recipe)
    kept = manifest.graph("student", precision if precision in manifest.precisions else None).keep_fp32
    return LeanRunner(student, tokenizer, precision, kept, read_teacher, backend == COMPILED)


class TorchRunner(Runner):
    """Runs modules by role and split, made when they are first asked for: those of `validate parity`."""

    def __init__(
        self, student: Any, tokenizer: Any, read_teacher: Module | None = None, compiled: bool = False
    ) -> None:
        """read_teacher: gives a `ddexport.graph.wrappers.TeacherGraph`. compiled: by torch.compile."""
        import torch

        self.version = str(torch.__version__)
        self._student, self._tokenizer, self._read_teacher = student, tokenizer, read_teacher
        self._compiled, self._modules = compiled, dict[tuple[str, int | None], Any]()

    def open(self, schedule: Schedule) -> None:
        if schedule.known:
            self.module("student", schedule.split)
        if schedule.teacher is not None:
            self.module(TEACHER)
        self.module("decoder")

    def run(self, role: str, split: int | None, feeds: Arrays, names: Sequence[str] | None = None) -> Arrays:
        """All outputs, whatever is wanted: they are computed anyway. Inputs are read where they lie."""
        import torch

        module = self.module(role, split)
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in feeds.values()))
        arrays = [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        caches = [f"new_{name}" for name in feeds if name.startswith(("key_", "value_"))]
        known = {"student": ["sequence", "tokens", "logits"], "decoder": ["image"]}
        return dict(zip(known.get(role, ["logits", *caches]), arrays, strict=True))

    def module(self, role: str, split: int | None = None) -> Any:
        """The module of a role, of the student with that split."""
        import torch

        if (role, split) not in self._modules:
            if role == TEACHER:
                assert self._read_teacher is not None
                module = self._read_teacher()
            else:
                module = self._tokenizer if role == "decoder" else self._split_student(split)
            self._modules[role, split] = torch.compile(module, dynamic=False) if self._compiled else module
        return self._modules[role, split]

    def _split_student(self, split: int | None) -> Any:
        return self._student.at_split(split) if split else self._student


class LeanRunner(TorchRunner):
    """The modules that the graphs are traced from, with their tables; in bf16 by the same policy."""

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        precision: str,
        keep_fp32: Sequence[str] = (),
        read_teacher: Module | None = None,
        compiled: bool = False,
    ) -> None:
        """Modules in float32. The rest as in `TorchRunner`."""
        from ddexport.graph.wrappers import TeacherGraph
        from ddexport.precision.cast import in_precision

        def cast_teacher() -> Any:
            assert read_teacher is not None
            return TeacherGraph(cast(read_teacher().teacher), tokenizer).eval()

        cast: Module = partial(in_precision, precision=precision, keep_fp32=keep_fp32)
        student.tabulate()
        super().__init__(cast(student), cast(tokenizer), cast_teacher, compiled)
        self._float_tokenizer = tokenizer

    def generate_alone(self, labels: IntArray, pick: Pick, guidance_scale: float) -> Step | None:
        """The published sampler: its own cache, guidance by a doubled batch, modulation computed in every
        pass. Tokens are chosen by `pick`, so that every runner chooses by the same numbers."""
        import torch

        from ddexport.distill.trainers import trainer

        def choose(logits: Tensor, positions: slice) -> Tensor:
            return torch.from_numpy(pick(logits.float().numpy(), positions))

        teacher, classes = self.module(TEACHER).teacher, torch.from_numpy(labels)
        began = time.perf_counter()
        with torch.inference_mode():
            generate = trainer(teacher.family).generate
            tokens = generate(teacher, self._float_tokenizer, classes, choose, guidance_scale)
            sequence = self._float_tokenizer.embed(tokens).numpy()
        numbers = np.asarray(tokens.numpy(), dtype=np.int64)
        return Step(numbers, sequence, TEACHER, time.perf_counter() - began)


class PublishedRunner(TorchRunner):
    """The published code's student (`bench/published`), and the decoder, which is its own too."""

    def __init__(self, student: Any, tokenizer: Any, recipe: Recipe) -> None:
        super().__init__(student, tokenizer)
        self._recipe = recipe

    def _split_student(self, split: int | None) -> Any:
        from ddexport.validate.bench.published import published_step

        student = super()._split_student(split)
        step, kept = published_step(self._recipe, student), student.geometry.split

        def whole(latents: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sequence, logits, _ = step(latents, label, int(known[0]))
            logits = logits[:, :kept]
            return sequence, logits.argmax(-1), logits

        return whole
