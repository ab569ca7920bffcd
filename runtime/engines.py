"""Built TensorRT engines of a bundle: what their sidecars say, and whether they run on this machine.

An engine lies at `engines/<backend>-<version>-<targets>/<role>_<precision>.plan`, with a sidecar of the same
name and the suffix `.json`: an engine cannot be asked without a GPU, and a foreign one must not be loaded at
all. Format: docs/engines.md.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from ddexport.runtime import machine
from ddexport.runtime.bundle import ROLES, Manifest, Role, resolve
from ddexport.runtime.errors import BundleError
from ddexport.runtime.records import DAMAGED, Natural, Positive, Record, convert, read_json

SCHEMA = 3
FOLDER = "engines"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PRECISIONS = ("fp16", "bf16", "fp32")  # of engines, the fastest first
MAX_SIDECARS = 512

# NVIDIA's support matrix of TensorRT-RTX: what the default engine runs on, and what can be named.
DEFAULT_TARGET = "default"
DEFAULT_CAPABILITIES = ((8, 0), (8, 6), (8, 9))
DEFAULT_FROM = (12, 0)
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
HOPPER = (9, 0)
AMPERE, AMPERE_FROM = "ampere+", (8, 0)  # full TensorRT's hardware compatibility level


class Profile(Record, frozen=True):
    """The batch sizes that an engine takes, and the one it is tuned for."""

    minimum: Positive
    optimum: Positive
    maximum: Positive

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"a profile must be 1 <= minimum <= optimum <= maximum, not {self}")

    def __str__(self) -> str:
        return f"{self.minimum}/{self.optimum}/{self.maximum}"


class BuiltOn(Record, frozen=True, kw_only=True):
    """The GPU that full TensorRT tuned an engine on, and the newest CUDA that the driver there supports."""

    gpu: str
    capability: str
    cuda: tuple[int, int] | None = None


class Engine(Record, frozen=True, kw_only=True):
    """A sidecar: everything known of one engine file.

    file, sha256, bytes: the plan, beside the sidecar. source: `Graph.digest` of the graph it was built from.
    backend, version: the package that built it, in full. targets: compute capabilities as `sm89`, or
    `default`. hardware: full TensorRT's hardware compatibility level. layers: how many
    layers compute in each type. options: what else it was built with. key: the digest of all that shapes it.
    """

    schema: int
    role: Role
    split: Positive | None = None
    precision: str
    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+\.plan$")]
    sha256: str
    bytes: Natural
    source: str
    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    platform: str
    targets: Annotated[tuple[str, ...], Meta(min_length=1)]
    hardware: str | None = None
    version_compatible: bool = False
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1)]
    layers: Mapping[str, int]
    options: Mapping[str, Any]
    key: str
    built_on: BuiltOn | None = None
    seconds: float

    @property
    def max_batch(self) -> int:
        return max(profile.maximum for profile in self.profiles)

    def supports(self, capability: tuple[int, int]) -> bool:
        """Whether the engine is made for GPUs of this compute capability."""
        if self.targets == (DEFAULT_TARGET,):
            return capability in DEFAULT_CAPABILITIES or capability >= DEFAULT_FROM
        if self.hardware == AMPERE:
            return capability >= AMPERE_FROM
        return "sm{}{}".format(*capability) in self.targets


class EngineSet(NamedTuple):
    """The engines in a folder of one precision, by role and, of a student of another split, that split."""

    folder: Path
    precision: str
    engines: dict[tuple[str, int | None], Engine]


def engine_folder(backend: str, version: str, targets: tuple[str, ...]) -> str:
    """Where the engines of one build go, relative to the bundle."""
    return f"{FOLDER}/{backend}-{version}-{'_'.join(targets)}"


def read_engine(root: Path, sidecar: Path) -> Engine:
    """One sidecar of the bundle `root`. Raises BundleError, which names the file and the key."""
    name = sidecar.relative_to(root).as_posix()
    content = read_json(resolve(root, name))
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        remedy = "Upgrade: pip install --upgrade ddexport" if schema > SCHEMA else "Build the engine again."
        raise BundleError(f"{name} has schema {schema}, and this runtime reads {SCHEMA}", remedy)
    engine = convert(Engine, content, name)
    folder = engine_folder(engine.backend, engine.version, engine.targets)
    if name.rpartition("/")[0] != folder:
        raise BundleError(f"{name} is of an engine that belongs in {folder}", DAMAGED)
    resolve(root, f"{folder}/{engine.file}")
    return engine


def find_engines(root: Path) -> tuple[list[EngineSet], list[BundleError]]:
    """The engines of the bundle `root`, the fastest precision first, and what is wrong with the others."""
    paths = sorted((root / FOLDER).glob("*/*.json"))
    if len(paths) > MAX_SIDECARS:
        return [], [BundleError(f"{FOLDER}/ has {len(paths)} sidecars, more than {MAX_SIDECARS}", DAMAGED)]
    sets: dict[tuple[str, Path], EngineSet] = {}
    errors: list[BundleError] = []
    for path in paths:
        try:
            engine = read_engine(root, path)
        except BundleError as error:
            errors.append(error)
            continue
        key = (engine.precision, path.parent)
        engines = sets.setdefault(key, EngineSet(path.parent, engine.precision, {})).engines
        if engines.setdefault((engine.role, engine.split), engine) is not engine:
            errors.append(BundleError(f"{path} is a second {engine.role} of its folder", DAMAGED))
    order = dict.fromkeys([*PRECISIONS, *(precision for precision, _ in sets)])
    return [sets[key] for precision in order for key in sets if key[0] == precision], errors


def fit(root: Path, manifest: Manifest, engines: EngineSet, index: int = 0) -> tuple[str, str, bool]:
    """What stands in the way of engines on the GPU of that number, what is worth knowing, "" for nothing, and
    whether NVIDIA supports them there.

    Where other engines would do better, the text ends with the command that builds them. The contents of the
    plans are not read here: their SHA-256 is compared with what is loaded, when it is loaded.
    """
    obstacles, notes = against_bundle(manifest, engines), list[str]()
    missing, supported = machine.gpu_fault(index), True
    like, *_ = members = list(engines.engines.values())
    for engine in members:
        if engine.platform != machine.this_platform():
            obstacles.append(f"built for {engine.platform}, and this is {machine.this_platform()}")
        if not missing:
            gpu = machine.cuda().gpus[index]
            supported = supported and engine.supports(gpu.capability)
            if engine.supports(gpu.capability):
                notes += _tuning_notes(engine.built_on, gpu)
            elif engine.targets == (DEFAULT_TARGET,) and gpu.capability == HOPPER:
                notes.append(f"{gpu.name} has {gpu.target}, outside NVIDIA's support matrix of TensorRT-RTX")
            else:
                targets = "sm80 and later" if engine.hardware == AMPERE else ", ".join(engine.targets)
                targets = targets.replace(DEFAULT_TARGET, "sm80, sm86, sm89, sm120 and later")
                obstacles.append(f"built for {targets}, and {gpu.name} has {gpu.target}")
    if not obstacles and not missing:  # importing the package may take a second
        missing = machine.import_fault(MODULES[like.backend], like.backend)
        here = "" if missing else str(import_module(MODULES[like.backend]).__version__)
        if here and not all(_version_fits(engine, here) for engine in members):
            obstacles.append(f"built with {like.backend} {like.version}, and here is {here}")
    remedy = f"build for this machine: {build_command(root, index, engines.precision, like)}"
    if obstacles:
        return _joined([*obstacles, missing, remedy]), "", supported
    return missing, _joined([*notes, "" if supported else remedy]), supported


def build_command(root: Path, index: int, precision: str, like: Engine | None = None) -> str:
    """The command that makes engines for the GPU of that number, like one that there is."""
    gpu = next(iter(machine.cuda().gpus[index:]), None)
    by_default = gpu is None or gpu.capability in DEFAULT_CAPABILITIES or gpu.capability >= DEFAULT_FROM
    backend = like.backend if like else "tensorrt-rtx"
    if gpu and not by_default and gpu.capability not in RTX_CAPABILITIES:
        backend = "tensorrt"  # TensorRT-RTX has no engine for it
    words = ["ddexport", "trt", str(root), "--backend", backend, "--precision", precision]
    for profile in like.profiles if like else ():
        words += ["--batch", str(profile).replace("/", ",")]
    if gpu and not by_default and backend == "tensorrt-rtx":
        words += ["--compute-capability", gpu.target]
    return shlex.join(words)


def against_bundle(manifest: Manifest, engines: EngineSet) -> list[str]:
    """What stands in the way of engines on any machine: they are not of this bundle, or not whole."""
    obstacles = [f"there is no {role} engine" for role in ROLES if (role, None) not in engines.engines]
    for (role, split), engine in engines.engines.items():
        try:
            graph = manifest.graph(role, engines.precision, split)
        except BundleError as error:
            obstacles.append(f"{engine.file} is of another bundle: {error.message}")
            continue
        plan = engines.folder / engine.file
        size = plan.stat().st_size if plan.is_file() else 0
        if engine.source != graph.digest:
            obstacles.append(f"{engine.file} was built from another {graph.file}")
        if size != engine.bytes:
            obstacles.append(f"{engine.file} has {size} bytes, but its sidecar says {engine.bytes}")
    return obstacles


def _tuning_notes(built_on: BuiltOn | None, gpu: machine.Gpu) -> list[str]:
    notes, supported = [], machine.cuda().version
    if built_on and built_on.gpu != gpu.name:
        notes.append(f"tuned on {built_on.gpu}, and here is {gpu.name}: it may run slower than it could")
    if built_on and built_on.cuda and supported and supported < built_on.cuda:
        there, here = (".".join(map(str, version)) for version in (built_on.cuda, supported))
        notes.append(f"built with a driver for CUDA {there}, and this one supports {here}")
    return notes


def _version_fits(engine: Engine, here: str) -> bool:
    """TensorRT-RTX: the same version. Version-compatible engines of full TensorRT run on later releases of
    the same major version."""
    there, now = (list(map(int, re.findall(r"\d+", version))) for version in (engine.version, here))
    compatible = engine.backend == "tensorrt" and engine.version_compatible
    return here == engine.version or (compatible and now[:1] == there[:1] and now > there)


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))
