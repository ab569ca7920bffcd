"""A bundle of real size with random weights that travels without them, in megabytes.

`prepare` replaces the large tensors by references to files that `fill` writes on the other machine: numbers
of the same mean and spread, the same in every precision. What the filled bundle draws on this machine's CPU,
in float32, is the golden.npz that `doctor --check` compares with there.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

LARGE, PAGE = 1 << 14, 1 << 12  # numbers in a tensor that `prepare` takes out; bytes
IMAGES = 4  # of golden.npz, in each number of steps


def prepare(source: Path, target: Path) -> None:
    """Copies a bundle; adds the decoder in the other form of its norms, as `decoder_groupnorm_fp16.onnx`."""
    import onnx

    from ddexport.graph.flops import CountError, count_flops

    target.mkdir(parents=True)
    for path in [*source.glob("*.json"), *source.glob("*.npy")]:
        (target / path.name).write_bytes(path.read_bytes())
    write_group_norms(json.loads((source / "bundle.json").read_text())["name"], source)
    keys: dict[bytes, str] = {}  # a float16 tensor has the key of the float32 one that it was rounded from
    tensors, flops = [], {}
    for path in sorted(source.glob("*.onnx"), key=lambda p: "fp16" in p.name):
        with suppress(CountError):  # a teacher's depends on its cache
            flops[path.name] = count_flops(path, batch=1)
        model, end, data = onnx.load(path), 0, f"{path.name}.data"
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.size < LARGE or array.dtype.kind != "f" or not np.isfinite(array).all():
                continue
            key = keys.setdefault(digest(array), f"{path.stem}:{tensor.name}")
            keys.setdefault(digest(array.astype(np.float16)), key)
            mean, std = (float(f(array, dtype=np.float64)) for f in (np.mean, np.std))
            tensors.append({"file": data, "offset": end, "dtype": array.dtype.str, "shape": array.shape,
                            "key": key, "mean": mean, "std": std or 0.02})  # fmt: skip
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for name, value in (("location", data), ("offset", end), ("length", array.nbytes)):
                tensor.external_data.add(key=name, value=str(value))
            end += -(-array.nbytes // PAGE) * PAGE
        (target / path.name).write_bytes(model.SerializeToString())
    (target / "weights.json").write_text(json.dumps({"flops": flops, "tensors": tensors}))
    stated = (target / "bundle.json").read_bytes()
    fill(target)
    write_golden(target)
    for path in (*target.glob("*.data"), target / "filled"):
        path.unlink()
    (target / "bundle.json").write_bytes(stated)


def write_golden(root: Path) -> None:
    """What ONNX Runtime draws on the CPU in float32, as `validate parity` keeps what PyTorch drew."""
    from ddexport import runtime
    from ddexport.runtime.bundle import FILE_NAME, sha256_of
    from ddexport.runtime.check import FILE

    arrays: dict[str, Any] = {
        "manifest": np.array(sha256_of(root / FILE_NAME)),
        "steps": np.array(["1", "2"]),
    }
    arrays |= {"seeds": np.arange(IMAGES, dtype=np.uint64), "labels": np.arange(IMAGES)}
    with runtime.load(root, "onnxruntime", precision="fp32", device="cpu") as pipe:
        for steps in (1, 2):
            drawn = [pipe(label, steps, seed=label, output="numpy") for label in range(IMAGES)]
            arrays[f"images_{steps}"] = np.concatenate([np.asarray(one.images) for one in drawn])
            for name in ("tokens", "sequence"):
                parts = [getattr(one.steps[-1], name) for one in drawn]
                arrays[f"{name.removesuffix('s')}s_{steps}"] = np.concatenate(parts)
    (root / FILE).parent.mkdir()
    np.savez_compressed(root / FILE, **arrays)


def digest(array: Any) -> bytes:
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()


def write_group_norms(name: str, folder: Path) -> None:
    """The fp16 decoder of a recipe with `group_norm: instance`."""
    from ddexport.graph.spec import graph_specs
    from ddexport.graph.to_onnx import default_opset, onnx_from_module
    from ddexport.graph.wrappers import graph_part
    from ddexport.recipe import load_recipe
    from ddexport.sources import WeightRequest, load_parts

    recipe = load_recipe(name)
    parts = load_parts(recipe, WeightRequest({}, random_seed=0, teacher=False))
    spec = next(s for s in graph_specs(recipe, None, ()) if s.role == "decoder")
    form = graph_part(parts["tokenizer"], "fp16", group_norm="instance")
    path = folder / "decoder_groupnorm_fp16.onnx"
    onnx_from_module(form, spec, recipe, path, default_opset("fp16"), {})


def fill(root: Path) -> None:
    """Writes the weights of a prepared bundle, once, and their hashes into its manifest."""
    from ddexport.runtime.bundle import sha256_of

    if not (root / "weights.json").exists() or (root / "filled").exists():
        return
    key, drawn = "", np.zeros(0)
    for tensor in sorted(json.loads((root / "weights.json").read_text())["tensors"], key=lambda t: t["key"]):
        if key != tensor["key"]:
            key = tensor["key"]
            drawn = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(
                tensor["shape"], np.float32
            )
            drawn = drawn * np.float32(tensor["std"]) + np.float32(tensor["mean"])
        path = root / tensor["file"]
        with path.open("r+b" if path.exists() else "wb") as stream:
            stream.seek(tensor["offset"])
            stream.write(drawn.astype(tensor["dtype"]).tobytes())
    manifest = json.loads((root / "bundle.json").read_text())
    for graph in manifest["graphs"]:
        paths = [path for name in ("", ".data") if (path := root / f"{graph['file']}{name}").exists()]
        graph["files"] = [{"file": p.name, "sha256": sha256_of(p), "bytes": p.stat().st_size} for p in paths]
    (root / "bundle.json").write_text(json.dumps(manifest))
    (root / "filled").touch()
