"""PyTorch's runners: the project's modules, the same compiled, the published code's, and the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.runtime.bundle import TEACHER, Manifest, Schedule
from ddexport.runtime.errors import BackendError
from ddexport.runtime.sampler import Step
from ddexport.runtime.teacher import Arrays, Pick
from ddexport.validate.bench.runners import Runner
from ddexport.validate.bench.workload import COMPILED, PUBLISHED, REFERENCE, TORCH, Job
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.reference import TorchReference, build_reference

if TYPE_CHECKING:
    from torch import Tensor

Module = Callable[..., Any]


def open_torch(job: Job, manifest: Manifest) -> Runner:
    """The runner of a job; its threads are those of the whole process. Raises DDError."""
    import torch

    torch.set_num_threads(job.runner.threads_each)
    files, backend, precision = job.files or {}, job.runner.backend, job.runner.precision
    reference = build_reference(manifest, files, job.weights)

    def teacher() -> Any:
        """Read when it is first run: else it would count as memory of rows that have no use for it."""
        return build_reference(manifest, files, job.weights, teacher=True)._teacher

    if backend == REFERENCE:
        return ReferenceRunner(reference, teacher)
    if backend == PUBLISHED:
        return PublishedRunner(reference, manifest)
    kept = manifest.graph("student", precision if precision in manifest.precisions else None).keep_fp32
    has_teacher = manifest.teacher is not None and backend == TORCH
    return TorchRunner(reference, precision, kept, teacher if has_teacher else None, backend == COMPILED)


class TorchBase(Runner):
    """Runs modules by role and split, each made when it is first asked for."""

    def __init__(self) -> None:
        import torch

        self.version = str(torch.__version__)
        self._modules: dict[tuple[str, int | None], Module] = {}

    def open(self, schedule: Schedule) -> None:
        if schedule.known:
            self._opened("student", schedule.split)
        if schedule.teacher is not None:
            self._opened(TEACHER, None)
        self._opened("decoder", None)

    def run(self, role: str, split: int | None, feeds: Arrays, names: Sequence[str] | None = None) -> Arrays:
        """All outputs, whatever is wanted: they are computed anyway. Inputs are read where they lie."""
        import torch

        module = self._opened(role, split)
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in feeds.values()))
        arrays = [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        caches = [f"new_{name}" for name in feeds if name.startswith(("key_", "value_"))]
        known = {"student": ["sequence", "tokens", "logits"], "decoder": ["image"]}
        return dict(zip(known.get(role, ["logits", *caches]), arrays, strict=True))

    def _opened(self, role: str, split: int | None) -> Module:
        if (role, split) not in self._modules:
            self._modules[role, split] = self._module(role, split)
        return self._modules[role, split]

    def _module(self, role: str, split: int | None) -> Module:
        raise NotImplementedError


class ReferenceRunner(TorchBase):
    """The float32 modules as `validate parity` has them."""

    def __init__(self, reference: TorchReference, read_teacher: Callable[[], Any]) -> None:
        super().__init__()
        self._reference, self._read_teacher = reference, read_teacher

    def _module(self, role: str, split: int | None) -> Module:
        if role == TEACHER and self._reference._teacher is None:
            self._reference._teacher = self._read_teacher()
        return partial(self._reference.run, role, split)

    def run(self, role: str, split: int | None, feeds: Arrays, names: Sequence[str] | None = None) -> Arrays:
        outputs: Arrays = self._opened(role, split)(feeds)
        return outputs


class TorchRunner(TorchBase):
    """The lean modules that the graphs are traced from, with their tables; in bf16 by the same policy."""

    def __init__(
        self,
        reference: TorchReference,
        precision: str,
        keep_fp32: Sequence[str],
        read_teacher: Callable[[], Any] | None = None,
        compiled: bool = False,
    ) -> None:
        """read_teacher: gives a `ddexport.graph.wrappers.TeacherGraph`; None where there is no teacher."""
        from ddexport.precision.cast import in_precision

        super().__init__()
        student, tokenizer = reference._student, reference._tokenizer
        student.tabulate()
        self._cast: Callable[..., Any] = partial(in_precision, precision=precision, keep_fp32=keep_fp32)
        self._student, self._tokenizer = self._cast(student), self._cast(tokenizer)
        self._float_tokenizer, self._read_teacher, self._compiled = tokenizer, read_teacher, compiled

    def _module(self, role: str, split: int | None) -> Module:
        import torch

        if role == TEACHER:
            from ddexport.graph.wrappers import TeacherGraph

            if self._read_teacher is None:
                raise BackendError("there is no teacher to run")
            teacher = self._cast(self._read_teacher().teacher)
            module: Any = TeacherGraph(teacher, self._float_tokenizer).eval()
        elif role == "decoder":
            module = self._tokenizer
        else:
            module = self._student.at_split(split) if split else self._student
        compiled: Module = torch.compile(module, dynamic=False) if self._compiled else module
        return compiled

    def generate_alone(self, labels: IntArray, pick: Pick, guidance_scale: float) -> Step | None:
        """The published sampler: its own cache, guidance by a doubled batch, modulation computed in every
        pass. Tokens are chosen by `pick`, so that every runner chooses by the same numbers."""
        import torch

        from ddexport.distill.trainers import trainer

        def choose(logits: Tensor, positions: slice) -> Tensor:
            return torch.from_numpy(pick(logits.float().numpy(), positions))

        teacher: Any = self._opened(TEACHER, None)
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = trainer(teacher.teacher.family).draw(
                teacher.teacher, self._float_tokenizer, torch.from_numpy(labels), choose, guidance_scale
            )
            sequence = self._float_tokenizer.embed(tokens).numpy()
        numbers = np.asarray(tokens.numpy(), dtype=np.int64)
        return Step(numbers, sequence, TEACHER, time.perf_counter() - began)


class PublishedRunner(TorchBase):
    """The published code's student (`bench/published`), and the decoder, which is its own too."""

    def __init__(self, reference: TorchReference, manifest: Manifest) -> None:
        from ddexport.recipe import recipe_of

        super().__init__()
        self._student, self._tokenizer = reference._student, reference._tokenizer
        self._recipe = recipe_of(manifest)

    def _module(self, role: str, split: int | None) -> Module:
        from ddexport.validate.bench.published import published_step

        if role == "decoder":
            decoder: Module = self._tokenizer
            return decoder
        student = self._student.at_split(split) if split else self._student
        step, kept = published_step(self._recipe, student), student.geometry.split

        def whole(latents: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sequence, logits, _ = step(latents, label, int(known[0]))
            logits = logits[:, :kept]
            return sequence, logits.argmax(-1), logits

        return whole
