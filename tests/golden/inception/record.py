"""Records what pytorch-fid and torch-fidelity compute, for tests/validate/features/test_inception.py.

Run it from the repository in an environment of its own, which has torch, numpy and (without dependencies)
pytorch-fid 0.3.0, torch-fidelity 0.4.0 and torchvision: `python tests/golden/inception/record.py`. The
weights are this project's random ones for seed 7; the networks, the preparation of the images and the numbers
are theirs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

HERE = Path(__file__).parent
SEED = 7
SIZES = (32, 256, 400)  # enlarged, as FIDs of 256 x 256 models are, and made smaller


def images(size: int) -> np.ndarray:
    """One image (1, size, size, 3) uint8 of waves and noise; what is recorded of it holds for no other."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(7 * y), np.sin(40 * x * y)], -1)
    return np.clip(127.5 + 90 * waves + 25 * rng.standard_normal(waves.shape), 0, 255).astype(np.uint8)[None]


def their_networks(state: dict[str, torch.Tensor]):
    """The two published wrappers, given `state` in place of what they would download."""
    # torchvision's binary part fits one build of torch only; without it, its operators cannot be registered.
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
    import pytorch_fid.inception as pytorch_fid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pytorch_fid.load_state_dict_from_url = lambda *_, **__: state
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        fidelity = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    return pytorch_fid.InceptionV3().eval(), fidelity.eval()


def main() -> None:
    """Writes outputs.npz and keys.txt beside this file."""
    from ddexport.validate.features.inception import random_state

    state = random_state(SEED)
    first, second = their_networks(state)
    recorded: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for size in SIZES:
            pixels = torch.from_numpy(images(size)).permute(0, 3, 1, 2)
            recorded[f"pytorch_fid_{size}"] = first(pixels.float() / 255)[0][:, :, 0, 0].numpy()
            features, logits = second(pixels)
            recorded[f"torch_fidelity_{size}"] = features.numpy()
            recorded[f"torch_fidelity_logits_{size}"] = logits.numpy()
    np.savez_compressed(HERE / "outputs.npz", **recorded)
    shapes = {name: list(value.shape) for name, value in second.state_dict().items()}
    (HERE / "keys.txt").write_text("".join(f"{name} {shape}\n" for name, shape in sorted(shapes.items())))


if __name__ == "__main__":
    main()
