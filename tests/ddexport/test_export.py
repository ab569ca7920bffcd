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
import onnxruntime as ort
import pytest
import torch
from msgspec import structs
from onnx import numpy_helper

import ddexport.export
import ddexport.staging
from ddexport.card import ACCURACY_FILE, model_card, read_accuracy
from ddexport.export import Exported, WeightRequest, export_bundle, load_parts
from ddexport.graph.spec import graph_specs, sample_inputs
from ddexport.graph.to_onnx import OPSETS
from ddexport.recipe import Recipe, RecipeError, Source, load_recipe, recipe_of
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import OutputError, VerificationError
from ddexport.sources import MissingWeightsError

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


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class TestManifest:
    def test_what_was_returned_is_what_was_written(self, golden_export: Exported) -> None:
        """The runtime's reader accepts it, every hash included, and finds every number again."""
        found = read_manifest(golden_export.path, verify=True)
        assert json.loads(found.to_json()) == json.loads(golden_export.manifest.to_json())
        assert found.to_json() == (golden_export.path / "bundle.json").read_text(encoding="utf-8")

    def test_every_file_is_named_and_hashed(self, golden_export: Exported) -> None:
        assert contents(golden_export.path) == NAMES
        listed = {info.file: info for info in golden_export.manifest.files()}
        assert set(listed) == NAMES - {"bundle.json", "README.md", ACCURACY_FILE}
        for name, info in listed.items():
            assert info.sha256 == sha256(golden_export.path / name)
            assert info.bytes == (golden_export.path / name).stat().st_size

    @pytest.mark.parametrize("model", ["digits-var", "digits-llamagen"])
    def test_the_runtime_reads_no_figures(self, embedded_bundle: Callable[[str], Path], model: str) -> None:
        """The manifest is short, 220 lines in float32 with a teacher: what was measured lies apart."""
        bundle = embedded_bundle(model)
        text, manifest = (bundle / "bundle.json").read_text(encoding="utf-8"), read_manifest(bundle)
        plain = structs.replace(manifest, graphs=tuple(g for g in manifest.graphs if g.precision == "fp32"))
        assert plain.to_json().count("\n") < 220 and text.count("\n") < 300
        assert '"errors"' not in text
        accuracy = read_accuracy(bundle)
        assert set(accuracy) == {graph.file for graph in manifest.graphs}
        assert all(one["weights"] and one["errors"] for one in accuracy.values())

    def test_the_numbers_of_the_recipe(self, golden_export: Exported, golden_recipe: Recipe) -> None:
        manifest = golden_export.manifest
        assert manifest.sequence == golden_recipe.sequence
        assert (manifest.image.height, manifest.image.width, manifest.classes) == (64, 64, 10)
        assert {n: s.known for n, s in manifest.schedules.items()} == {1: (0,), 2: (0, 5)}
        assert recipe_of(manifest) == golden_recipe
        assert manifest.parity["fp32"]["image_max"] == 2
        assert {"ddexport", "torch", "onnx", "onnxscript", "onnxruntime", "python"} <= set(manifest.tools)
        assert manifest.tools["torch"] == torch.__version__

    def test_where_the_weights_come_from(
        self, golden_export: Exported, golden_files: dict[str, Path]
    ) -> None:
        weights = golden_export.manifest.weights
        assert (weights.kind, weights.seed) == ("checkpoint", None)
        found = {w.role: (w.file, w.sha256, w.bytes, w.weights) for w in weights.files}
        expected = {
            role: (p.name, sha256(p), p.stat().st_size, "ema" if role == "student" else None)
            for role, p in golden_files.items()
        }
        assert found == expected
        card = (golden_export.path / "README.md").read_text()
        assert all(sha256(p) in card for p in golden_files.values())
        assert "mean nothing" not in card

    def test_the_graphs_say_what_they_are(
        self, golden_export: Exported, golden_files: dict[str, Path]
    ) -> None:
        """A graph that was copied out of its bundle still names model, role and checkpoint."""
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
        card = (tiny.bundle / "README.md").read_text()
        assert f"Random weights, seed {tiny.seed}: the images mean nothing" in card
        for graph in manifest.graphs:
            properties = {p.key: p.value for p in onnx.load(tiny.bundle / graph.file).metadata_props}
            assert properties["source"] == f"random weights, seed {tiny.seed}"

    @pytest.mark.parametrize(
        ("given", "kind"),
        [({}, "embedded"), ({"student"}, "checkpoint"), ({"student", "tokenizer"}, "checkpoint")],
    )
    def test_embedded_weights(
        self,
        golden_recipe: Recipe,
        golden_files: dict[str, Path],
        golden_dir: Path,
        replayed_trace: Replay,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        given: set[str],
        kind: str,
    ) -> None:
        """A bundle of the project's own weights says so, unless files were given in their place."""
        sources = {role: Source(embedded=path.name) for role, path in golden_files.items()}
        monkeypatch.setattr("ddexport.sources.embedded_weights", lambda source: golden_dir / source.embedded)
        recipe = structs.replace(golden_recipe, files=sources)
        files = {role: golden_files[role] for role in given}
        weights = export_bundle(recipe, tmp_path / "b", WeightRequest(files)).manifest.weights
        assert weights.kind == kind
        assert {w.role: w.sha256 for w in weights.files} == {r: sha256(p) for r, p in golden_files.items()}

    def test_the_card_shows_what_was_published(self, golden_export: Exported) -> None:
        """FID and licence, for those who find the directory alone."""
        recipe = load_recipe("var-d16")
        card = model_card(recipe, golden_export.manifest, {})
        for text in (
            "256x256",
            "1000 classes",
            "1 or 2 steps",
            "| 1 | 9.94 |",
            "| 2 | 7.82 |",
            "weights: MIT",
        ):
            assert text in card
        assert "Published FID (ImageNet 256x256, 50,000 images)" in card

    def test_nothing_of_this_machine(self, golden_export: Exported, golden_files: dict[str, Path]) -> None:
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


