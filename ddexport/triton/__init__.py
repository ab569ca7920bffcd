"""A model repository of Triton Inference Server from a bundle.

Student and decoder are models, as are small graphs between them; an ensemble for each schedule joins them. So
weights are loaded once, and requests of all schedules share the student's batches.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from ddexport.runtime.bundle import FULL, Graph, Manifest, read_manifest, sha256_of
from ddexport.runtime.engines import Engine, EngineSet, against_bundle, find_engines
from ddexport.runtime.errors import DDError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.pipeline import CPU_BATCH, default_batch_size
from ddexport.staging import staged_directory
from ddexport.triton.models import ensemble_config, glue_graphs, model_config, opset

SUMMARY = "ddexport.json"
NAMES = {1: "one_step", 2: "two_steps"}
Plans = Mapping[str, tuple[Path, Engine]]
logger = logging.getLogger(__name__)


class TritonError(DDError):
    """A bundle that Triton cannot draw from, or engines that its TensorRT backend cannot load."""


def write_repository(
    bundle: Path, target: Path, precision: str | None = None, decoder: str = FULL,
    engines: bool | None = None, max_batch: int | None = None, replace: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Makes the directory `target` from a bundle. Returns the content of its ddexport.json.

    precision: None is the bundle's first. engines: None takes those of full TensorRT where there are any, and
    True insists. max_batch: None is that of `ddexport serve`; engines may take less.

    Raises BundleError for a bundle that is damaged or lacks precision or decoder, TritonError for one that
    Triton cannot draw from and for engines that it cannot load, OutputError where `target` cannot be written.
    """
    manifest = read_manifest(bundle)
    own = (None, manifest.sequence.split)
    listed = sorted(manifest.schedules.items())
    ensembles = {NAMES.get(n, f"{n}_steps"): s for n, s in listed if not s.teacher and s.split in own}
    if manifest.text or not ensembles:
        what = "takes sentences" if manifest.text else "has no schedule of one student alone"
        raise TritonError(
            f"Triton cannot draw from a bundle that {what}: {manifest.name}", "Use `ddexport serve`."
        )
    student = manifest.graph("student", precision)
    graphs = {"student": student, "decoder": manifest.decoder(decoder, student.precision)}
    plans = _plans(bundle, manifest, graphs, engines)
    if student.precision == "bf16" and len(plans) < len(graphs):
        logger.warning("ONNX Runtime has no bf16 operators for CPUs: serve this repository on a GPU")
    limits = [_largest_batch(engine) for _, engine in plans.values()]
    most = min([max_batch or min(CPU_BATCH, default_batch_size(manifest)), *limits])
    summary = {
        "bundle": manifest.name, "precision": student.precision, "decoder": decoder, "max_batch": most,
        "models": {name: "tensorrt_plan" if name in plans else "onnxruntime" for name in graphs},
        "ensembles": [*ensembles],
    }  # fmt: skip
    models = {n: onnx.load(bundle / graph.file, load_external_data=False) for n, graph in graphs.items()}
    glue = glue_graphs(manifest, ensembles.values(), models["student"])
    names = read_labels(bundle / manifest.labels.file, manifest.classes).names
    files: dict[str, bytes | Path] = {
        SUMMARY: json.dumps(summary, indent=2).encode(),
        "README.md": _readme(manifest, summary, models["student"], plans).encode(),
        "labels.txt": "\n".join(names).encode(),
        **{f"{name}/1/model.onnx": graph.SerializeToString() for name, graph in glue.items()},
    }
    for name, model in (models | glue).items():
        config = model_config(name, model, most, plans[name][1] if name in plans else None)
        files[f"{name}/config.pbtxt"] = config.encode()
    for name, schedule in ensembles.items():
        files[f"{name}/config.pbtxt"] = ensemble_config(name, schedule, manifest, most).encode()
        files[f"{name}/1/.keep"] = b""  # Triton needs the folder, and neither git nor S3 keeps an empty one
    for name, stored in graphs.items():
        if name in plans:
            files[f"{name}/1/model.plan"] = plans[name][0]
        else:
            files |= {f"{name}/1/{info.file}": bundle / info.file for info in stored.files}
            files[f"{name}/1/model.onnx"] = files.pop(f"{name}/1/{stored.file}")
    with staged_directory(target, replace, marker=SUMMARY) as staging:
        for place, content in files.items():
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, staging / place)
            else:
                (staging / place).write_bytes(content)
    return summary


def _readme(manifest: Manifest, summary: Mapping[str, Any], student: Any, plans: Plans) -> str:
    template = Path(__file__).with_name("readme.md").read_text(encoding="utf-8")
    needs = {f" The plans need TensorRT {e.version} on {'/'.join(e.targets)}." for _, e in plans.values()}
    values = {"opset": opset(student), "ir": student.ir_version, "needs": "".join(needs)}
    names = "`, `".join(summary["ensembles"])
    return template.format(manifest=manifest, names=names, **summary, **values)


def _plans(root: Path, manifest: Manifest, graphs: Mapping[str, Graph], wanted: bool | None) -> Plans:
    """The engines in place of graphs, by the name of the model. Raises TritonError if several sets of them
    can serve, or none though they are wanted."""
    if wanted is False:
        return {}
    precision = graphs["student"].precision
    listed, errors = find_engines(root)
    sets = {one.folder.name: one for one in listed if one.precision == precision}
    faults = {name: _fault(manifest, one) for name, one in sets.items()}
    able = [name for name in sets if not faults[name]]
    notes = [*(error.message for error in errors), *filter(None, faults.values())]
    if len(able) > 1:
        message = f"several folders in engines/ have {precision} engines of full TensorRT: {', '.join(able)}"
        raise TritonError(message, "Leave one of them there, or use --no-engines.")
    if wanted and not able:
        hint = f"Build some: ddexport trt {root} --backend tensorrt --precision {precision}"
        raise TritonError("; ".join(notes) or f"{manifest.name} has no {precision} engines", hint)
    for note in notes:
        logger.warning("not used: %s", note)
    chosen = {name: sets[able[0]].engines.get((graph.role, None)) for name, graph in graphs.items() if able}
    return {name: (sets[able[0]].folder / engine.file, engine) for name, engine in chosen.items() if engine}


def _fault(manifest: Manifest, engines: EngineSet) -> str:
    """Why tritonserver cannot load the engines of a folder, "" if it can."""
    members = [*engines.engines.values()]
    faults = against_bundle(manifest, engines)
    if not faults:  # so every file is there
        wrong = [one.file for one in members if sha256_of(engines.folder / one.file) != one.sha256]
        faults = [f"the SHA-256 of {file} is not the one in its sidecar" for file in wrong]
        faults += [f"{one.file} does not take one image" for one in members if not _largest_batch(one)]
    if any(engine.backend != "tensorrt" for engine in members):
        faults = ["tritonserver's TensorRT backend cannot load engines of TensorRT-RTX"]
    return f"engines/{engines.folder.name}: {'; '.join(faults)}" if faults else ""


def _largest_batch(engine: Engine) -> int:
    """The largest batch up to which every one fits a profile; 0 if that of one image does not."""
    most = 0
    for profile in sorted(engine.profiles, key=lambda profile: profile.minimum):
        most = max(most, profile.maximum) if profile.minimum <= most + 1 else most
    return most
