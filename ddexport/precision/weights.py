"""The modules that a bundle was exported from, built again from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ddexport.bundle import WeightRequest, load_parts
from ddexport.graph.rewrites import left_out, rewrite
from ddexport.recipe import embedded_weights, recipe_of
from ddexport.runtime.bundle import Manifest, sha256_of
from ddexport.runtime.errors import DDError


class WeightsError(DDError):
    """Weights that are not those of the bundle."""


def parts_of_bundle(manifest: Manifest, files: Mapping[str, Path]) -> dict[str, nn.Module]:
    """Student and tokenizer, float32, connected and rewritten as for the export.

    Args:
        manifest: of the bundle.
        files: the checkpoints of a bundle that was made of such, by role.

    Raises:
        WeightsError: a file is not wanted, or not the one that the bundle was made from.
        MissingWeightsError: a file is needed and was not given.
    """
    recipe = recipe_of(manifest)
    origin = manifest.weights
    if origin.kind != "checkpoint" and files:
        paths = ", ".join(str(path) for path in files.values())
        raise WeightsError(f"bundle {manifest.name} has {origin.kind} weights, not those of {paths}",
                           "leave out --checkpoint and --vae")  # fmt: skip
    if origin.kind == "random":
        parts = load_parts(recipe, WeightRequest({}, random_seed=origin.seed))
    else:
        for source in origin.files:
            shipped = recipe.files[source.role]
            path = files.get(source.role) or (embedded_weights(shipped) if shipped.embedded else None)
            if path is not None and path.is_file() and sha256_of(path) != source.sha256:
                raise WeightsError(
                    f"{path} is not the {source.file} that bundle {manifest.name} was made from",
                    f"its SHA-256 begins with {source.sha256[:12]}: give that file, or export again",
                )
        copy = next((source.weights for source in origin.files if source.weights), "ema")
        parts = load_parts(recipe, WeightRequest(files, copy or "ema"))
    rewrite(parts, left_out(manifest.tools))
    return parts
