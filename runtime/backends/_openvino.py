"""One graph in OpenVINO: read, compiled for a batch size, and run, at once or spread over streams."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ddexport.runtime.backends._providers import is_batched
from ddexport.runtime.engines import graph_digest
from ddexport.runtime.errors import BackendError, DDError, OutputError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.manifest import Graph, TensorSpec, sha256_of
from numpy.typing import NDArray

FIXED_BATCH = True
"""Whether a model is compiled for each batch size. Small models run some 15 to 25 % faster than with a
dynamic batch, large ones about as fast; compiling takes about a second a GB of weights."""
KEPT = 2
"""How many batch sizes stay compiled, each with the weights in its own layout."""
TYPES = {"f32": "float32", "i64": "int64"}

Arrays = Mapping[str, NDArray[Any]]

logger = logging.getLogger(__name__)


class Compiled:
    """A compiled model and its idle requests; may be run from several threads."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.used = False
        self._idle: deque[Any] = deque()
        self._spreading = threading.Lock()
        self._queue: Any = None

    @property
    def streams(self) -> int:
        return int(self._model.get_property("NUM_STREAMS"))

    def run(self, feeds: Arrays, names: list[str]) -> dict[str, NDArray[Any]]:
        """Outputs, as arrays of their own, for inputs that are not copied."""
        self.used = True
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        outputs = request.infer(dict(feeds), share_inputs=True)
        self._idle.append(request)
        return {name: outputs[name] for name in names}

    def spread(self, feeds: Arrays, outputs: Arrays) -> None:
        """Runs row by row, as many at once as there are streams, and writes each row where it belongs."""
        with self._spreading:
            self.used = True
            if self._queue is None:
                from openvino import AsyncInferQueue

                self._queue = AsyncInferQueue(self._model)

            def keep(request: Any, row: int) -> None:
                for name, array in outputs.items():
                    array[row] = request.get_tensor(name).data[0]

            self._queue.set_callback(keep)
            try:
                for row in range(len(next(iter(outputs.values())))):
                    part = {name: array[row : row + 1] for name, array in feeds.items()}
                    self._queue.start_async(part, row, share_inputs=True)
                self._queue.wait_all()
            except BaseException:
                self._queue = None  # what is left in it belongs to no one
                raise


