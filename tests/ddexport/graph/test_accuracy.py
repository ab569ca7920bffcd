"""What is measured of a half graph, by hand-made numbers, and that nothing bad passes."""

from __future__ import annotations

import numpy as np
import pytest

from ddexport.graph.accuracy import OutputError, check_limits, check_sane, output_errors
from ddexport.recipe import Limits
from ddexport.runtime.errors import VerificationError

LIMITS = Limits(token_margin=0.1, embedding_error=0.01, image_psnr=40.0, image_max=3)


def student(batch: int = 2) -> dict[str, np.ndarray]:
    """Four positions of width 2, the first two from a codebook of 3; logits without ties."""
    logits = np.tile(np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.95]], np.float32), (batch, 1, 1))
    return {"sequence": np.ones((batch, 4, 2), np.float32), "logits": logits}


def errors(
    change: dict[str, tuple[object, float]], known: tuple[int, ...] = (0, 2)
) -> dict[str, OutputError]:
    wanted, got = student(), student()
    for name, (place, amount) in change.items():
        got[name][place] += amount
    return {e.output: e for e in output_errors(got, wanted, np.array(known), LIMITS.token_margin)}


class TestStudent:
    def test_equal_outputs(self) -> None:
        for error in errors({}).values():
            assert (error.batch, error.rms, error.largest) == (2, 0.0, 0.0)
            assert error.faults(LIMITS) == []

    def test_the_worst_row_counts(self) -> None:
        """One regressed number of one image: 0.2 of four numbers of size 1 -> 0.1, the good row apart."""
        error = errors({"sequence": ((0, 3, 1), 0.2)})["sequence"]
        assert error.rms == pytest.approx(0.1)
        assert error.largest == pytest.approx(0.2)
        assert error.faults(LIMITS)

    def test_what_is_copied_is_not_an_embedding(self) -> None:
        """Codebook entries and kept positions say nothing about the error of the regression."""
        assert errors({"sequence": ((0, 1, 1), 9.0)})["sequence"].rms == 0

    def test_a_token_that_differs(self) -> None:
        """Position 1 is close: float32 was undecided. Position 0 is not."""
        close = errors({"logits": ((0, 1, 2), 0.06)})["logits"]
        assert (close.compared, close.differing, close.excused) == (2, 1, 1)
        assert close.faults(LIMITS) == []
        clear = errors({"logits": ((0, 0, 1), 2.5)})["logits"]
        assert (clear.differing, clear.excused) == (1, 0)
        assert any("tokens that differ 1" in fault for fault in clear.faults(LIMITS))

    def test_a_token_that_is_kept_cannot_differ(self) -> None:
        assert errors({"logits": ((1, 0, 1), 2.5)})["logits"].differing == 0

    def test_the_excuse_is_worth_nothing_if_logits_are_wrong(self) -> None:
        faults = errors({"logits": ((0, 1, 2), 0.2)})["logits"].faults(LIMITS)
        assert any("largest error of a logit 0.2" in fault for fault in faults)


class TestImage:
    def image(self, amount: float) -> OutputError:
        wanted = {"image": np.full((2, 3, 4, 4), 0.5, np.float32)}
        got = {"image": wanted["image"].copy()}
        got["image"][1] += amount
        (error,) = output_errors(got, wanted, None, 0.0)
        return error

    def test_psnr_and_bits_are_of_the_worst_image(self) -> None:
        error = self.image(0.01)
        assert error.psnr == pytest.approx(40.0, abs=1e-3)
        assert error.bits8 in {2, 3}
        assert self.image(0.02).faults(LIMITS)

    def test_equal_images_have_a_number(self) -> None:
        """JSON has no infinity."""
        assert self.image(0.0).psnr == 200.0


class TestSane:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_numbers_that_are_not_finite(self, value: float) -> None:
        got = {"sequence": np.random.default_rng(0).random((2, 4, 2)).astype(np.float32)}
        got["sequence"][1, 2, 0] = value
        with pytest.raises(
            VerificationError, match=r"x\.onnx: sequence holds 1 numbers .* not finite \(row 1"
        ):
            check_sane(got, "x.onnx")

    def test_a_constant_image(self) -> None:
        """A black picture is what overflow often ends in."""
        images = np.random.default_rng(0).random((3, 3, 4, 4)).astype(np.float32)
        check_sane({"image": images}, "x.onnx")
        images[2] = 0
        with pytest.raises(VerificationError, match=r"image is constant \(row 2 of a batch of 3\)") as caught:
            check_sane({"image": images}, "x.onnx")
        assert caught.value.exit_code == 3


def test_limits_are_named() -> None:
    error = OutputError("image", 3, 0.1, 0.1, psnr=30.0, bits8=9)
    with pytest.raises(
        VerificationError, match="PSNR of an image 30 at batch 3, limit 40; largest 8-bit"
    ) as caught:
        check_limits([error], LIMITS, "decoder_fp16.onnx")
    assert "--keep-fp32" in caught.value.hint


def test_not_a_number_is_past_every_limit() -> None:
    assert len(OutputError("sequence", 1, float("nan"), 0.0).faults(LIMITS)) == 1
