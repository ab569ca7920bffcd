"""PyTorch's ways: the project's own modules, the same compiled, the published code's, and the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ddexport.runtime.errors import BackendError
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.sampler import Step
from ddexport.runtime.teacher import Pick
from ddexport.validate.bench.case import COMPILED, PUBLISHED, REFERENCE, TORCH, Job
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.reference import TorchReference, build_reference

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, npt.NDArray[Any]]
Module = Callable[..., Any]


def open_torch(job: Job, manifest: Manifest) -> Any:
    """The way of a job, of its threads for the whole process. Raises DDError."""
    import torch

    torch.set_num_threads(job.threads)
    files = {role: Path(file) if file else None for role, file in job.files.items()}
    reference = build_reference(manifest, files, job.weights)

    def teacher() -> Any:
        """Read when it is first run: else it would count as memory of rows that have no use for it."""
        return build_reference(manifest, files, job.weights, teacher=True)._teacher

    if job.backend == REFERENCE:
        return ReferenceWay(reference, teacher)
    kept = tuple(manifest.graph("student").accuracy.get("keep_fp32") or ())
    if job.precision in manifest.precisions:
        kept = tuple(manifest.graph("student", job.precision).accuracy.get("keep_fp32") or ())
    if job.backend == PUBLISHED:
        return PublishedWay(reference, manifest)
    has_teacher = manifest.teacher is not None and job.backend == TORCH
    return TorchWay(reference, job.precision, kept, teacher if has_teacher else None, job.backend == COMPILED)


class ReferenceWay:
    """The float32 modules as `validate parity` has them."""

    def __init__(self, reference: TorchReference, teacher: Callable[[], Any]) -> None:
        import torch

        self._reference, self._read_teacher = reference, teacher
        self.version, self.provider = str(torch.__version__), None

    def open(self, keys: Iterable[str]) -> None:
        """Reads the teacher where it is wanted."""
        if "teacher" in keys and self._reference._teacher is None:
            self._reference._teacher = self._read_teacher()

    def run(self, key: str, feeds: Arrays) -> Arrays:
        self.open([key])
        return self._reference.run(key, feeds)

    def close(self) -> None:
        """Nothing to do."""


class _Modules:
    """Runs modules by key, each made when it is first asked for."""

    def __init__(self) -> None:
        import torch

        self.version, self.provider = str(torch.__version__), None
        self._modules: dict[str, Module] = {}

    def open(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in self._modules:
                self._modules[key] = self._module(key)

    def run(self, key: str, feeds: Arrays) -> Arrays:
        """Names as in `ddexport.runtime.contract`; inputs are read where they lie."""
        import torch

        self.open([key])
        with torch.inference_mode():
            found = self._modules[key](*(torch.from_numpy(array) for array in feeds.values()))
        arrays = [output.numpy() for output in (found if isinstance(found, tuple) else (found,))]
        caches = [f"new_{name}" for name in feeds if name.startswith(("key_", "value_"))]
        names = {"student": ["sequence", "logits"], "decoder": ["image"], "teacher": ["logits", *caches]}
        return dict(zip(names[key.partition("@")[0]], arrays, strict=True))

    def close(self) -> None:
        self._modules.clear()

    def _module(self, key: str) -> Module:
        raise NotImplementedError


class TorchWay(_Modules):
    """The lean modules that the graphs are traced from, with their tables; in bf16 by the same policy."""

    def __init__(
        self,
        reference: TorchReference,
        precision: str,
        keep_fp32: tuple[str, ...],
        teacher: Callable[[], Any] | None = None,
        compiled: bool = False,
    ) -> None:
        """teacher: reads it, as a `ddexport.graph.wrappers.TeacherGraph`; None where there is none."""
        from ddexport.precision.cast import in_precision

        super().__init__()
        student, tokenizer = reference._student, reference._tokenizer
        student.tabulate()
        self._cast: Callable[..., Any] = partial(in_precision, precision=precision, keep_fp32=keep_fp32)
        self._student, self._tokenizer = self._cast(student), self._cast(tokenizer)
        self._float_tokenizer, self._read_teacher, self._compiled = tokenizer, teacher, compiled
        self._teacher: Any = None
        if teacher is not None:
            self.teacher_alone = self._draw_teacher

    def _module(self, key: str) -> Module:
        import torch

        role, _, split = key.partition("@")
        if role == "teacher":
            from ddexport.graph.wrappers import TeacherGraph

            if self._read_teacher is None:
                raise BackendError("there is no teacher to run")
            self._teacher = self._cast(self._read_teacher().teacher)
            module: Any = TeacherGraph(self._teacher, self._float_tokenizer).eval()
        elif role == "decoder":
            module = self._tokenizer
        else:
            module = self._student.at_split(int(split)) if split else self._student
        found: Module = torch.compile(module, dynamic=False) if self._compiled else module
        return found

    def _draw_teacher(self, labels: IntArray, pick: Pick, cfg: float) -> Step:
        """The published sampler: its own cache, guidance by a doubled batch, modulation computed in every
        pass. Tokens are chosen by `pick`, so that every alternative draws by the same numbers."""
        import torch

        from ddexport.distill.trainers import trainer

        def choose(logits: Tensor, positions: slice) -> Tensor:
            return torch.from_numpy(pick(logits.float().numpy(), positions))

        self.open(["teacher"])
        began = time.perf_counter()
        with torch.inference_mode():
            draw = trainer(self._teacher.family).draw
            tokens = draw(self._teacher, self._float_tokenizer, torch.from_numpy(labels), choose, cfg)
            sequence = self._float_tokenizer.embed(tokens)
        found = np.asarray(tokens.numpy(), dtype=np.int64)
        return Step(found, sequence.numpy(), "teacher", time.perf_counter() - began)


class PublishedWay(_Modules):
    """The published code's student (`bench/published`), and the decoder, which is its own too."""

    def __init__(self, reference: TorchReference, manifest: Manifest) -> None:
        from ddexport.recipe import recipe_from_dict

        super().__init__()
        self._student, self._tokenizer = reference._student, reference._tokenizer
        self._recipe = recipe_from_dict(manifest.recipe, where=f"the recipe in bundle {manifest.name}")

    def _module(self, key: str) -> Module:
        from ddexport.validate.bench.published import published_step

        role, _, split = key.partition("@")
        if role == "decoder":
            decoder: Module = self._tokenizer
            return decoder
        student = self._student.at_split(int(split)) if split else self._student
        step, kept = published_step(self._recipe, student), student.geometry.split

        def whole(tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
            sequence, logits, _ = step(tokens, label, int(known[0]))
            return sequence, logits[:, :kept]

        return whole
