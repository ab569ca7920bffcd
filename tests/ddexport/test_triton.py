"""`ddexport triton`: configurations fit their graphs, ensembles draw what the runtime draws, and the real
tritonserver serves them (slow)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from onnxruntime import InferenceSession
from PIL import Image

from ddexport import load
from ddexport.cli import main
from ddexport.runtime.bundle import file_info, read_manifest
from ddexport.runtime.check import read_golden
from ddexport.runtime.noise import gaussian_noise
from tests.runtime import toy
from tests.runtime.fake_tensorrt import write_engines

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_name("triton")
CPU = ["CPUExecutionProvider"]
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The toy bundle with external data; its third step keeps more positions than its split."""
    root, (graph, data) = toy.write_bundle(tmp_path / "toy"), ("student.onnx", "student.onnx.data")
    onnx.save(toy.student(), root / graph, save_as_external_data=True, location=data, size_threshold=50)
    files = [msgspec.to_builtins(file_info(root / name, root)) for name in (graph, data)]
    toy.change(root, lambda content: content["graphs"][0].update(files=files))
    return root


def triton(bundle: Path, *words: object) -> Result:
    target = bundle.parent / "repository"
    return CliRunner().invoke(main, ["triton", str(bundle), "-o", str(target), *map(str, words)])


def written(bundle: Path, *words: object) -> Path:
    """The repository of a bundle."""
    result = triton(bundle, "--force", *words)
    assert result.exit_code == 0, result.stderr
    return bundle.parent / "repository"


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 1 and words in result.stderr and "\nhint: " in result.stderr, result.stderr


def config(folder: Path) -> dict[str, list[Any]]:
    """A configuration, read by hand: each field with all its values."""
    words = iter(re.findall(r'"[^"]*"|[][{}]|[\w-]+', (folder / "config.pbtxt").read_text()))

    def message() -> dict[str, list[Any]]:
        fields = defaultdict(list)
        for name in iter(partial(next, words, "}"), "}"):
            value = next(words)
            values = iter(partial(next, words), "]") if value == "[" else [value]
            fields[name] += [message() if one == "{" else json.loads(one) if re.match(r'["\d]', one) else one
                             for one in values]  # fmt: skip
        return fields

    return message()


def tensors(values: list[dict[str, list[Any]]]) -> list[tuple[Any, ...]]:
    return [(*one["name"], *one["data_type"], one["dims"], "reshape" in one) for one in values]


def draw(repository: Path, name: str, **values: Any) -> dict[str, Any]:
    """All values of an ensemble; whatever a step makes is used."""
    used = {"image", "tokens"}
    for step in config(repository / name)["ensemble_scheduling"][0]["step"]:
        inputs, outputs = (
            {one["key"][0]: one["value"][0] for one in step[side]} for side in ("input_map", "output_map")
        )
        session = InferenceSession(repository / step["model_name"][0] / "1" / "model.onnx", providers=CPU)
        made = session.run([*outputs], {key: values[value] for key, value in inputs.items()})
        values |= dict(zip(outputs.values(), made, strict=True))
        used |= set(inputs.values())
    assert used == set(values)
    return values


def test_each_configuration_fits_its_graph(bundle: Path) -> None:
    """Names, types and dimensions, also of the first runs; what has the shape (B,) is a column. The graphs
    between student and decoder have the opset and IR version of these."""
    repository = written(bundle)
    models = [path.parent.parent for path in repository.glob("*/1/model.onnx")]
    assert len(models) == 10 and len([*repository.glob("*/config.pbtxt")]) == 13
    for folder in models:
        read, graph = config(folder), InferenceSession(folder / "1" / "model.onnx", providers=CPU)
        assert [*read["name"], *read["backend"], *read["max_batch_size"]] == [folder.name, "onnxruntime", 16]
        for side, values in (("input", graph.get_inputs()), ("output", graph.get_outputs())):
            shapes = [value.shape[1:] for value in values]
            assert tensors(read[side]) == [
                (value.name, TYPES[value.type], shape or [1], not shape)
                for value, shape in zip(values, shapes, strict=True)
            ]
            assert {value.shape[0] for value in values} == {"batch"}
        for run, size in zip(read["model_warmup"], (1, 16), strict=True):
            given = [{"name": one["key"], **one["value"][0]} for one in run["inputs"]]
            assert [one[:3] for one in tensors(given)] == [one[:3] for one in tensors(read["input"])]
            assert run["batch_size"] == [size]
        model = onnx.load(folder / "1" / "model.onnx")
        assert (model.ir_version, model.opset_import[0].version) == (8, 18)
    assert "opset 18 and IR version 8;" in (repository / "README.md").read_text()


