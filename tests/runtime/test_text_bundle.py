"""What a text bundle draws: the golden images by ONNX Runtime, and what users ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport.runtime.cli import command
from ddexport.runtime.errors import BackendError, TextError
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.runtime.text import Features, left_padded

FOLDER = Path(__file__).parents[1] / "golden" / "llamagen-t2i-small"
PROMPTS = ["a red cat", "", "the dog is eating three blue fish"]
with np.load(FOLDER / "expected.npz") as arrays:
    EXPECTED = dict(arrays)
TEXTS = Features(EXPECTED["features"], EXPECTED["features_mask"])


@pytest.fixture(scope="module")
def pipe(text_bundle: Path) -> Iterator[Pipeline]:
    with load(text_bundle) as opened:
        yield opened


def pixels(name: str) -> np.ndarray:
    return np.asarray(EXPECTED[f"{name}_image"].clip(0, 1).transpose(0, 2, 3, 1) * 255)


@pytest.mark.parametrize(
    ("steps", "step", "name"), [(1, "onestep_step0", "onestep"), (2, "twostep_step1", "twostep")]
)
def test_the_student_draws_the_golden_images(pipe: Pipeline, steps: int, step: str, name: str) -> None:
    result = pipe(TEXTS, steps, noise=EXPECTED["noise"], output="numpy")
    np.testing.assert_allclose(result.steps[-1].sequence, EXPECTED[f"{step}_sequence"], rtol=0, atol=3e-5)
    assert np.abs(np.asarray(result.images) - pixels(name)).max() < 0.51
    np.testing.assert_array_equal(result.labels, [0, 1, 2])


@pytest.mark.parametrize(("scale", "name"), [(None, "teacher_ar"), (1.0, "teacher_ar_nocfg")])
def test_the_teacher_draws_the_golden_images(pipe: Pipeline, scale: float | None, name: str) -> None:
    result = pipe(TEXTS, "teacher", output="numpy", guidance_scale=scale)
    np.testing.assert_array_equal(result.steps[-1].tokens, EXPECTED[f"{name}_tokens"])
    assert np.abs(np.asarray(result.images) - pixels(name)).max() < 0.51


def test_from_the_ids_of_tokens_to_the_golden_tokens(pipe: Pipeline) -> None:
    assert pipe.texts is not None
    ids, mask = EXPECTED["t5_input_ids"], EXPECTED["t5_attention_mask"]
    graph, feeds = pipe.manifest.graph("text_encoder"), {"input_ids": ids, "attention_mask": mask}
    features = left_padded(pipe.texts.backend.run(graph, feeds)["hidden"], mask, 12)
    np.testing.assert_allclose(features.features, EXPECTED["t5_features"], rtol=0, atol=3e-5)
    sequence = pipe(features, 1, noise=EXPECTED["noise"], output="sequence").images
    np.testing.assert_allclose(sequence, EXPECTED["t5_onestep_step0_sequence"], rtol=0, atol=3e-5)
    tokens = pipe(features, "teacher", output="sequence").steps[-1].tokens
    np.testing.assert_array_equal(tokens, EXPECTED["t5_teacher_ar_tokens"])


@pytest.mark.parametrize("steps", [1, 2, "teacher"])
def test_an_image_depends_on_its_prompt_and_its_noise_alone(pipe: Pipeline, steps: Any) -> None:
    """Not on the prompts beside it, which are longer or shorter, nor on the batch."""
    whole = pipe(PROMPTS, steps, num_images=2, output="numpy").images
    for size in (1, 4):
        parts = list(pipe.stream(PROMPTS, steps, num_images=2, batch_size=size, output="numpy"))
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole)
        np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), [0, 0, 1, 1, 2, 2])
    alone = pipe(PROMPTS[2], steps, first_image=4, num_images=2, output="numpy").images
    np.testing.assert_array_equal(alone, whole[4:])
    assert not np.array_equal(alone, pipe("a cat", steps, first_image=4, num_images=2, output="numpy").images)


def test_a_text_is_read_once_for_all_its_images_and_steps(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, files = pipe.backend.run, list[tuple[str, int]]()

    def counted(graph: Any, feeds: Any, names: Any = None) -> Any:
        files.append((graph.role, len(next(iter(feeds.values())))))
        return run(graph, feeds, names)

    monkeypatch.setattr(pipe.backend, "run", counted)
    list(pipe.stream(PROMPTS, 2, num_images=4, batch_size=3, output="numpy"))
    once = [row for row in files if row[0] not in ("student", "decoder")]
    assert once == [("text_encoder", 3), ("text_prefix", 3)]


def test_many_texts_are_read_in_chunks(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As images come to them; what is drawn stays the same."""
    whole = pipe(PROMPTS, 2, num_images=2, output="numpy").images
    monkeypatch.setattr("ddexport.runtime.conditions.CHUNK", 2)
    for given in (PROMPTS, (prompt for prompt in PROMPTS), np.array(PROMPTS)):
        np.testing.assert_array_equal(pipe(given, 2, num_images=2, output="numpy").images, whole)


