"""Publishes a bundle on the Hub, with a model card that the Hub reads and a picture that the bundle drew."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

from ddexport.card import model_card, read_accuracy
from ddexport.hub.bundle import BESIDE
from ddexport.hub.errors import HubError, explained
from ddexport.hub.files import SCHEME, HubFile
from ddexport.recipe import recipe_of
from ddexport.runtime.bundle import FILE_NAME, Manifest, read_manifest, sha256_of
from ddexport.runtime.errors import BackendError
from ddexport.runtime.images import grid
from ddexport.runtime.pipeline import load
from ddexport.runtime.records import read_json
from ddexport.runtime.text import TRIAL_PROMPTS, trials

PICTURE, CARD = "sample.png", "README.md"
SHOWN = 8  # images in the picture
TAGS = ("onnx", "image-generation", "distilled-decoding", "arxiv:2412.17153")
# Which the Hub knows by name.
LICENCES = ("mit", "apache-2.0", "openrail", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")

logger = logging.getLogger(__name__)

Reports = dict[str, dict[str, Any]]  # by their files in the bundle


def push(bundle: Path, repository: str, private: bool) -> str:
    """Uploads what the manifest lists, the parity reports and a card in one commit, and returns its address.

    The repository is made if there is none. What lies in it stays, but for files of these names, and for
    reports of an earlier bundle.
    Raises BundleError for a bundle that is damaged; HubError for a repository that cannot be written, or that
    holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    manifest, reports = read_manifest(bundle), _reports(bundle)
    files = [FILE_NAME, *(info.file for info in manifest.files()), *reports]
    files += [file for file in BESIDE if (bundle / file).is_file()]
    content: dict[str, bytes | Path] = {file: bundle / file for file in files}
    if picture := _picture(bundle, manifest):
        content[PICTURE] = picture
    content[CARD] = card(bundle, manifest, repository, reports, bool(picture)).encode()
    api = HfApi(library_name="ddexport")
    with explained(HubFile(repository, FILE_NAME)):
        api.create_repo(repository, private=private, exist_ok=True)
        there = {*api.list_repo_files(repository)} - {".gitattributes"}
        if there and FILE_NAME not in there:
            raise HubError(
                f"{repository} holds no bundle but other files, such as {min(there)}",
                "Name another repository: this one's files and its card stay as they are.",
            )
        operations: list[Any] = [CommitOperationAdd(name, value) for name, value in content.items()]
        # Reports and picture of an earlier push would be of another bundle.
        stale = [file for file in there if file.startswith("parity/") or file == PICTURE]
        operations += [CommitOperationDelete(file) for file in stale if file not in content]
        message = f"ddexport push: {manifest.name} in {', '.join(manifest.precisions)}"
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def card(bundle: Path, manifest: Manifest, repository: str, reports: Reports, has_picture: bool) -> str:
    """README.md of the repository: a YAML header for the Hub, the picture, the figures that were measured."""
    from huggingface_hub import ModelCardData

    recipe = recipe_of(manifest)
    licence = recipe.licence.get("weights", "").lower()
    header = ModelCardData(
        license=licence if licence in LICENCES else "other",
        license_name=None if licence in LICENCES else re.sub("[^a-z0-9.]+", "-", licence) or None,
        library_name="ddexport",
        pipeline_tag="text-to-image" if manifest.text else "unconditional-image-generation",
        tags=[*TAGS, recipe.family.removesuffix("_dd")],
        base_model=list({file.repository: 0 for file in manifest.weights.files if file.repository}) or None,
    )
    title, *text = model_card(recipe, manifest, read_accuracy(bundle), f"{SCHEME}{repository}").splitlines()
    picture = ["", f"![{SHOWN} images of the bundle]({PICTURE})"] if has_picture else []
    measured = ["", "## Compared with PyTorch", "", *_measured(reports)]
    return "\n".join(["---", header.to_yaml(), "---", "", title, *picture, *text, *measured]) + "\n"


def _reports(bundle: Path) -> Reports:
    """The reports that `validate parity` and `validate fid` wrote for this very manifest."""
    digest = sha256_of(bundle / FILE_NAME)
    paths = sorted(path for kind in ("parity", "fid") for path in bundle.glob(f"parity/{kind}-*.json"))
    reports = {path.relative_to(bundle).as_posix(): read_json(path) for path in paths}
    return {file: report for file, report in reports.items() if report.get("manifest") == digest}


def _measured(reports: Reports) -> list[str]:
    """The verdict of each report, and the FID of the bundle in each number of steps."""
    lines = []
    for report in reports.values():
        lines.append(f"- {report['title'].splitlines()[0]}: {report['verdict']}")
        fids = [row for row in report["rows"] if row["name"] == "FID, bundle"]
        lines += [f"  - FID, {row['scope']}: {float(row['value']):.4g}" for row in fids]
    return lines or ["Neither `ddexport validate parity` nor `validate fid` was run on this bundle."]


def _picture(bundle: Path, manifest: Manifest) -> bytes | None:
    """A PNG; None of random weights, of texts without their encoder, and where no engine of this machine runs
    the bundle."""
    labels: list[int | str] = [manifest.classes * number // SHOWN for number in range(SHOWN)]
    stream = io.BytesIO()
    try:
        if manifest.weights.kind == "random" or (manifest.text and not manifest.text.tokenizer):
            return None
        with load(bundle, verify=False) as pipe, trials():
            examples = (manifest.recipe.get("condition") or {}).get("examples")
            labels = [*(examples or TRIAL_PROMPTS)] if manifest.text else labels
            grid([*pipe(labels).images], SHOWN).save(stream, "png")
    except BackendError as error:
        logger.warning("the card has no picture: %s", error.message)
        return None
    return stream.getvalue()