@pytest.fixture(scope="module")
def parts(golden_recipe: Recipe, golden_files: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return load_parts(golden_recipe, WeightRequest(golden_files))


class TestNumbers:
    @pytest.mark.parametrize("role", [0, 1], ids=["student", "decoder"])
    def test_any_batch(
        self, golden_bundle: Path, golden_recipe: Recipe, parts: dict[str, torch.nn.Module], role: int
    ) -> None:
        """Traced with two; 1, 2, 3 and 7 rows, each with its own label and known, as the module has them.

        The module here is the one with the formulas; the graph was made from the tabulated one.
        """
        spec = graph_specs(golden_recipe)[role]
        engine = session(golden_bundle / f"{spec.role}.onnx")
        for batch in (1, 2, 3, 7):
            feeds = sample_inputs(spec, golden_recipe, batch, seed=batch)
            with torch.no_grad():
                wanted = parts[spec.part](*(torch.from_numpy(v) for v in feeds.values()))
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for value, output in zip(engine.run(None, feeds), wanted, strict=True):
                assert value.shape == tuple(output.shape)
                np.testing.assert_allclose(value, output.numpy(), atol=1e-4)

    def test_inputs_and_outputs_are_the_contract(self, golden_export: Exported) -> None:
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        for graph in golden_export.manifest.graphs:
            engine = session(golden_export.path / graph.file)
            tensors = golden_export.manifest.tensors(graph)
            for have, want in zip((engine.get_inputs(), engine.get_outputs()), tensors, strict=True):
                assert [(t.name, t.type, tuple(t.shape)) for t in have] == [
                    (t.name, types[t.dtype], t.shape) for t in want
                ]

    @pytest.mark.parametrize(
        "opset",
        [pytest.param(n, marks=[] if n == OPSETS.stop - 1 else pytest.mark.slow) for n in OPSETS[1:]],
    )
    def test_every_opset(self, tiny_recipe: Recipe, tmp_path: Path, opset: int) -> None:
        """Exported and verified. The oldest is the tiny bundle's, the default the golden one's."""
        exported = export_bundle(tiny_recipe, tmp_path / "b", WeightRequest({}, random_seed=1), opset=opset)
        for graph in exported.manifest.graphs:
            model = onnx.load(exported.path / graph.file)
            assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


@pytest.fixture
def make(golden_recipe: Recipe, golden_files: dict[str, Path], replayed_trace: Replay) -> Make:
    """make(target, ...): exports the golden checkpoint without the time of a trace."""

    def export(target: Path, request: WeightRequest | None = None, **options: object) -> Exported:
        return export_bundle(golden_recipe, target, request or WeightRequest(golden_files), **options)  # type: ignore[arg-type]

    return export


def put_old(target: Path, golden_bundle: Path) -> None:
    """An older bundle in the way, recognisable by one more file."""
    shutil.copytree(golden_bundle, target)
    (target / "old").touch()


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


class TestAllOrNothing:
    @pytest.mark.parametrize("old", [True, False])
    @pytest.mark.parametrize("stop", STAGES)
    def test_an_interrupt_at_any_stage(
        self, make: Make, golden_bundle: Path, tmp_path: Path, stop: str, old: bool
    ) -> None:
        """Ctrl-C at the end of each stage, as `ddexport onnx` shows them, leaves the old bundle or none, and
        nothing beside it."""
        target, seen = tmp_path / "b", list[str]()
        if old:
            put_old(target, golden_bundle)

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

    @pytest.mark.parametrize("role", ["student", "decoder"])
    def test_one_wrong_weight(self, make: Make, replayed_trace: Replay, tmp_path: Path, role: str) -> None:
        """A graph that differs from its module is not let out."""
        replayed_trace(one_wrong_weight(role))
        with pytest.raises(VerificationError, match=rf"^{role}\.onnx differs from the PyTorch module"):
            make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_tokens_that_are_not_the_modules(
        self, make: Make, replayed_trace: Replay, wrong_tokens: Callable[[Path], None], tmp_path: Path
    ) -> None:
        """The runtime believes the output `tokens`: sequence and logits being right is not enough."""
        replayed_trace(wrong_tokens)
        with pytest.raises(VerificationError, match="tokens are not the largest logits"):
            make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_weights_of_another_copy(self, make: Make, golden_files: dict[str, Path], tmp_path: Path) -> None:
        """The golden file holds two; a graph of one is no graph of the other."""
        with pytest.raises(VerificationError):
            make(tmp_path / "b", WeightRequest(golden_files, weights="model"))
        assert list(tmp_path.iterdir()) == []

    def test_a_graph_that_is_no_onnx(self, make: Make, replayed_trace: Replay, tmp_path: Path) -> None:
        replayed_trace(lambda path: path.write_bytes(path.read_bytes()[:-100]))
        with pytest.raises(Exception, match=r".") as caught:
            make(tmp_path / "b")
        assert not isinstance(caught.value, AssertionError)
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_full(self, make: Make, replayed_trace: Replay, tmp_path: Path) -> None:
        def fill(path: Path) -> None:
            raise OSError(28, "No space left on device")

        replayed_trace(fill)
        with pytest.raises(OutputError, match="no space left"):
            make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_the_room_it_needs_is_asked_for(
        self,
        make: Make,
        golden_bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Roughly what the bundle will take; a disk with less is refused before the work."""
        asked: list[int] = []
        real = ddexport.staging.staged_directory

        def spy(target: Path, replace: bool, needed_bytes: int, marker: str):  # type: ignore[no-untyped-def]
            asked.append(needed_bytes)
            return real(target, replace, needed_bytes, marker)

        monkeypatch.setattr(ddexport.export, "staged_directory", spy)
        make(tmp_path / "b")
        size = sum(p.stat().st_size for p in golden_bundle.iterdir())
        assert 0.8 * size < asked[0] < 3 * size


class TestBeforeTheWork:
    """Mistakes that are known at once are said at once, and leave nothing."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise AssertionError("weights were loaded first")

        monkeypatch.setattr(ddexport.export, "load_parts", fail)

    def test_missing_files_are_named_with_their_source(self, tmp_path: Path) -> None:
        """File, repository and option, all that are missing at once."""
        recipe = load_recipe("var-d16")
        with pytest.raises(MissingWeightsError) as caught:
            export_bundle(recipe, tmp_path / "b", WeightRequest({}))
        for text in ("var-d16.pth", "microsoft/distilled_decoding", "VAR-DD/var-d16.pth",
                     "vae_ch160v4096z32.pth", "FoundationVision/var"):  # fmt: skip
            assert text in caught.value.message
        assert "--checkpoint var-d16.pth --vae vae_ch160v4096z32.pth" in caught.value.hint
        assert "--random-weights" in caught.value.hint
        with pytest.raises(MissingWeightsError, match=r"needs vae_ch160v4096z32\.pth \(from Found") as caught:
            export_bundle(recipe, tmp_path / "b", WeightRequest({"student": tmp_path / "var-d16.pth"}))
        assert "--checkpoint" not in caught.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_a_source_without_repository(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        files = {**golden_recipe.files, "student": Source(option="--checkpoint", file="mine.pth")}
        recipe = structs.replace(golden_recipe, files=files)
        with pytest.raises(MissingWeightsError, match=r"needs mine\.pth and vae\.pth") as caught:
            export_bundle(recipe, tmp_path / "b", WeightRequest({}))
        assert "--checkpoint mine.pth --vae vae.pth" in caught.value.hint

    def test_labels_of_another_model(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        recipe = structs.replace(golden_recipe, labels="imagenet")
        with pytest.raises(RecipeError, match="1000 names"):
            export_bundle(recipe, tmp_path / "b", WeightRequest({}, random_seed=0))
        assert list(tmp_path.iterdir()) == []
