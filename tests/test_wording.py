"""What users read when a command line is wrong, as a snapshot in tests/wording.txt.

Elsewhere errors are tested by class. After a change of words run `WORDING=write pytest tests/test_wording.py`
and read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddexport.cli import main
from tests.fake_hub import HUB

SNAPSHOT = Path(__file__).with_name("wording.txt")
SEVERAL = """
sampel
validate partiy
models --jsno
--version=1
onnx --model
onnx
onnx vard16
onnx VAR-D61
onnx none.yaml
onnx var-d16 --model var-d20
onnx var-d16
onnx hf://nobody/model
onnx hf://nobody/model@v1 --revision v2
onnx var-d16 --random-weights 0 --vae vae.pth
onnx var-d16 --teacher random
onnx digits-var --precision fp8
onnx none --precision fp32,int8 --keep-fp32 blocks
onnx digits-var --calibration 4
onnx digits-var -o notes.txt
onnx digits-var -o build --force
onnx digits-var --opset 17 -o new
onnx digits-var --checkpoint absent.pth -o new
onnx digits-var --decoder small
onnx digits-var --random-weights 0 --pipeline 1 --decoder tiny -o new
onnx digits-var --random-weights 0 --small-decoder x
distill decoder
distill decoder digits-var --device tpu
distill decoder digits-var --quick --install
distill decoder digits-var --random-weights 0 --install
sample
sample digits-vra
sample hf://nobody/bundle
sample hf://nobody/bundle/student.onnx
sample hf://nobody
sample s3://nobody/bundle
sample build/other
sample elsewhere/digits-var
sample build
sample digits-var
sample digits-var --steps 0
sample digits-var -o out.txt
sample digits-var --noise none.npz
doctor --check
doctor --backend openvino
trt digits-var --precision int8
trt digits-var --batch 8,4,1
trt digits-var --workspace much
trt digits-var --compute-capability hopper
bench digits-var --steps 0
bench digits-var --against-steps 2
bench digits-var --backend onnx
bench digits-var --plot times.jpg
validate fid digits-var --images 8 --per-class 2
validate distilled var-d16
validate distilled digits-var --seeds 0,x
distill var-d16
distill digits-var --stages student,judge
distill digits-var --quick --install
push digits-var nobody
web digits-var -o site --single-file
triton digits-var --max-batch 0
""".strip().splitlines()
NONE = ["sample", "inspect digits-var"]


def transcript(words: str) -> str:
    """A command line with its exit code and its error, which has two lines: what is wrong and what to do."""
    result = CliRunner().invoke(main, words.split(), prog_name="ddexport")
    assert isinstance(result.exception, SystemExit), (words, result.exception)
    assert result.stdout == "", words
    lines = [line for line in result.stderr.splitlines() if not line.startswith("loading weights")]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], (words, result.stderr)
    lines = [line.replace(HUB.url, "https://huggingface.co") for line in lines]
    return "\n".join([f"$ ddexport {words}", *lines, f"exit code {result.exit_code}", ""])


@pytest.mark.usefixtures("hub")
def test_errors_say_what_they_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ["# Without a bundle under build/\n", *map(transcript, NONE)]
    for name in ("digits-llamagen", "digits-var", ".digits-var.part"):
        (tmp_path / "build" / name).mkdir(parents=True)
        (tmp_path / "build" / name / "bundle.json").write_text("{}")
    (tmp_path / "notes.txt").touch()
    text += ["# With two of them, which are damaged\n", *map(transcript, SEVERAL)]
    if os.environ.get("WORDING") == "write":
        SNAPSHOT.write_text("\n".join(text), encoding="utf-8")
    assert "\n".join(text) == SNAPSHOT.read_text(encoding="utf-8")
