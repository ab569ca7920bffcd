"""Bundles: complete, described by their manifest, equal to PyTorch, or not there at all."""

from __future__ import annotations

import getpass
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import ddexport.export
import ddexport.staging
from ddexport.card import ACCURACY_FILE, model_card
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.graph.to_onnx import OPSETS
from ddexport.recipe import Recipe, load_recipe, recipe_of
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import OutputError, VerificationError
from ddexport.sources import provenance, sources_of
from tests.gates.faults import next_token

Make = Callable[..., Exported]
Replay = Callable[[Callable[[Path], object]], None]
NAMES = {"bundle.json", "labels.json", "README.md", "student.onnx", "decoder.onnx", ACCURACY_FILE}
STAGES = [
    "loading weights",
    "exporting student.onnx",
    "checking student.onnx",
    "exporting decoder.onnx",
    "checking decoder.onnx",
    "comparing student.onnx with PyTorch",
    "comparing decoder.onnx with PyTorch",
]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestManifest:
    def test_every_number_and_file(self, golden_export: Exported, golden_recipe: Recipe) -> None:
        """The runtime's reader accepts it, every hash included, and finds the recipe and the tools again."""
        folder, manifest = golden_export.path, golden_export.manifest
        found = read_manifest(folder, verify=True)
        assert json.loads(found.to_json()) == json.loads(manifest.to_json())
        assert found.to_json() == (folder / "bundle.json").read_text(encoding="utf-8")
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        listed = {info.file: info for info in manifest.files()}
        assert files == NAMES and set(listed) == NAMES - {"bundle.json", "README.md", ACCURACY_FILE}
        for name, info in listed.items():
            assert (info.sha256, info.bytes) == (sha256(folder / name), (folder / name).stat().st_size)
        assert recipe_of(found) == golden_recipe and found.sequence == golden_recipe.sequence
        assert (found.image.height, found.image.width, found.classes) == (64, 64, 10)
        assert {n: s.known for n, s in found.schedules.items()} == {1: (0,), 2: (0, 5)}
        assert {"ddexport", "torch", "onnx", "onnxscript", "onnxruntime", "python"} <= set(found.tools)
        assert found.tools["torch"] == torch.__version__

    def test_where_the_weights_come_from(
        self, golden_export: Exported, golden_files: dict[str, Path]
    ) -> None:
        """In the manifest, in the card, and in a graph that was copied out of its bundle."""
        weights = golden_export.manifest.weights
        assert (weights.kind, weights.seed) == ("checkpoint", None)
        assert {w.role: (w.file, w.sha256, w.bytes, w.weights) for w in weights.files} == {
            role: (p.name, sha256(p), p.stat().st_size, "ema" if role == "student" else None)
            for role, p in golden_files.items()
        }
        card = (golden_export.path / "README.md").read_text()
        assert all(sha256(p) in card for p in golden_files.values())
        assert "Random weights" not in card
        for role, part in (("student", "student"), ("decoder", "tokenizer")):
            model = onnx.load(golden_export.path / f"{role}.onnx")
            assert {p.key: p.value for p in model.metadata_props} == {
                "model": "var-dd-small",
                "role": role,
                "precision": "fp32",
                "schema": "2",
                "source": f"sha256:{sha256(golden_files[part])}",
            }
            assert [o.version for o in model.opset_import if o.domain == ""] == [20]

    def test_random_weights_are_said_everywhere(self, tiny) -> None:
        """Nobody may take their images for the model's."""
        manifest = read_manifest(tiny.bundle)
        assert (manifest.weights.kind, manifest.weights.seed) == ("random", tiny.seed)
        assert manifest.weights.files == ()
        assert f"Random weights, seed {tiny.seed}" in (tiny.bundle / "README.md").read_text()
        for graph in manifest.graphs:
            properties = {p.key: p.value for p in onnx.load(tiny.bundle / graph.file).metadata_props}
            assert properties["source"] == f"random weights, seed {tiny.seed}"

    def test_embedded_weights(self, tmp_path: Path) -> None:
        """A bundle of the project's own weights says so, unless files were given in their place."""
        recipe = load_recipe("digits-var")
        embedded = {role: file.path for role, file in sources_of(recipe, WeightRequest({})).items()}
        for files, kind in (({}, "embedded"), ({"student": embedded["student"]}, "checkpoint")):
            request = WeightRequest(files)
            weights = provenance(recipe, request, sources_of(recipe, request))
            assert weights.kind == kind
            assert {w.role: w.sha256 for w in weights.files} == {r: sha256(p) for r, p in embedded.items()}

    def test_the_card_shows_what_was_published(self, golden_export: Exported) -> None:
        """FID and licence, for those who find the directory alone."""
        card = model_card(load_recipe("var-d16"), golden_export.manifest, {})
        for text in ("256x256", "1000 classes", "| 1 | 9.94 |", "| 2 | 7.82 |", "weights: MIT"):
            assert text in card

    def test_nothing_of_this_machine(self, golden_export: Exported) -> None:
        """No paths, no stack traces, no user: graphs are published."""
        secrets = [
            str(Path(__file__).parents[2]), str(golden_export.path.parent), sys.prefix,
            f"{Path.home()}/", "site-packages", ".py", "stack_trace", 'File "', "pkg.torch", "forward",
        ]  # fmt: skip
        if len(getpass.getuser()) > 4:
            secrets.append(getpass.getuser())
        for name in NAMES:
            data = (golden_export.path / name).read_bytes()
            assert [s for s in secrets if s.encode() in data] == [], name


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS[1:])
def test_every_opset(tiny_recipe: Recipe, tmp_path: Path, opset: int) -> None:
    """Exported and verified. The oldest is the tiny bundle's, the default the golden one's."""
    exported = export_bundle(tiny_recipe, tmp_path / "b", WeightRequest({}, random_seed=1), opset=opset)
    for graph in exported.manifest.graphs:
        model = onnx.load(exported.path / graph.file)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