class Model:
    """A graph of a bundle, compiled when a batch size is first run, and for one image at once."""

    def __init__(self, root: Path, graph: Graph, settings: Mapping[str, Any], cache: Path | None) -> None:
        """settings: OpenVINO's properties. cache: a directory for compiled graphs. Raises BackendError."""
        import openvino

        self._graph, self._cache = graph, cache
        self._version = openvino.__version__
        self._settings = dict(settings)
        self._by_batch = is_batched(graph)
        self._spreads = self._by_batch and settings["PERFORMANCE_HINT"] == "THROUGHPUT"
        if not self._by_batch:  # a pass waits for the one before: all threads should work on it
            self._settings["PERFORMANCE_HINT"] = "LATENCY"
        self._lock = threading.Lock()
        self._compiled: OrderedDict[int | None, Compiled] = OrderedDict()
        try:
            self._core = openvino.Core()
            self._model = _read(root / graph.file)
        except Exception as error:  # the engine's exceptions share no base class of their own
            raise _broken(graph, error) from error
        _check(self._model, graph)
        self._for(1)

    @property
    def streams(self) -> int:
        return self._for(1).streams

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name. Raises BackendError."""
        batch = len(next(iter(feeds.values())))
        try:
            if not self._spreads:
                return self._for(batch).run(feeds, [spec.name for spec in self._graph.outputs])
            outputs = {
                spec.name: np.empty(spec.sized({"batch": batch}), spec.dtype) for spec in self._graph.outputs
            }
            self._for(1).spread(feeds, outputs)
            return outputs
        except DDError:  # of a batch size that could not be compiled
            raise
        except Exception as error:
            raise BackendError(
                f"openvino failed on {self._graph.file}: {_said(error)}",
                "If memory is short, ask for a smaller batch size.",
            ) from error

    def _for(self, batch: int) -> Compiled:
        fixed = batch if FIXED_BATCH and self._by_batch else None
        with self._lock:
            if fixed not in self._compiled:
                for size in [size for size, kept in self._compiled.items() if not kept.used]:
                    del self._compiled[size]  # compiled by `open`, and never asked for
                while len(self._compiled) >= KEPT:
                    self._compiled.popitem(last=False)
                self._compiled[fixed] = Compiled(self._compile(fixed))
            self._compiled.move_to_end(fixed)
            return self._compiled[fixed]

    def _compile(self, batch: int | None) -> Any:
        try:
            model = self._model
            if batch is not None:
                model = model.clone()
                model.reshape({spec.name: list(spec.sized({"batch": batch})) for spec in self._graph.inputs})
            if self._cache is None:
                return self._core.compile_model(model, "CPU", self._settings)
            kept = CheckedFolder(self._cache / self._key(batch))
            compiled = self._core.compile_model(model, "CPU", {**self._settings, "CACHE_DIR": str(kept.path)})
            kept.seal()
            return compiled
        except OutputError:
            raise
        except Exception as error:
            raise _broken(self._graph, error) from error

    def _key(self, batch: int | None) -> str:
        """Names all that the compiled model depends on: OpenVINO's own name for it need not."""
        settings = sorted((name, str(value)) for name, value in self._settings.items())
        text = json.dumps([self._version, graph_digest(self._graph), batch, settings])
        return f"{self._graph.role}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class CheckedFolder:
    """A folder of one compiled model. Weights are part of it, and OpenVINO loads damaged ones without a word:
    so the SHA-256 of each file is kept beside it, and a file without its own is removed."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError if the folder cannot be written."""
        make_directory(path)
        self.path = path
        for blob in self._blobs():
            if not self._sealed(blob):
                logger.warning("%s is not as it was written: it is compiled again", blob)
                blob.unlink(missing_ok=True)

    def seal(self) -> None:
        """Keeps the sums of what is new."""
        for blob in self._blobs():
            if not self._sum(blob).is_file():
                with atomic_write(self._sum(blob)) as stream:
                    stream.write(sha256_of(blob).encode())

    def _blobs(self) -> list[Path]:
        return sorted(self.path.glob("*.blob"))

    def _sealed(self, blob: Path) -> bool:
        try:
            return self._sum(blob).read_bytes() == sha256_of(blob).encode()
        except OSError:
            return False

    def _sum(self, blob: Path) -> Path:
        return blob.with_suffix(".sha256")


def _read(path: Path) -> Any:
    """A model through the ONNX frontend alone: `read_model` would try every format on a damaged file."""
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(path)))


def _check(model: Any, graph: Graph) -> None:
    """Raises BackendError if inputs or outputs are not those of the manifest."""
    for side, have, want in (
        ("inputs", model.inputs, graph.inputs),
        ("outputs", model.outputs, graph.outputs),
    ):
        if not _same(have, want):
            found = ", ".join(
                f"{'/'.join(sorted(v.get_names()))} {v.element_type.get_type_name()} {v.partial_shape}"
                for v in have
            )
            raise BackendError(
                f"the {side} of {graph.file} are not those that bundle.json names: {found}",
                "The bundle is damaged: export it again.",
            )


def _same(have: list[Any], want: tuple[TensorSpec, ...]) -> bool:
    """Whether a model's values are the specified ones, and dynamic at least where these are."""
    found = {name: value for value in have for name in value.get_names()}
    return len(have) == len(want) and all(
        spec.name in found
        and TYPES.get(found[spec.name].element_type.get_type_name()) == spec.dtype
        and found[spec.name].partial_shape.rank.get_length() == len(spec.shape)
        and all(
            size.is_dynamic or size.get_length() == wanted
            for size, wanted in zip(found[spec.name].partial_shape, spec.shape, strict=True)
        )
        for spec in want
    )


def _broken(graph: Graph, error: Exception) -> BackendError:
    return BackendError(
        f"openvino cannot load {graph.file}: {_said(error)}",
        "The graph is damaged, or needs a newer openvino.",
    )


def _said(error: Exception) -> str:
    """The last line: those before it say where in OpenVINO's source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]
