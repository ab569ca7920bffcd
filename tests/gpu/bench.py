"""Parity and times on an NVIDIA GPU; `bench.sh` runs it and says what it needs.

    python tests/gpu/bench.py prepare BUNDLE TARGET   a real-size bundle without its weights: megabytes
    python tests/gpu/bench.py PART,... BUNDLES OUT    measures; OUT/PART.json has the rows

What fails becomes a row with the error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
SMALL, REAL = ("digits-var", "digits-llamagen"), os.environ.get("MODEL", "var-d16")
PRECISIONS, SUFFIX = ("fp32", "fp16"), {"fp32": "", "fp16": "_fp16"}
SECONDS, LIMIT, STARTED = 1.0, float(os.environ.get("LIMIT", "420")), time.monotonic()


class Table:
    """The rows of one part, written after every one. cuda: False for a dry run on the CPU."""

    def __init__(self, out: Path, part: str) -> None:
        import torch

        self.cuda, self.path, self.rows = torch.cuda.is_available(), out / f"{part}.json", []
        self.device, self.batches = ("cuda", (1, 64)) if self.cuda else ("cpu", (1, 2))

    def add(self, **row: Any) -> None:
        """Keeps a row and prints it. share: of the product that `peak` has measured in that precision."""
        peaks = self.path.with_name("peak.json")
        if "flops" in row and peaks.exists():
            rates = {p.get("precision"): p.get("tflops") for p in json.loads(peaks.read_text())["rows"]}
            kind = "tf32" if "TF32 on" in row["engine"] else row["precision"]
            row["tflops"] = row.pop("flops") / row["ms"] / 1e9
            row["share"] = row["tflops"] / (rates.get(kind) or math.nan)
        self.rows.append(row)
        self.path.write_text(json.dumps({"machine": machine(), "rows": self.rows}, indent=1))
        say(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    @contextlib.contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """A failure within becomes a row."""
        try:
            yield
        except Exception as error:
            self.add(**what, error=f"{type(error).__name__}: {error}"[:600])


def say(text: object) -> None:
    sys.stdout.write(f"{time.monotonic() - STARTED:6.1f} s | {text}\n")
    sys.stdout.flush()


def in_time() -> None:
    """Raises TimeoutError once the limit has passed; what has begun is finished."""
    if time.monotonic() - STARTED > LIMIT:
        raise TimeoutError("not measured: the time is up")


def machine() -> dict[str, str]:
    """Device, driver and versions."""
    told = {"python": sys.version.split()[0]}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        told["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    for name in ("torch", "triton", "onnxruntime-gpu", "onnxruntime", "onnx", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            told[name] = metadata.version(name)
    return told


def median_ms(run: Callable[[], Any], cuda: bool, seconds: float = SECONDS) -> float:
    """Milliseconds by the wall clock, the device waited for: the median of five runs or more, after two."""
    import torch

    in_time()
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(2 if cuda else 1):
        run()
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < 5 > sum(spent):
        wait()
        start = time.perf_counter()
        run()
        wait()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent) * 1e3


def inputs(root: Path, batch: int) -> dict[str, Any]:
    """Of a student; every other image is in its second step."""
    manifest, rng = json.loads((root / "bundle.json").read_text()), np.random.default_rng(batch)
    size, second = manifest["sequence"], manifest["schedules"]["2"]["known"][1]
    latents = rng.standard_normal((batch, size["length"], size["width"]), dtype=np.float32)
    label = rng.integers(0, manifest["classes"], batch)
    return {"latents": latents, "label": label, "known": np.arange(batch) % 2 * second}


# What is measured


def peak(table: Table, bundles: Path) -> None:
    """The rates of this device: a large product of random matrices in every precision, and a large copy."""
    import torch

    size, numbers = (8192, 1 << 30) if table.cuda else (512, 1 << 20)
    for name, dtype in (("fp32", "float32"), ("tf32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        with table.attempt(what="product", precision=name):
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            a, b = (torch.randn(size, size, device=table.device, dtype=getattr(torch, dtype)) for _ in "ab")
            ms = median_ms(lambda a=a, b=b: a @ b, table.cuda)
            table.add(what="product", precision=name, ms=ms, tflops=2 * size**3 / ms / 1e9)
    torch.backends.cuda.matmul.allow_tf32 = False
    source, target = (torch.randn(numbers, device=table.device) for _ in "ab")
    ms = median_ms(lambda: target.copy_(source), table.cuda)
    table.add(what="copy", ms=ms, gb_s=2 * source.nbytes / ms / 1e6)


def parity(table: Table, bundles: Path) -> None:
    """`doctor --check`: against PyTorch for the embedded models, ONNX Runtime's CPU for the large one."""
    from ddexport import runtime
    from ddexport.runtime.check import check, read_golden
    from ddexport.runtime.doctor import diagnose

    table.add(**{k: str(v) for k, v in diagnose().items() if k in ("gpus", "packages", "problems")})
    for model, precision in [(m, p) for m in (*SMALL, REAL) for p in PRECISIONS]:
        what = {"what": "doctor --check", "model": model, "precision": precision}
        with (
            table.attempt(**what),
            runtime.load(bundles / model, "onnxruntime", precision=precision, device=table.device) as pipe,
        ):
            for row in check(pipe, read_golden(bundles / model)):
                table.add(**what, **vars(row))