def test_what_is_no_prompt(pipe: Pipeline, text_bundle: Path, shared_bundle: Path) -> None:
    wrongs = ([], "no prompt"), ([3], "not 3"), (TEXTS.features, "text"), (5, "not 5"), (None, "not None")
    for wrong, named in (*wrongs, (b"a cat", "not b'a cat'"), (np.array(2), "not array")):
        with pytest.raises(TextError, match=named):
            pipe(wrong)  # type: ignore[arg-type]
    with pytest.raises(TextError, match="12 rows of 48"):
        pipe(Features(TEXTS.features[:, 1:], TEXTS.mask[:, 1:]))
    with load(shared_bundle) as classes, pytest.raises(TextError, match="classes"):
        classes(TEXTS)
    pipe.texts, texts = None, pipe.texts  # what a text bundle without ONNX Runtime has
    try:
        assert texts is not None
        texts.engine, engine = None, texts.engine
        with pytest.raises(BackendError, match="ONNX Runtime"):
            texts.conditions("a cat").feeds("student")
        texts.engine = engine
    finally:
        pipe.texts = texts


class TestCommand:
    @pytest.fixture
    def sample(
        self, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., Result]:
        monkeypatch.chdir(tmp_path)
        return lambda *words: CliRunner().invoke(command, [str(text_bundle), *map(str, words)])

    def test_prompts_a_file_and_features_give_the_same(
        self, sample: Callable[..., Result], pipe: Pipeline
    ) -> None:
        assert pipe.texts is not None
        Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        features = pipe.texts.features(PROMPTS)
        np.savez("features.npz", features=features.features, features_mask=features.mask)
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        for number, given in enumerate((words, ["--prompts", "prompts.txt"], ["--features", "features.npz"])):
            result = sample(*given, "--steps", 2, "-n", 2, "--seed", 5, "-o", f"{number}.png", "--json",
                            "--dump", f"{number}.npz")  # fmt: skip
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout)["labels"] == [0, 1, 2]
            assert Path(f"{number}.png").read_bytes() == Path("0.png").read_bytes()
        again = sample(*words, "--steps", 2, "--noise", "0.npz", "-o", "again.png")
        assert again.exit_code == 0, again.output
        with np.load("0.npz") as dump:
            np.testing.assert_array_equal(dump["labels"], [0, 0, 1, 1, 2, 2])
        assert sample(*words, "-o", "pictures/").exit_code == 0
        assert sorted(path.name for path in Path("pictures").iterdir())[0] == "00000-prompt0000.png"

    def test_what_is_too_long_is_cut_and_told(self, sample: Callable[..., Result]) -> None:
        result = sample("--prompt", "a cat and a dog and three red birds")
        assert result.exit_code == 0 and "cut off: " in result.stderr and "birds" in result.stderr

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ((), "--prompt"),
            (("--label", "1"), "--prompt"),
            (("--prompt", "a", "--prompts", "x.txt"), "either --prompt"),
            (("--prompts", "nowhere.txt"), "nowhere.txt"),
            (("--features", "nowhere.npz"), "nowhere.npz"),
        ],
    )
    def test_bad_requests_have_two_lines(
        self, sample: Callable[..., Result], words: tuple[str, ...], named: str
    ) -> None:
        result = sample(*words)
        assert result.exit_code == 1 and named in result.stderr
        assert result.stderr.count("\n") == 2, result.stderr

    def test_classes_take_no_prompt(self, shared_bundle: Path) -> None:
        result = CliRunner().invoke(command, [str(shared_bundle), "--prompt", "a cat"])
        assert result.exit_code == 1 and "classes" in result.stderr
