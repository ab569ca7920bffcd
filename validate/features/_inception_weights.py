"""Where Inception's weights come from: the published file, an ONNX file of the network, or a random seed.

Files are untrusted: pickles are read with `weights_only`, and every key and every shape must be the
network's.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddexport.runtime.bundle import sha256_of
from ddexport.validate.features._base import FeatureError, FloatArray, digest_of_arrays
from ddexport.validate.features._inception_network import CLASSES, SIDE, WIDTH, FidInception

Run: TypeAlias = Callable[[Tensor], tuple[FloatArray, FloatArray | None]]

PUBLISHED = "6726825d"  # the published file's name ends in the first digits of its SHA-256
WHERE = (
    "Its weights are the file pt_inception-2015-12-05-6726825d.pth among the releases of the GitHub project"
    " mseitzer/pytorch-fid (tag fid_weights); toshas/torch-fidelity (tag v0.2.0) has the same as"
    " weights-inception-2015-12-05-6726825d.pth. Give it with --features-weights FILE, or try the tools with"
    " --features-weights random:0."
)
# The wrapper of pytorch-fid numbers what the published file names: its blocks, then the modules in each.
WRAPPED = {
    "blocks.0": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    "blocks.1": ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    "blocks.2": tuple(f"Mixed_{n}" for n in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")),
    "blocks.3": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A network that runs: images (N, 3, 299, 299) -> features (N, 2048), logits (N, 1008) or None.

    network: what `run` runs, and whose device the images must be on; None where it is no module of PyTorch.
    """

    run: Run
    digest: str
    classifier: bool
    network: FidInception | None = None


def load_weights(path: Path | None) -> Loaded:
    """The network of a file. Raises FeatureError: no file, a damaged or unsafe one, or of another network."""
    if path is None:
        raise FeatureError("the features 'inception' need weights that do not ship with this project", WHERE)
    if not path.is_file():
        raise FeatureError(f"there is no file {path}", WHERE)
    return _load_onnx(path) if path.suffix.lower() == ".onnx" else _load_torch(path)


def random_weights(seed: int) -> Loaded:
    """The network with reproducible random weights that keep the size of its activations."""
    return _ready(random_state(seed), classifier=True)


def random_state(seed: int) -> dict[str, Tensor]:
    """These weights, under their published names; each tensor depends on the seed and its name alone."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in FidInception().state_dict().items()}
    return {name: _random_value(name, shape, seed) for name, shape in shapes.items()}


def _random_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith(("bn.weight", "running_var")):
        values = np.exp(0.1 * values)
    elif name.endswith(("bias", "running_mean")):
        values = 0.1 * values
    else:
        values = values * (2 / np.prod(shape[1:])) ** 0.5  # keeps the second moment through a ReLU
    return torch.from_numpy(values.astype(np.float32))


def _load_torch(path: Path) -> Loaded:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise FeatureError(f"{path} cannot be read as a state dict: {_first_line(error)}", WHERE) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise FeatureError(f"{path} is no state dict: names with tensors", WHERE)
    state = {_published_name(key): value for key, value in state.items()}
    classifier = any(key.startswith("fc.") for key in state)
    _check(path, state, classifier)
    if not sha256_of(path).startswith(PUBLISHED):
        logger.warning("%s is not the published file: its figures compare with no published ones", path)
    return _ready(state, classifier)


def _published_name(key: str) -> str:
    match = re.match(r"(blocks\.\d)\.(\d)\.(.*)", key)
    if match and match[1] in WRAPPED and int(match[2]) < len(WRAPPED[match[1]]):
        return f"{WRAPPED[match[1]][int(match[2])]}.{match[3]}"
    return key


def _check(path: Path, state: dict[str, Tensor], classifier: bool) -> None:
    """Raises FeatureError unless every key and shape is the network's and every number is finite."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in FidInception().state_dict().items()}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    if not classifier:
        optional |= {"fc.weight", "fc.bias"}
    missing = sorted(wanted.keys() - state.keys() - optional)
    unknown = sorted(state.keys() - wanted.keys())
    wrong = [key for key in state if key in wanted and tuple(state[key].shape) != wanted[key]]
    if missing or unknown or wrong:
        parts = [
            f"{len(missing)} keys are missing, such as {missing[0]}" if missing else "",
            f"{len(unknown)} are unknown, such as {unknown[0]}" if unknown else "",
            f"{wrong[0]} is {tuple(state[wrong[0]].shape)} and not {wanted[wrong[0]]}" if wrong else "",
        ]
        text = "; ".join(part for part in parts if part)
        raise FeatureError(f"{path} does not hold the FID Inception network: {text}", WHERE)
    for key, value in state.items():
        if key not in optional and not (value.is_floating_point() and value.isfinite().all()):
            raise FeatureError(f"{path}: {key} does not hold finite numbers", WHERE)