def pipelines(table: Table, bundles: Path) -> None:
    """What a user calls: labels in, 8-bit images out, arrays on the host."""
    from ddexport import runtime

    for model, precision in [(m, p) for m in (REAL, *SMALL) for p in PRECISIONS]:
        what = {"engine": "Pipeline", "model": model, "precision": precision}
        with (
            table.attempt(**what),
            runtime.load(bundles / model, "onnxruntime", precision=precision, device=table.device) as pipe,
        ):
            for batch, steps in [(b, s) for b in table.batches for s in (1, 2, "teacher")]:
                if steps != "teacher" or model in SMALL:
                    measure(table, pipe, batch, steps, {**what, "batch": batch, "steps": steps})


def measure(table: Table, pipe: Any, batch: int, steps: Any, what: dict[str, Any]) -> None:
    """A row of a pipeline: a whole call, and its parts."""
    results: list[Any] = []
    labels = np.arange(batch) % 10
    draw = lambda: results.append(pipe(labels, steps, batch_size=batch, output="numpy"))  # noqa: E731
    ms = median_ms(draw, table.cuda, SECONDS / 2)
    parts = {f"{k}_ms": 1e3 * statistics.median(r.seconds[k] for r in results) for k in results[0].seconds}
    table.add(**what, ms=ms, **parts)


def onnxruntime(table: Table, bundles: Path) -> None:
    """The large model with arrays that stay on the device."""
    flops = json.loads((bundles / REAL / "weights.json").read_text())["flops"]
    graphs = {"enable_cuda_graph": "1"}
    kinds = {"": {}, ", CUDA graphs": graphs, ", CUDA graphs, NHWC": {**graphs, "prefer_nhwc": "1"},
             ", CUDA graphs, TF32 off": {**graphs, "use_tf32": "0"},
             ", CUDA graphs, TF32 on": {**graphs, "use_tf32": "1"}}  # fmt: skip
    shipped, graphed, channels_last, off, on = kinds
    plan = [
        ("student", "fp16", shipped, graphed),
        ("decoder", "fp16", shipped, graphed, channels_last, off),
        ("decoder_small", "fp16", graphed, channels_last),
        ("decoder_groupnorm", "fp16", graphed, channels_last),
        ("student", "fp32", graphed, on),
        ("decoder", "fp32", graphed, on),
    ]
    for role, precision, *listed in plan:
        file = f"{role}{SUFFIX[precision]}.onnx"
        for batch, kind in [(b, k) for b in table.batches for k in listed]:
            what = {"engine": f"onnxruntime{kind}", "role": role, "precision": precision, "batch": batch}
            with table.attempt(**what):
                run, fallen = bound(bundles / REAL / file, role, precision, batch, kinds[kind], table.device)
                ms = median_ms(run, table.cuda)
                table.add(**what, ms=ms, flops=flops[file] * batch, on_cpu=fallen)
                if not kind and table.cuda:
                    for row in kernels(run):
                        table.add(**what, **row)


def bound(
    path: Path, role: str, precision: str, batch: int, extra: dict[str, str], device: str
) -> tuple[Callable[[], None], str]:
    """A session for one batch size whose arrays lie on the device; and the operators it leaves to the CPU."""
    import onnxruntime as ort

    from ddexport.runtime.backends.onnxruntime import cuda_options
    from ddexport.runtime.bundle import Graph

    in_time()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings.add_free_dimension_override_by_name("batch", batch)
    wanted = f"{device.upper()}ExecutionProvider"
    graph = Graph(role=role, precision=precision, file=path.name, files=())
    options = {**cuda_options(graph, 0), **extra} if device == "cuda" else {}
    session = ort.InferenceSession(path, settings, providers=[(wanted, options)])
    if wanted not in session.get_providers():
        raise RuntimeError(f"{wanted} was not loaded: {session.get_providers()}")
    others = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != wanted]
    given = inputs(path.parent, batch)
    given["sequence"] = given["latents"]
    binding = session.io_binding()
    for value in session.get_inputs():
        array = ort.OrtValue.ortvalue_from_numpy(given[value.name], device, 0)
        binding.bind_ortvalue_input(value.name, array)
    for value in session.get_outputs():
        dtype = np.int64 if "int64" in value.type else np.float32
        if value.name != "logits":
            array = ort.OrtValue.ortvalue_from_shape_and_type(value.shape, dtype, device, 0)
            binding.bind_ortvalue_output(value.name, array)
    fallen = sorted({node.op_type for part in others for node in part.get_nodes()})
    return lambda: session.run_with_iobinding(binding), ", ".join(fallen)


