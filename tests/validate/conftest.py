"""A toy model of a few matrices, for what needs no engine; bundles of real checkpoints, for what does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.manifest import file_info
from validate.harness import Request
from validate.metrics._base import Limits, StudentOutput

GOLDEN = Path(__file__).parents[1] / "golden" / "var-dd-small"
LENGTH, WIDTH, CODEBOOK, SPLIT, CLASSES = 6, 3, 5, 2, 4


@dataclass
class ToyModel:
    """A student and a decoder that treat every row alone, unless one of the faults below is switched on."""

    logit_error: float = 0.0
    embedding_error: float = 0.0
    pixel_error: float = 0.0
    split: int = SPLIT
    shared_between_rows: float = 0.0  # of the first row's hidden state, added to all
    grows_with_row: float = 0.0  # added to the hidden state once for each row before
    flip_first_token: bool = False  # of the first step: another token than the reference's, in every row
    batches: list[int] = field(default_factory=list)
    inputs: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        self.logit_weight = generator.normal(size=(WIDTH, CODEBOOK)).astype(np.float32)
        self.embedding_weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        self.codebook = generator.normal(size=(CODEBOOK, WIDTH)).astype(np.float32)

    def student(self, tokens: np.ndarray, label: np.ndarray, known: np.ndarray) -> StudentOutput:
        self.batches.append(len(tokens))
        self.inputs.append(tokens)
        hidden = tokens + 0.1 * label[:, None, None].astype(np.float32)
        hidden = hidden + 0.1 * np.tril(np.ones((LENGTH, LENGTH), np.float32)) @ tokens
        hidden = hidden + np.float32(self.shared_between_rows) * hidden[:1]
        hidden = hidden + np.float32(self.grows_with_row) * np.arange(len(tokens))[:, None, None]
        logits = hidden @ self.logit_weight
        logits[:, 0, 0] += np.float32(self.logit_error)
        if self.flip_first_token:
            lowest = logits[:, 0].argmin(-1)
            logits[np.flatnonzero(known == 0), 0, lowest[known == 0]] += 100
        drawn = hidden @ self.embedding_weight + np.float32(self.embedding_error)
        drawn[:, : self.split] = self.codebook[logits[:, : self.split].argmax(-1)]
        is_known = np.arange(LENGTH)[None, :] < known[:, None]
        sequence = np.where(is_known[..., None], tokens, drawn)
        return StudentOutput(sequence.astype(np.float32), logits[:, :SPLIT].astype(np.float32))

    def decode(self, sequence: np.ndarray) -> np.ndarray:
        image = 1.0 / (1.0 + np.exp(-sequence[:, :, :, None]))  # (N, L, 3, 1)
        return (image[:, :3, :3].repeat(3, axis=3) + self.pixel_error).astype(np.float32)


@pytest.fixture
def toy() -> type[ToyModel]:
    return ToyModel


@pytest.fixture
def limits() -> Limits:
    return Limits(token_margin=1e-3, embedding_error=1e-4, image_psnr=60.0, image_max=2)


@pytest.fixture
def four_images() -> Request:
    """Four rows, three schedules that share their first steps, batches of up to five."""
    generator = np.random.default_rng(7)
    return Request(
        labels=np.arange(4, dtype=np.int64) % CLASSES,
        noise=generator.normal(size=(4, LENGTH, WIDTH)).astype(np.float32),
        schedules={1: (0,), 2: (0, 1), 3: (0, 1, 4)},
        split=SPLIT,
        batch=5,
    )


@pytest.fixture(scope="session")
def random_bundle(cached_export: Callable[..., Any]) -> Path:
    """A custom recipe that does not ship with the project, with random weights. Do not write into it."""
    from ddexport.bundle import WeightRequest, export_bundle
    from ddexport.recipe import load_recipe

    recipe = dataclasses.replace(load_recipe(str(GOLDEN / "recipe.yaml")), name="tiny")
    changes: dict[str, Any] = {
        "sequence": dataclasses.replace(recipe.sequence, length=5, split=1, codebook=16),
        "image": dataclasses.replace(recipe.image, size=4),
        "model": {"depth": 1, "width": 64, "heads": 2, "scales": [1, 2]},
        "tokenizer": {"channels": 32, "multipliers": [1, 1]},
        "schedules": {
            steps: dataclasses.replace(schedule, known=known)
            for (steps, schedule), known in zip(recipe.schedules.items(), [(0,), (0, 1)], strict=True)
        },
    }
    changed, request = dataclasses.replace(recipe, **changes), WeightRequest({}, random_seed=3)
    made = cached_export("random", lambda target: export_bundle(changed, target, request))
    return Path(made.path)


@pytest.fixture
def planted(golden_bundle: Path, tmp_path: Path) -> Callable[[str, Callable[[Any], None]], Path]:
    """planted(role, edit): a copy of the golden bundle with an edited graph, hash and size made right again.

    Only a comparison with the reference can tell such a bundle from a good one.
    """
    import onnx

    def plant(role: str, edit: Callable[[Any], None]) -> Path:
        bundle = tmp_path / "planted"
        shutil.copytree(golden_bundle, bundle)
        path = bundle / f"{role}.onnx"
        model = onnx.load(path)
        edit(model.graph)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        manifest = json.loads((bundle / "bundle.json").read_text())
        for graph in manifest["graphs"]:
            if graph["role"] == role:
                graph["files"] = [dataclasses.asdict(file_info(path, bundle))]
        (bundle / "bundle.json").write_text(json.dumps(manifest))
        return bundle

    return plant