@pytest.mark.parametrize(("steps", "name"), [(1, "one_step"), (2, "two_steps"), (3, "3_steps")])
def test_an_ensemble_draws_what_the_runtime_draws(bundle: Path, steps: int, name: str) -> None:
    labels, repository = np.array([2, 0, 1, 1]), written(bundle)
    with load(bundle, backend="onnxruntime") as pipe:
        wanted = pipe(labels.tolist(), steps, seed=5, output="numpy")
    made = draw(repository, name, noise=gaussian_noise(5, range(4), 6, 4), label=labels)
    assert np.array_equal(made["tokens"], wanted.steps[-1].tokens)
    assert np.array_equal(made["image"], wanted.images)
    read = config(repository / name)
    inputs = [("noise", "TYPE_FP32", [6, 4], False), ("label", "TYPE_INT64", [1], False)]
    assert tensors(read["input"]) == inputs and made["image"].dtype == np.uint8
    outputs = [("image", "TYPE_UINT8", [8, 8, 3], False), ("tokens", "TYPE_INT64", [2], False)]
    assert tensors(read["output"]) == outputs


def test_a_repository_is_whole(bundle: Path) -> None:
    """It has the precision and the batch that are asked for, and takes the place of another one alone."""
    toy.add_precision(bundle, "bf16")
    result = triton(bundle, "--precision", "bf16", "--max-batch", 4, "--json")
    summary, repository = json.loads(result.stdout), bundle.parent / "repository"
    assert (summary["precision"], summary["max_batch"], summary["ensembles"][0]) == ("bf16", 4, "one_step")
    assert "no bf16 operators" in result.stderr
    assert (repository / "student/1/model.onnx").read_bytes() == (bundle / "student_bf16.onnx").read_bytes()
    assert (repository / "labels.txt").read_text().split() == ["zero", "one", "two"]
    assert (repository / "one_step/1/.keep").exists()
    refused(triton(bundle), "exists already")
    (repository / "ddexport.json").unlink()
    refused(triton(bundle, "--force"), "holds other files")


def test_what_triton_cannot_draw_is_refused(bundle: Path, text_bundle: Path) -> None:
    """Schedules of another split or with a teacher are left out; without others it ends, and for texts."""
    toy.add_teacher(bundle)
    assert json.loads((written(bundle) / "ddexport.json").read_text())["ensembles"] == ["one_step"]
    toy.change(bundle, lambda content: content["schedules"].pop("1"))
    refused(triton(bundle, "--force"), "has no schedule of one student alone: toy")
    refused(triton(text_bundle), "takes sentences")


def test_engines_of_full_tensorrt_become_plans(bundle: Path) -> None:
    """With all profiles, and batches up to the first that fits none. --no-engines keeps the ONNX graphs."""
    manifest, profiles = read_manifest(bundle), ((2, 4, 6), (1, 1, 1), (9, 9, 9))
    folder = write_engines(bundle, manifest, "tensorrt", profiles=profiles)
    repository = written(bundle, "--engines")
    for name in ("student", "decoder"):
        [plan], read = (repository / name / "1").iterdir(), config(repository / name)
        assert plan.name == "model.plan"
        assert plan.read_bytes() == (folder / f"{name}_fp32.plan").read_bytes()
        assert read["platform"] == ["tensorrt_plan"] and "backend" not in read
        assert read["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "profile": ["0", "1", "2"]}]
    assert {config(path.parent)["max_batch_size"][0] for path in repository.glob("*/config.pbtxt")} == {6}
    assert "need TensorRT 11.4.0.106 on sm89" in (repository / "README.md").read_text()
    plain = written(bundle, "--no-engines")
    assert not [*plain.glob("*/1/*.plan")] and config(plain / "student")["max_batch_size"] == [16]
    write_engines(bundle, manifest, "tensorrt", targets=("sm80",))
    refused(triton(bundle, "--force"), "several folders in engines/")


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ({"backend": "tensorrt-rtx"}, "tritonserver's TensorRT backend cannot load engines of TensorRT-RTX"),
        ({"source": "0" * 64}, "student_fp32.plan was built from another student.onnx"),
        ({"sha256": "0" * 64}, "the SHA-256 of student_fp32.plan is not the one in its sidecar"),
        ({"profiles": ((2, 4, 8),)}, "student_fp32.plan does not take one image"),
        (None, "toy has no fp32 engines"),
    ],
)
def test_engines_that_triton_cannot_load(bundle: Path, engines: dict[str, Any] | None, words: str) -> None:
    """They are refused where they are asked for; else ONNX graphs are served, and stderr says why."""
    if engines:
        write_engines(bundle, read_manifest(bundle), **{"backend": "tensorrt"} | engines)
    refused(triton(bundle, "--engines"), words)
    result = triton(bundle)
    assert result.exit_code == 0 and "student by onnxruntime" in result.stdout
    assert (words in result.stderr) == bool(engines)


