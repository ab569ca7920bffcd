"""One graph in, one plan out, through Polygraphy: the same code for TensorRT 10 and 11 and TensorRT-RTX."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from ddexport.engine import network
from ddexport.engine.module import TensorRT
from ddexport.engine.options import HARDWARE_LEVELS, BuildOptions
from ddexport.runtime.bundle import Graph, Manifest
from ddexport.runtime.console import progress
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.engines import DEFAULT_TARGET
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write

Stage = Callable[[str], AbstractContextManager[None]]
Tensors = Sequence[TensorSpec]

log = logging.getLogger(__name__)

_HINTS = {  # by what a message contains
    "workspace": "give the builder more scratch memory: leave --workspace out, or --workspace 4GB",
    "CUDA_SUCCESS": "this build needs a GPU with its driver: build on the target machine",
    "cudaError 35": "this build needs a GPU with its driver: build on the target machine",
    "out of memory": "the GPU is out of memory: use a smaller --batch or --workspace, or free the GPU",
    "SM75": "Turing has no float32 products, of which every graph has some: leave sm75 out",
    "sm75": "Turing has no bfloat16: leave sm75 out, or build the fp16 graphs",
    "deconv": "TensorRT-RTX 1.7 has no transposed convolution in bfloat16: build the fp16 graphs",
    "and operator": "this TensorRT lacks the operator, or that form of it: try a newer one",
}


class BuildError(DDError):
    """TensorRT could not build an engine, or logged an error while it did."""


class Plan(NamedTuple):
    """A plan on disk: its hash and size, and how many layers compute in each type."""

    sha256: str
    bytes: int
    layers: Mapping[str, int]


def build_plan(
    trt: TensorRT,
    root: Path,
    manifest: Manifest,
    graph: Graph,
    options: BuildOptions,
    stream: IO[bytes],
    stage: Stage,
) -> Plan:
    """Builds the engine of a graph of the bundle `root` and writes its plan to a stream.

    options: as `resolve` gives them. Ctrl-C stops the build and raises KeyboardInterrupt; what is in the
    stream then is of no use.

    Raises:
        BundleError: the graph takes weights from a file that the manifest does not list.
        VerificationError: the network has other types than asked for, or not the contract's tensors.
        BuildError: TensorRT failed, or logged an error.
    """
    inputs, outputs = manifest.tensors(graph)
    with stage(f"parsing {graph.file}"), _logged_errors(graph):
        in_graph = network.layers_of_onnx(root, graph)  # before the network: both hold all weights
        parsed = _parse(root / graph.file)
        layers = network.layers_of_network(parsed[1])
        network.check_precision(graph, in_graph, layers)
        network.check_contract(graph, inputs, outputs, parsed[1])
    name = f"{graph.role} {graph.precision} with {trt}"
    with stage(f"building {name}"), _logged_errors(graph):
        serialized = _build(trt, parsed, inputs, options, name)
    del parsed  # gigabytes
    with stage(f"writing the engine of {graph.file}"):
        content = memoryview(serialized).cast("B")
        stream.write(content)
        sha256 = hashlib.sha256(content).hexdigest()
    return Plan(sha256, len(content), network.by_type(layers))


def _parse(path: Path) -> Any:
    """Builder, network and parser: the parser owns weights, and must live until the build is done."""
    from polygraphy.backend.trt import NetworkFromOnnxPath

    return NetworkFromOnnxPath(str(path), strongly_typed=True)()


def _build(trt: TensorRT, parsed: Any, inputs: Tensors, options: BuildOptions, name: str) -> Any:
    """Builds in a thread, so that Ctrl-C arrives here while TensorRT is busy, and can be passed on to it."""
    from polygraphy.backend.trt import EngineBytesFromNetwork

    monitor, timing, shown = _monitor(trt), options.timing_cache, 0
    configure = _configure(trt, inputs, options, monitor)
    with (
        progress(0, f"building {name}, step") as bar,  # without a total: the last step takes most of the time
        atomic_write(timing) if timing else nullcontext() as cache,
        ThreadPoolExecutor(1, "tensorrt") as pool,
    ):
        work = pool.submit(EngineBytesFromNetwork(parsed, configure, save_timing_cache=cache))
        while not work.done():
            try:
                wait([work], 0.2)
                bar.advance(monitor.steps - shown)
                shown = monitor.steps
            except KeyboardInterrupt:
                monitor.cancelled = True
                log.warning("stopping: TensorRT asks whether to go on at its next step, which may take long")
        if monitor.cancelled:
            raise KeyboardInterrupt
        return work.result()


def _configure(trt: TensorRT, inputs: Tensors, options: BuildOptions, monitor: Any) -> Any:
    """What makes the builder's configuration once it has the network."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    module = trt.module
    profiles = [Profile() for _ in options.profiles]
    for profile, sizes in zip(profiles, options.profiles, strict=True):
        for name, _, (_, *rest) in inputs:
            profile.add(name, *((batch, *rest) for batch in (sizes.minimum, sizes.optimum, sizes.maximum)))
    common = {
        "profiles": profiles,
        "builder_optimization_level": options.optimization_level,
        "profiling_verbosity": module.ProfilingVerbosity.LAYER_NAMES_ONLY,  # as TensorRT has it by itself
        "progress_monitor": monitor,
    }
    if options.workspace is not None:
        common["memory_pool_limits"] = {module.MemoryPoolType.WORKSPACE: options.workspace}
    if trt.is_rtx:
        named = [divmod(int(target[2:]), 10) for target in options.targets if target != DEFAULT_TARGET]
        create = CreateConfigRTX(compute_capabilities=named or None, **common)
    else:
        if options.hardware is not None:
            level = HARDWARE_LEVELS[options.hardware]
            common["hardware_compatibility_level"] = getattr(module.HardwareCompatibilityLevel, level)
        create = CreateConfig(version_compatible=options.version_compatible, **common)

    def finish(builder: Any, network: Any, config: Any) -> None:
        """Polygraphy leaves TF32 on for TensorRT-RTX, and does not look at what these calls answer."""
        (config.set_flag if options.tf32 else config.clear_flag)(module.BuilderFlag.TF32)
        if config.num_optimization_profiles != len(profiles):
            raise BuildError("TensorRT refused a range of batch sizes", "try others with --batch")
        if options.timing_cache and options.timing_cache.exists():
            cache = config.create_timing_cache(options.timing_cache.read_bytes())
            if not config.set_timing_cache(cache, ignore_mismatch=False):
                reason = f"{options.timing_cache} is a timing cache of another GPU or version"
                raise BuildError(reason, "use a file for each")

    return PostprocessConfig(create, finish)


