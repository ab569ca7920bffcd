"""A tiny bundle with a teacher, and workers in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddexport.runtime.errors import DDError
from ddexport.validate.bench.plan import Request
from ddexport.validate.bench.worker import Session, WorkerError

GOLDEN = Path(__file__).parents[2] / "golden" / "var-dd-small"


@pytest.fixture(scope="session")
def bundle(cached_export: Callable[..., Any]) -> Path:
    """Random weights in float32, one block, five positions, with a teacher. Do not write into it."""
    from ddexport.export import WeightRequest, export_bundle
    from ddexport.recipe import load_recipe, recipe_from_dict

    data = load_recipe(str(GOLDEN / "recipe.yaml")).to_dict() | {
        "name": "tiny",
        "sequence": {"length": 5, "width": 4, "codebook": 16, "split": 1},
        "image": {"size": 4, "channels": 3},
        "model": {"depth": 1, "width": 32, "heads": 2, "scales": [1, 2]},
        "tokenizer": {"channels": 32, "multipliers": [1, 1], "residual_blocks": 1},
        "schedules": {"1": {"known": [0]}, "2": {"known": [0, 1]}},
        "teacher": {"cfg": 1.5, "top_k": 12, "top_p": 0.95, "temperature": 1.0},
    }
    recipe, request = recipe_from_dict(data), WeightRequest({}, random_seed=3, teacher=True)
    return Path(cached_export("bench", lambda target: export_bundle(recipe, target, request)).path)


class InProcess:
    """A worker without a process: the same session, called directly."""

    def __init__(self, threads: int) -> None:
        self.threads, self.backend, self._session = threads, "", Session()

    def call(self, method: str, *arguments: Any) -> Any:
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        if method == "open":
            self.backend = arguments[0].runner.backend
        try:
            self.reply = getattr(self._session, method)(*arguments)
        except DDError as error:
            raise WorkerError(error.message, error.hint) from error

    def receive(self) -> Any:
        return self.reply

    def close(self) -> None:
        pass

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def in_process() -> type[InProcess]:
    return InProcess


@pytest.fixture
def quick(bundle: Path) -> Request:
    """Five rounds of everything, and no more."""
    return Request((bundle,), duration=0.0, roofline=False, threads=(1,))