def kernels(run: Callable[[], None], most: int = 8) -> Iterator[dict[str, Any]]:
    """The kernels that take longest in one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
    events = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)
    total = sum(e.device_time_total for e in events) or math.nan
    for event in events[:most]:
        spent = event.device_time_total
        yield {
            "kernel": f"{event.count} x {event.key[:90]}",
            "kernel_ms": spent / 1e3,
            "of_all": spent / total,
        }


def pytorch(table: Table, bundles: Path) -> None:
    """PyTorch: the modules as they are, eager and compiled, with random weights of their own."""
    import torch

    from ddexport.precision.cast import in_precision
    from ddexport.recipe import load_recipe
    from ddexport.sources import WeightRequest, load_parts

    flops = json.loads((bundles / REAL / "weights.json").read_text())["flops"]
    torch.backends.cudnn.allow_tf32 = False
    parts: dict[str, Any] = load_parts(load_recipe(REAL), WeightRequest({}, random_seed=0, teacher=False))
    parts["decoder"] = parts.pop("tokenizer")
    plan = [("eager", "fp16", {}), ("eager", "fp32", {}), ("compile", "fp16", {}),
            ("compile, CUDA graphs", "fp16", {"mode": "reduce-overhead"})]  # fmt: skip
    for (kind, precision, options), role in [(p, r) for p in plan for r in parts]:
        module = in_precision(parts[role].to(table.device), precision)
        if kind != "eager":
            torch._dynamo.reset()
            module = torch.compile(module, dynamic=False, **options)
        for batch in table.batches[: 1 if "graphs" in kind else 2]:  # a large batch hides the launches
            what = {"engine": f"torch {kind}", "role": role, "precision": precision, "batch": batch}
            with table.attempt(**what), torch.inference_mode():
                feeds = [torch.from_numpy(x).to(table.device) for x in inputs(bundles / REAL, batch).values()]
                given = feeds if role == "student" else feeds[:1]
                ms = median_ms(lambda m=module, g=given: m(*g), table.cuda)
                table.add(**what, ms=ms, flops=flops[f"{role}{SUFFIX[precision]}.onnx"] * batch)


def tensorrt(table: Table, bundles: Path) -> None:
    """The large model in fp16 engines of TensorRT-RTX: its default ones, then those for this GPU."""
    import shutil

    from ddexport import runtime
    from ddexport.engine.build import build_engines
    from ddexport.engine.module import load_tensorrt
    from ddexport.engine.options import BuildOptions, Profile

    root = bundles / f"{REAL}-engines"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(bundles / REAL, root, copy_function=os.link)
    profiles = tuple(Profile(size, size, size) for size in table.batches)
    for targets in ((), ("current",)):
        what = {"engine": f"TensorRT-RTX {' '.join(targets) or 'default'}", "precision": "fp16"}
        with table.attempt(**what):
            in_time()
            options = BuildOptions(profiles=profiles, targets=targets)
            trt = load_tensorrt("tensorrt-rtx")
            for made in build_engines(root, trt, options, ("fp16",), ("student", "decoder"), force=True):
                table.add(**what, built=made.plan.name, seconds=made.seconds)
            with runtime.load(root, "tensorrt", precision="fp16") as pipe:
                for batch in table.batches:
                    measure(table, pipe, batch, 1, {**what, "batch": batch, "steps": 1})


PARTS = {f.__name__: f for f in (peak, parity, onnxruntime, pytorch, pipelines, tensorrt)}


def summary(out: Path) -> None:
    """One table of all that was measured, a line for each engine, precision and batch size."""
    from ddexport.validate.report import wide_table

    lines: dict[tuple[str, ...], dict[str, str]] = {}
    columns: dict[str, str] = {}
    for path in filter(Path.exists, (out / f"{part}.json" for part in PARTS)):
        for row in json.loads(path.read_text())["rows"]:
            if "kernel" in row or not row.keys() & {"ms", "psnr", "error"}:
                continue
            name = " ".join(str(row[k]) for k in ("model", "engine", "what", "precision") if k in row)
            line = lines.setdefault((name, str(row.get("batch", ""))), {})
            title = str(row.get("role", f"steps {row['steps']}" if "steps" in row else "ms"))
            text = f"{row['ms']:.4g} ms" if "ms" in row else row.get("error", "").partition(":")[0]
            if "psnr" in row:
                text = f"{row['images'] - row['left_out']}/{row['images']}, {row['psnr']:.0f} dB"
                text += " FAIL" if row["faults"] else " ok"
            line[title] = columns[title] = text + (f" ({row['share']:.0%})" if "share" in row else "")
    rows = [
        {"": name, "batch": batch} | {title: line.get(title, "") for title in columns}
        for (name, batch), line in lines.items()
    ]
    say(f"all of it\n{wide_table(rows)}")


def main(parts: str, bundles: Path, out: Path) -> None:
    """Measures the named parts, then prints the table of all that OUT has."""
    import torch  # noqa: F401  it brings cuDNN and cuBLAS, which ONNX Runtime then takes

    from tests.gpu.prepared import fill

    say(machine())
    fill(bundles / REAL)
    for part in parts.split(","):
        table = Table(out, part)
        with table.attempt(part=part):
            PARTS[part](table, bundles)
    summary(out)


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        from tests.gpu.prepared import prepare

        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