def _monitor(trt: TensorRT) -> Any:
    """A TensorRT progress monitor that counts steps, and stops the build once it is cancelled."""

    class Monitor(trt.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        steps, cancelled = 0, False

        def __init__(self) -> None:
            trt.module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def phase_finish(self, phase_name: str) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps += 1
            return not self.cancelled

    return Monitor()


@contextmanager
def _logged_errors(graph: Graph) -> Iterator[None]:
    """Raises BuildError for every error that is logged: TensorRT says why in its log alone, and may go on
    building without a setting that it refused."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.info("%s", record.getMessage())  # shown with --debug
            if record.levelno >= logging.ERROR:
                errors.append(record.getMessage())

    G_LOGGER.use_python_logging_system, G_LOGGER.letter, G_LOGGER.colors = True, False, False
    logger, handler = logging.getLogger("Polygraphy"), Handler()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except PolygraphyException as error:
        errors.append(str(error))
    finally:
        logger.removeHandler(handler)
    if errors:
        reason = next((text for text in errors if "and operator" in text), errors[0])
        short = re.sub(r"\s*In \w+ at \S*/_src/[^\s)]*", "", " ".join(reason.split()))  # NVIDIA's sources
        hints = [hint for word, hint in _HINTS.items() if word in reason]
        raise BuildError(
            f"TensorRT cannot build {graph.file}: {short[:400]}",
            hints[0] if hints else "all of TensorRT's messages: --debug",
        )
