"""What `ddexport web` writes: a site, or one HTML file, that draws in the visitor's browser.

A site is `runtime/web/` as it is, and beside it bundles and a part of onnxruntime-web.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ddexport.runtime
from ddexport.runtime.bundle import FILE_NAME, FLOAT32, TEACHER, Manifest, read_manifest
from ddexport.runtime.errors import DDError, OutputError
from ddexport.runtime.files import atomic_write
from ddexport.staging import staged_directory

SITE = "site.json"
WEB = Path(ddexport.runtime.__file__).parent / "web"
PRECISIONS = (FLOAT32, "fp16", "int8")  # that browsers compute in
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# A build for WebAssembly alone and one for WebGPU, each with the binary that it asks for.
WASM_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
FILES = (*WASM_FILES, "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
SINGLE_BYTES = 64 << 20  # of the bundles in one HTML file: a browser holds it as a text, and unpacked


class SiteError(DDError):
    """A bundle that no page draws with, or a package that cannot be fetched."""


class Part(NamedTuple):
    """A bundle of a site: its directory, what it computes in, and its files."""

    root: Path
    manifest: Manifest
    precision: str
    files: list[str]


def parts_of(bundles: Sequence[Path], precision: str | None = None) -> list[Part]:
    """What a site needs of bundles, in a precision or in the first of each; every file is checked.

    Raises BundleError for a bundle that is damaged or lacks the precision, SiteError for one that no page
    draws with.
    """
    parts: dict[str, Part] = {}
    for root in bundles:
        manifest = read_manifest(root)
        name, chosen = manifest.name, precision or manifest.precisions[0]
        if manifest.text:
            raise SiteError(f"{name} draws from sentences, and a page from labels", "Use `ddexport serve`.")
        if chosen not in PRECISIONS:
            raise SiteError(f"no browser computes in {chosen}", f"Add --precision: {', '.join(PRECISIONS)}.")
        if name in parts or not re.fullmatch(r"\w[\w.-]*", name):
            what = "there is another bundle of this name" if name in parts else "it cannot be a folder's name"
            raise SiteError(f"no folder of the site can be called {name!r}: {what}", "Make a site of each.")
        manifest.graph("student", chosen)
        # As in the runtime: there is no int8 teacher.
        able = {graph.precision for graph in manifest.graphs if graph.role == TEACHER}
        teacher = next((one for one in (chosen, FLOAT32, *manifest.precisions) if one in able), None)
        graphs = [g for g in manifest.graphs if g.precision == (teacher if g.role == TEACHER else chosen)]
        infos = {manifest.labels, *(info for graph in graphs for info in graph.files)}
        infos |= {manifest.teacher.codebook} if manifest.teacher else set()
        files = [FILE_NAME, *sorted(info.file for info in infos)]
        files += ["README.md"] if (root / "README.md").is_file() else []
        parts[name] = Part(root, manifest, chosen, files)
    return [*parts.values()]


def write_site(parts: Sequence[Part], target: Path, replace: bool = False) -> None:
    """Makes the directory `target`. Raises SiteError, and OutputError where it cannot be written."""
    package = fetched()
    with staged_directory(target, replace, marker=SITE) as staging:
        for name, content in _contents(parts, package, FILES):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)


def write_page(parts: Sequence[Part], target: Path, replace: bool = False) -> None:
    """Makes the HTML file `target` with everything inside, for a browser that opens it from a disk.

    Raises SiteError for bundles that are too large, and OutputError where the file cannot be written.
    """
    if target.exists() and not (replace and target.is_file()):
        raise OutputError(f"{target} exists already", "use --force for a file, or another place with -o")
    size = sum((part.root / file).stat().st_size for part in parts for file in part.files)
    if size > SINGLE_BYTES:
        message = f"one file holds {SINGLE_BYTES >> 20} MiB of bundles at most, and these have {size >> 20}"
        raise SiteError(message, "Leave out --single-file, or take another precision or fewer bundles.")
    contents = dict(_contents(parts, fetched(), WASM_FILES))
    target.parent.mkdir(parents=True, exist_ok=True)
    page, style, script = (contents.pop(name).decode() for name in ("index.html", "style.css", "single.js"))
    packed = {name: base64.b64encode(gzip.compress(data, 6)).decode() for name, data in contents.items()}
    listing = json.dumps(packed).replace("<", "\\u003c")  # in the name of a file
    data = f'<script type="application/json" id="files">{listing}</script>'
    for old, new in (
        ("script-src 'self'", f"script-src 'self' '{_digest(script.encode(), 'sha256')}'"),
        ("style-src 'self'", f"style-src '{_digest(style.encode(), 'sha256')}'"),
        ("'self'", "blob:"),
        ('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>"),
        ('<script type="module" src="page.js"></script>', ""),
        ("</body>", f'{data}<script type="module">{script}</script></body>'),
    ):
        page = page.replace(old, new)
    with atomic_write(target, follow=True) as stream:
        stream.write(page.encode())


def fetched() -> Path:
    """The package onnxruntime-web: the user's copy, or what npm gets from the registry that the user has set.

    Only the SHA-512 here is trusted. Raises SiteError.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddexport"
    package = cache / f"{PACKAGE}-{VERSION}.tgz"
    if package.is_file() and _digest(package.read_bytes()) == SHA512:
        return package
    npm = shutil.which("npm") or shutil.which("npm", path=Path(sys.executable).parent)
    if npm is None:
        raise SiteError(f"npm is not installed, which fetches {PACKAGE}", 'pip install "ddexport[web]"')
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--loglevel=error"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        got = Path(folder) / package.name
        if not got.is_file():
            said = re.sub(r"\s+", " ", done.stderr.replace("npm error", ""))[:300].strip()
            said = said or f"it ended with {done.returncode}"
            hint = f"Where there is a network: `npm pack {PACKAGE}@{VERSION}`, and copy the file to {cache}."
            raise SiteError(f"npm could not fetch {PACKAGE} {VERSION}: {said}", hint)
        if _digest(got.read_bytes()) != SHA512:
            message = f"the SHA-512 of {PACKAGE} {VERSION} from npm's registry is not the one known here"
            raise SiteError(message, "Do not use that file; see `npm config get registry`.")
        got.replace(package)
    return package


def _contents(parts: Sequence[Part], package: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Every file of a site by its path there. names: of the package."""
    for path in filter(Path.is_file, WEB.rglob("*")):
        yield path.relative_to(WEB).as_posix(), path.read_bytes()
    with tarfile.open(package) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in names and (stream := archive.extractfile(member)):
                # Not every file server knows .mjs, and a browser wants to be told that it is JavaScript.
                yield f"onnxruntime/{name.replace('.mjs', '.js')}", stream.read()
    entries = []
    for root, manifest, precision, files in parts:
        url = f"bundles/{manifest.name}/"
        entries.append({"name": manifest.name, "title": manifest.title, "url": url, "precision": precision})
        for file in files:
            yield url + file, (root / file).read_bytes()
    yield SITE, json.dumps({"bundles": entries, "onnxruntime": VERSION}, indent=2).encode()


def _digest(content: bytes, name: str = "sha512") -> str:
    return f"{name}-{base64.b64encode(hashlib.new(name, content).digest()).decode()}"
