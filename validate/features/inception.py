"""The features that published FIDs are measured in: Inception's pool3, prepared as pytorch-fid does.

The weights are not ours to ship: they are the file that pytorch-fid and torch-fidelity use, fetched from
where pytorch-fid has it, and kept where it keeps it. It is untrusted: pickles are read with `weights_only`,
and every key and every shape must be the network's.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from http.client import HTTPException
from pathlib import Path

import click
import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor

from ddexport.runtime import console
from ddexport.runtime.bundle import sha256_of
from ddexport.validate.features._base import ByteImages, Extractor, FeatureError, Readings, digest_of_arrays
from ddexport.validate.features._inception_network import CLASSES, WIDTH, FidInception, prepare

PUBLISHED = "6726825d"  # the published file's name ends in the first digits of its SHA-256
FILE = f"pt_inception-2015-12-05-{PUBLISHED}.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
WHERE = (
    f"Its weights are the file {FILE} among the releases of the GitHub project mseitzer/pytorch-fid (tag"
    " fid_weights); toshas/torch-fidelity (tag v0.2.0) has the same as"
    " weights-inception-2015-12-05-6726825d.pth. Give it with --features-weights FILE, or try the command"
    " with --features-weights random:0."
)
COUNTER = "num_batches_tracked"  # of training: it may be missing, and is not used

logger = logging.getLogger(__name__)


class InceptionFeatures(Extractor):
    """2048 features and 1008 classes of images of any size."""

    name = "inception"
    width = WIDTH
    classes = CLASSES
    batch = 16

    def __init__(self, state: dict[str, Tensor]) -> None:
        """state: the network's own, with or without the counters of training."""
        kept = {key: value.float() for key, value in state.items() if not key.endswith(COUNTER)}
        digest = digest_of_arrays((key, value.numpy()) for key, value in kept.items())
        self.identity, self._device = f"{self.name}:{digest}", "cpu"
        with torch.device("meta"):
            self.network = FidInception()
        names = [key for key in self.network.state_dict() if key.endswith(COUNTER)]
        counters = {key: torch.zeros((), dtype=torch.int64) for key in names}
        self.network.load_state_dict({**kept, **counters}, strict=True, assign=True)
        self.network.eval().requires_grad_(False)

    @classmethod
    def load(cls, weights: Path | None) -> InceptionFeatures:
        """From a state dict that torch saved; None: the published one, which is fetched."""
        return cls(read_state(weights or fetch_published()))

    @classmethod
    def random(cls, seed: int) -> InceptionFeatures:
        """Random weights: distances between images are real, and compare with nothing published."""
        return cls(random_state(seed))

    def to(self, device: str) -> None:
        """As promised."""
        self.network.to(device)
        self._device = device

    def _read(self, images: ByteImages) -> Readings:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            features, logits = self.network(prepare(pixels))
        probabilities = logits.cpu().double().softmax(1).float()
        return Readings(features.cpu().numpy(), probabilities.numpy())


EXTRACTOR = InceptionFeatures


def fetch_published() -> Path:
    """The published file, where pytorch-fid keeps it. Raises FeatureError: offline, out of reach, or not the
    bytes whose SHA-256 is in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if path.is_file() and sha256_of(path).startswith(PUBLISHED):
        return path
    if constants.HF_HUB_OFFLINE:
        raise FeatureError(f"offline, and {path} is not there", WHERE)
    click.echo(f"fetching the Inception network's weights (91 MiB): {URL}", err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), PUBLISHED, progress=console.is_terminal())
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise FeatureError(f"{URL} cannot be fetched: {error}", WHERE) from error
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file. Raises FeatureError: no file, a damaged or unsafe one, or of another
    network.
    """
    if not path.is_file():
        raise FeatureError(f"there is no file {path}", WHERE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FeatureError(f"{path} cannot be read as a state dict: {text}", WHERE) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FeatureError(f"{path} is no state dict: names with tensors", WHERE)
    shapes = _shapes()
    missing = [key for key in shapes if key not in state and not key.endswith(COUNTER)]
    faults = [f"{len(missing)} keys are missing, such as {missing[0]}"] if missing else []
    for key, value in state.items():
        if key not in shapes:
            faults.append(f"{key} is unknown")
        elif tuple(value.shape) != shapes[key]:
            faults.append(f"{key} is {tuple(value.shape)} and not {shapes[key]}")
        elif not key.endswith(COUNTER) and not (value.is_floating_point() and value.isfinite().all()):
            faults.append(f"{key} does not hold finite numbers")
    if faults:
        raise FeatureError(
            f"{path} does not hold the FID Inception network: {'; '.join(map(str, faults[:3]))}", WHERE
        )
    if not sha256_of(path).startswith(PUBLISHED):
        logger.warning("%s is not the published file: its figures do not compare with published ones", path)
    return state


def random_state(seed: int) -> dict[str, Tensor]:
    """Weights that keep the size of activations, by their published names; each depends on seed and name."""
    return {name: _random_value(name, shape, seed) for name, shape in _shapes().items()}


def _random_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(shape)
    if name.endswith(COUNTER):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith(("bn.weight", "running_var")):
        values = np.exp(0.1 * values)
    elif name.endswith(("bias", "running_mean")):
        values = 0.1 * values
    else:
        values = values * (2 / np.prod(shape[1:])) ** 0.5  # keeps the second moment through a ReLU
    return torch.from_numpy(values.astype(np.float32))


def _shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in FidInception().state_dict().items()}