PACKAGES = ["nvidia-pytriton==0.7.0", f"onnxruntime=={onnxruntime.__version__}", "pillow", "click", "msgspec"]


@pytest.fixture(scope="module")
def environment() -> Path:
    """One with tritonserver, which asks for NumPy below 2. It is kept in build/."""
    folder = ROOT / "build" / "pytriton"
    with FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "-q", *PACKAGES], check=True)
            (folder / "whole").touch()
    return folder


@contextmanager
def serving(environment: Path, repository: Path, folder: Path) -> Iterator[list[int]]:
    """HTTP and gRPC ports of a tritonserver that is ready. Raises RuntimeError with its errors if it ends."""
    [packages] = environment.glob("lib/python3.*/site-packages")
    shutil.copytree(packages / "pytriton" / "tritonserver", folder)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    backends, stub = folder / "backends", f"{version}/triton_python_backend_stub"
    shutil.copy(folder / "python_backend_stubs" / stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(HERE / "model.py", backends / "onnxruntime")
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    search = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    words = [folder / "bin" / "tritonserver", f"--model-repository={repository}", "--allow-metrics=false"]
    words += [f"--backend-directory={backends}", f"--http-port={ports[0]}", f"--grpc-port={ports[1]}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | search)
    try:
        while process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{ports[0]}/v2/health/ready").close()
                break
            time.sleep(0.1)
        else:
            lines = (folder / "log").read_text(errors="replace").splitlines()
            raise RuntimeError("\n".join(line for line in lines if line[:1] in "Ee["))
        yield ports
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_tritonserver_draws_what_pytorch_drew(
    environment: Path, embedded_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """Over HTTP and gRPC, eight images in a request and one by one from 16 clients: the tokens of
    `parity/golden.npz`, and the runtime's pixels. README.md's client draws too."""
    bundle = tmp_path / "digits-var"
    shutil.copytree(embedded_bundle("digits-var"), bundle)
    words = ["parity", bundle, "--precision", "fp32", "--backend", "onnxruntime", "--images", 16]
    assert CliRunner().invoke(main, ["validate", *map(str, words)]).exit_code == 0
    golden, repository = read_golden(bundle), written(bundle)
    noise = np.concatenate([gaussian_noise(int(seed), [0], 30, 8) for seed in golden.seeds])
    np.savez(tmp_path / "inputs.npz", noise=noise, labels=golden.labels)
    began = time.perf_counter()
    with serving(environment, repository, tmp_path / "server") as ports:
        ready = time.perf_counter() - began
        run = partial(subprocess.run, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
        python = environment / "bin" / "python"
        run([python, HERE / "client.py", *map(str, ports), "inputs.npz", "outputs.npz"])
        [code] = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
        run([python, "-c", code.replace(":8000", f":{ports[0]}")])
    outputs = np.load(tmp_path / "outputs.npz")
    with load(bundle, backend="onnxruntime") as pipe:
        assert np.array_equal(Image.open(tmp_path / "image.png"), pipe(9, 1, seed=0).images[0])
        for steps, name in ((1, "one_step"), (2, "two_steps")):
            pairs = zip(golden.labels.tolist(), golden.seeds.tolist(), strict=True)
            drawn = [pipe(label, steps, seed=seed, output="numpy").images[0] for label, seed in pairs]
            for key in (f"http_{name}", f"grpc_{name}", f"{name}_1", f"{name}_16"):
                assert np.array_equal(outputs[f"{key}_image"], drawn)
            for key in (f"http_{name}", f"grpc_{name}"):
                assert np.array_equal(outputs[f"{key}_tokens"], golden.of("tokens", str(steps)))
            assert np.abs(np.int64(drawn) - golden.of("images", str(steps))).max() <= 1
    rates = {key: round(float(outputs[key]), 1) for key in outputs.files if key.endswith("rate")}
    sys.stdout.write(f"ready in {ready:.1f} s; answers a second: {rates}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "old", "new", "words"),
    [
        ("student", "dynamic_batching", "dynamic_batch", 'no field named "dynamic_batch"'),
        ("one_step", "[6, 4]", "[6, 5]", "inconsistent shape"),
        (
            "one_step",
            'value: "tokens" }',
            'value: "tokens" } output_map { key: "logits" value: "codes" }',
            "codes",
        ),
    ],
)
def test_tritonserver_refuses_a_wrong_configuration(
    environment: Path, bundle: Path, tmp_path: Path, model: str, old: str, new: str, words: str
) -> None:
    """A misspelled field, another shape, a value that nobody uses."""
    path = written(bundle) / model / "config.pbtxt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RuntimeError, match=words), serving(environment, path.parents[1], tmp_path / "server"):
        pass