@pytest.fixture
def make(golden_recipe: Recipe, golden_files: dict[str, Path], replayed_trace: Replay) -> Make:
    """make(target, ...): exports the golden checkpoint without the time of a trace."""
    request = WeightRequest(golden_files)
    return lambda target, **options: export_bundle(golden_recipe, target, request, **options)


def one_wrong_weight(role: str) -> Callable[[Path], None]:
    """Changes half of the largest matrix of the traced graph by a little."""

    def spoil(path: Path) -> None:
        if path.stem == role:
            model = onnx.load(path)
            weight = max(model.graph.initializer, key=lambda w: np.prod(w.dims) if len(w.dims) == 2 else 0)
            values = numpy_helper.to_array(weight).copy()
            values.flat[values.size // 2 :] += 0.05
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
            onnx.save(model, path)

    return spoil


def other_tokens(path: Path) -> None:
    """The student says other tokens than those that it computes with."""
    if path.stem.startswith("student"):
        model = onnx.load(path)
        next_token(model.graph)
        onnx.save(model, path)


def full(path: Path) -> None:
    raise OSError(28, "No space left on device")


class TestAllOrNothing:
    @pytest.mark.parametrize(
        ("stop", "old"), [(STAGES[0], True), (STAGES[3], True), (STAGES[-1], True), (STAGES[-1], False)]
    )
    def test_an_interrupt(
        self, make: Make, golden_bundle: Path, tmp_path: Path, stop: str, old: bool
    ) -> None:
        """Ctrl-C at the end of a stage, as `ddexport onnx` shows them, leaves the old bundle or none, and
        nothing beside it."""
        target, seen = tmp_path / "b", list[str]()
        if old:
            shutil.copytree(golden_bundle, target)
            (target / "old").touch()

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            yield
            seen.append(name)
            if name == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(target, force=True, stage=stage)
        assert seen == STAGES[: STAGES.index(stop) + 1]
        assert {p.name for p in tmp_path.iterdir()} == ({"b"} if old else set())
        if old:
            assert (target / "old").exists()
            read_manifest(target)

    @pytest.mark.parametrize(
        ("after", "error"),
        [
            (one_wrong_weight("student"), VerificationError),
            (one_wrong_weight("decoder"), VerificationError),
            (other_tokens, VerificationError),  # the runtime believes the output `tokens`
            (lambda path: path.write_bytes(path.read_bytes()[:-100]), Exception),
            (full, OutputError),
        ],
        ids=["student", "decoder", "tokens", "cut off", "disk full"],
    )
    def test_a_bad_graph_is_not_let_out(
        self,
        make: Make,
        replayed_trace: Replay,
        tmp_path: Path,
        after: Callable[[Path], object],
        error: type[Exception],
    ) -> None:
        replayed_trace(after)
        with pytest.raises(error) as caught:
            make(tmp_path / "b")
        assert not isinstance(caught.value, AssertionError)
        assert list(tmp_path.iterdir()) == []

    def test_the_room_it_needs_is_asked_for(
        self, make: Make, golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Roughly what the bundle will take; a disk with less is refused before the work."""
        asked: list[int] = []
        real = ddexport.staging.staged_directory

        def spy(target: Path, replace: bool, needed_bytes: int, marker: str):  # type: ignore[no-untyped-def]
            asked.append(needed_bytes)
            return real(target, replace, 1 << 60, marker)

        monkeypatch.setattr(ddexport.export, "staged_directory", spy)
        with pytest.raises(OutputError):
            make(tmp_path / "b")
        size = sum(p.stat().st_size for p in golden_bundle.iterdir())
        assert 0.8 * size < asked[0] < 3 * size
