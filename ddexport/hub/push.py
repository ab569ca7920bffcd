"""Publishes a bundle on the Hub, with a model card that the Hub reads and a picture that the bundle drew."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.card import ACCURACY_FILE, model_card, read_accuracy
from ddexport.hub.errors import HubError, explained
from ddexport.hub.files import SCHEME, HubFile
from ddexport.recipe import Recipe, recipe_of
from ddexport.runtime.bundle import FILE_NAME, Manifest, read_manifest, sha256_of
from ddexport.runtime.check import FILE as GOLDEN
from ddexport.runtime.records import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PICTURE, CARD = "sample.png", "README.md"
SHOWN = 8
REPORTS = ("parity/parity-*.json", "parity/fid-*.json")  # of `validate parity` and `validate fid`
TAGS = ("onnx", "image-generation", "distilled-decoding", "arxiv:2412.17153")
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}  # as recipes name them, and the Hub


def push(bundle: Path, repository: str, private: bool = False) -> str:
    """Uploads what the manifest lists, the parity reports and a card in one commit, and returns its address.

    The repository is made if there is none. What lies in it stays, but for files of these names.
    Raises BundleError for a bundle that is damaged; HubError for a repository that cannot be written, or that
    holds something else.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    manifest = read_manifest(bundle)
    reports = list(_reports(bundle))
    files = [FILE_NAME, *(info.file for info in manifest.files())]
    files += [name for name in (ACCURACY_FILE, GOLDEN) if (bundle / name).is_file()]
    files += [str(path.relative_to(bundle)) for path, _ in reports]
    content: dict[str, bytes | str] = {file: str(bundle / file) for file in files}
    if manifest.weights.kind != "random":
        content[PICTURE] = _picture(bundle, manifest)
    content[CARD] = card(bundle, manifest, repository, [report for _, report in reports]).encode()
    api = HfApi(library_name="ddexport")
    with explained(HubFile(repository, FILE_NAME)):
        api.create_repo(repository, private=private, exist_ok=True)
        _refuse_other_content(api, repository)
        operations = [CommitOperationAdd(name, value) for name, value in content.items()]
        message = f"ddexport push: {manifest.name} in {', '.join(manifest.precisions)}"
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def card(bundle: Path, manifest: Manifest, repository: str, reports: list[dict[str, Any]]) -> str:
    """README.md of the repository: a YAML header for the Hub, the picture, the figures that were measured."""
    from huggingface_hub import ModelCardData

    recipe = recipe_of(manifest)
    weights = str(recipe.licence.get("weights", ""))
    known = LICENCES.get(weights)
    header = ModelCardData(
        license=known or "other",
        license_name=None if known or not weights else weights.lower(),
        library_name="ddexport",
        pipeline_tag="unconditional-image-generation",
        tags=[*TAGS, recipe.family.removesuffix("_dd")],
        base_model=list(dict.fromkeys(s.repository for s in manifest.weights.files if s.repository)) or None,
        model_name=manifest.name,
        eval_results=_results(manifest, recipe, reports) or None,
    )
    title, *text = model_card(recipe, manifest, read_accuracy(bundle), f"{SCHEME}{repository}").splitlines()
    picture = f"![{SHOWN} images of the bundle]({PICTURE})"
    shown = ["", picture] if manifest.weights.kind != "random" else []
    return "\n".join(["---", header.to_yaml(), "---", "", title, *shown, *text, *_measured(reports)]) + "\n"


def _reports(bundle: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The reports that `validate` wrote for this very manifest."""
    digest = sha256_of(bundle / FILE_NAME)
    for path in sorted(path for pattern in REPORTS for path in bundle.glob(pattern)):
        report = read_json(path)
        if isinstance(report, dict) and report.get("manifest") == digest:
            yield path, report


def _measured(reports: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {report['title'].splitlines()[0]}: {report['verdict']}" for report in reports]
    none = ["Neither `ddexport validate parity` nor `validate fid` was run on this bundle."]
    return ["", "## Compared with PyTorch", "", *(lines or none)]


def _results(manifest: Manifest, recipe: Recipe, reports: list[dict[str, Any]]) -> list[Any]:
    """The bundle's FID in each number of steps, for the card's header."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=recipe.labels if isinstance(recipe.labels, str) else manifest.name,
            dataset_name=f"{recipe.title}, {report['images']:,} images",
            metric_type="fid",
            metric_name=f"FID ({report['settings']['features']}), {row['scope']}, {report['precision']}",
            metric_value=row["value"],
        )
        for report in reports
        if report["kind"] == "fid"
        for row in report["rows"]
        if row["name"] == "FID, bundle"
    ]


def _picture(bundle: Path, manifest: Manifest) -> bytes:
    from ddexport.runtime.images import grid, to_pil
    from ddexport.runtime.pipeline import load

    labels = [manifest.classes * number // SHOWN for number in range(SHOWN)]
    with load(bundle, verify=False) as pipe:
        images = pipe(labels, output="numpy").images
    stream = io.BytesIO()
    grid(to_pil(np.asarray(images)), SHOWN).save(stream, "png")
    return stream.getvalue()


def _refuse_other_content(api: HfApi, repository: str) -> None:
    files = {*api.list_repo_files(repository)} - {".gitattributes"}
    if files and FILE_NAME not in files:
        raise HubError(
            f"{repository} holds no bundle but other files, such as {min(files)}",
            "Name another repository: this one's files and its card stay as they are.",
        )