def _ready(state: dict[str, Tensor], classifier: bool) -> Loaded:
    kept = {key: value.float() for key, value in state.items() if "num_batches" not in key}
    digest = digest_of_arrays((key, value.numpy()) for key, value in kept.items())
    if not classifier:
        kept |= {"fc.weight": torch.zeros(CLASSES, WIDTH), "fc.bias": torch.zeros(CLASSES)}
    with torch.device("meta"):
        network = FidInception()
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in network.state_dict() if "num_batches" in key
    }
    network.load_state_dict({**kept, **counters}, strict=True, assign=True)
    network.eval().requires_grad_(False)

    def run(images: Tensor) -> tuple[FloatArray, FloatArray | None]:
        with torch.no_grad():
            features, logits = network(images)
        return features.cpu().numpy(), logits.cpu().numpy() if classifier else None

    return Loaded(run, digest, classifier, network)


def _load_onnx(path: Path) -> Loaded:
    """A graph with one input, float32 (N, 3, 299, 299) in [-1, 1], and the outputs (N, 2048) and, if it has
    the classifier, (N, 1008), told apart by their width.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise FeatureError(f"{path} cannot be run: {_first_line(error)}", WHERE) from error
    names = _onnx_names(path, session)

    def run(images: Tensor) -> tuple[FloatArray, FloatArray | None]:
        outputs = session.run(names[1:], {names[0]: images.numpy()})
        flat = [np.asarray(array, dtype=np.float32).reshape(len(images), -1) for array in outputs]
        return flat[0], flat[1] if len(flat) > 1 else None

    return Loaded(run, f"onnx:{sha256_of(path)}", len(names) > 2)


def _onnx_names(path: Path, session: Any) -> list[str]:
    """The names of the input, of the features, and of the logits if there are any."""
    inputs = session.get_inputs()
    shape = list(inputs[0].shape) if len(inputs) == 1 else []
    fits = (
        len(shape) == 4 and shape[1] == 3 and all(isinstance(s, str) or s in (SIDE, None) for s in shape[2:])
    )
    if not fits or inputs[0].type != "tensor(float)" or isinstance(shape[0], int):
        raise FeatureError(
            f"{path}: its input is not float32 (N, 3, {SIDE}, {SIDE}) with a dynamic N", _ONNX_HINT
        )
    by_width = {output.shape[1]: output.name for output in session.get_outputs() if len(output.shape) >= 2}
    if WIDTH not in by_width:
        raise FeatureError(f"{path} has no output (N, {WIDTH})", _ONNX_HINT)
    return [inputs[0].name, by_width[WIDTH], *([by_width[CLASSES]] if CLASSES in by_width else [])]


_ONNX_HINT = (
    f"The graph must map images (N, 3, {SIDE}, {SIDE}) in [-1, 1] to pool3 (N, {WIDTH}) and, for the"
    f" Inception Score, the logits without bias (N, {CLASSES})."
)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
