"""The teacher as its graph has it, with the cache outside, is the teacher that was published: golden numbers
to 2e-5, tokens exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddexport.graph.wrappers import TeacherGraph
from ddexport.precision.cast import in_precision
from ddexport.runtime.bundle import FileInfo, Teacher
from ddexport.runtime.schedule import Span
from ddexport.runtime.teacher import generate
from tests.goldens import BOTH, LLAMAGEN, VAR, Golden, close


class Drawer:
    """The golden teacher of one family, ready to draw with the loop of the runtime."""

    def __init__(self, family: Golden, precision: str = "fp32") -> None:
        module = family.part("teacher")
        module.tabulate()
        self.graph = TeacherGraph(in_precision(module, precision), family.tokenizer)
        geometry = module.geometry
        self.teacher = Teacher(
            starts=tuple(geometry.starts),
            layers=geometry.depth,
            heads=geometry.heads,
            head_width=geometry.head_width,
            guidance=module.guidance,
            cfg=2.0,
            top_k=1,
            top_p=1.0,
            temperature=1.0,
            codebook=FileInfo(file="codebook.npy", sha256="", bytes=0),
        )
        self.expected = {key: value.numpy() for key, value in family.expected.items()}

    @torch.no_grad()
    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.graph(*(torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values()))
        names = ["logits", *(f"new_{name}" for name in list(feeds)[5:])]
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}

    def drawn(self, start: int, end: int, prefix: np.ndarray, cfg: float) -> tuple[np.ndarray, list]:
        """Greedy tokens (2, end), and the guided logits of each pass."""
        seen: list[np.ndarray] = []

        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = self.run(feeds)
            seen.append(outputs["logits"])
            return outputs

        span, labels = Span(start=start, end=end), self.expected["labels"]
        greedy = lambda logits, place: logits.argmax(-1)  # noqa: E731
        return generate(run, self.teacher, span, prefix, {"label": labels}, cfg, greedy), seen


NOTHING = np.zeros((2, 0), np.int64)


def test_var_draws_as_published() -> None:
    """Spans, with the quirk that prefix and first scale run in one pass and see each other; and all scales,
    each in a pass of its own."""
    it = Drawer(VAR)
    starts, expected, codes = it.teacher.starts, it.expected, VAR.tokenizer.codebook.numpy()
    for case, scale in (("teach_start0", 0), ("teach_start1", 1), ("teach_start2_split2", 2)):
        prefix = expected.get(f"{case}_first_tokens", np.zeros((2, 30), np.int64))[:, : starts[scale]]
        tokens, logits = it.drawn(starts[scale], 14, prefix, cfg=2.0)
        for k, found in zip(range(scale, 3), logits, strict=True):
            close(found[:, starts[k] - starts[k + 1] :], expected[f"{case}_teacher_cfglogits_scale{k}"])
            wanted = expected[f"{case}_teacher_tokens_scale{k}"]
            assert np.array_equal(tokens[:, starts[k] : starts[k + 1]], wanted)
        close(codes[tokens], expected[f"{case}_teacher_sequence"])
    tokens, logits = it.drawn(0, 30, NOTHING, cfg=1.5)
    for k, found in enumerate(logits):
        close(found, expected[f"teacher_ar_cfglogits_scale{k}"])
    wanted = np.concatenate([expected[f"teacher_ar_tokens_scale{k}"] for k in range(4)], axis=1)
    assert np.array_equal(tokens, wanted)


def test_llamagen_draws_as_published() -> None:
    """Spans, the prefix in one causal pass with the first token, then one token a pass; and sixteen passes of
    one token each, with guidance and without."""
    it = Drawer(LLAMAGEN)
    for case, start in (("teach_start0", 0), ("teach_start3", 3)):
        tokens, logits = it.drawn(start, 5, it.expected.get(f"{case}_prefix_tokens", NOTHING), cfg=2.0)
        assert np.array_equal(tokens, it.expected[f"{case}_teacher_tokens"])
        found = np.concatenate([rows[:, -1:] for rows in logits], axis=1)
        close(found, it.expected[f"{case}_teacher_cfglogits"])
    for case, cfg in (("teacher_ar_cfg", 2.0), ("teacher_ar_nocfg_", 1.0)):
        tokens, logits = it.drawn(0, 16, NOTHING, cfg=cfg)
        close(np.concatenate(logits, axis=1), it.expected[f"{case}logits"])
        assert np.array_equal(tokens, it.expected[f"{case.removesuffix('cfg').removesuffix('_')}_tokens"])


@BOTH
def test_what_lies_behind_the_filled_part_does_not_matter(family: Golden) -> None:
    """A buffer that is larger than needed, or holds another sequence's rows, gives the same logits."""
    it = Drawer(family)
    rng, teacher = np.random.default_rng(0), it.teacher
    filled = teacher.starts[2]
    shape = (2, 3, teacher.heads, filled + 4, teacher.head_width)
    names = [f"{what}_{n}" for n in range(teacher.layers) for what in ("key", "value")]
    feeds = {
        "tokens": rng.integers(0, 64, (3, teacher.starts[-1])),
        "label": np.array([1, 2, 3]),
        "positions": np.arange(filled, filled + 2),
        "guidance": np.array([0.0, 1.0, 2.0], np.float32),
        "filled": np.array([filled]),
        **{name: rng.standard_normal(shape).astype(np.float32) for name in names},
    }
    whole = it.run(feeds)
    cut = it.run(feeds | {name: feeds[name][:, :, :, :filled] for name in names})
    largest = np.abs(whole["logits"]).max()
    close(cut["logits"] / largest, whole["logits"] / largest)
    later = {"tokens": feeds["tokens"].copy()}
    later["tokens"][:, filled + 2 :] = 0
    assert np.array_equal(it.run(feeds | later)["logits"], whole["logits"]), "reads tokens not yet drawn"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@BOTH
def test_half_precision_keeps_the_borders(family: Golden, precision: str) -> None:
    """Inputs and outputs, the cache with them, are float32; the logits are those of float32, rounded."""
    half, full = Drawer(family, precision), Drawer(family)
    _, wanted = full.drawn(0, full.teacher.starts[1], NOTHING, cfg=2.0)
    _, found = half.drawn(0, full.teacher.starts[1], NOTHING, cfg=2.0)
    assert found[0].dtype == np.float32
    error = np.abs(found[0] - wanted[0]).max() / np.abs(wanted[0]).max()
    assert 0 < error < {"fp16": 5e-3, "bf16": 4e-2}[precision]
