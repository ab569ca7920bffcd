"""The picture of `ddexport debug layers`: error and range, stage after stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddexport.precision.layers import Layer
from ddexport.runtime.errors import DDError

INK, OWN, RANGE, BAD = "#1f4e79", "#9dc3e6", "#b45f06", "#c82828"


def plot_layers(layers: Sequence[Layer], title: str, path: Path) -> None:
    """Writes a PNG: for student and decoder the relative error above, the half range used below.

    Raises:
        DDError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DDError("the plot needs matplotlib", 'pip install "ddexport[validate]"') from error
    parts = list(dict.fromkeys(layer.part for layer in layers))
    counts = [sum(layer.part == part for layer in layers) for part in parts]
    figure = Figure(figsize=(4 + 0.22 * len(layers), 6), layout="constrained")
    axes = figure.subplots(
        2, len(parts), squeeze=False, sharex="col", sharey="row",
        width_ratios=[max(count, 4) for count in counts], height_ratios=[3, 2],
    )  # fmt: skip
    for column, part in enumerate(parts):
        _draw([layer for layer in layers if layer.part == part], part, axes[0][column], axes[1][column])
    axes[0][0].set_ylabel("error relative to float32")
    axes[1][0].set_ylabel("half range used")
    errors = [value for layer in layers for value in (layer.relative, layer.own) if value > 0]
    axes[0][0].set_ylim(min(errors, default=1e-8) / 3, max(errors, default=1.0) * 10)
    axes[0][-1].legend(loc="upper right", fontsize=8)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DDError(f"{path} cannot be written: {error.strerror}", "name another file") from error


def _draw(layers: Sequence[Layer], part: str, top: Any, bottom: Any) -> None:
    places = range(len(layers))
    top.set_title(part, fontsize=10)
    top.set_yscale("log")
    # Zero, which a logarithmic axis has not, is no bar and no point.
    top.bar(places, [layer.own or math.nan for layer in layers], color=OWN, label="entered in this stage")
    top.plot(places, [layer.relative or math.nan for layer in layers], "o-", color=INK, markersize=4,
             label="after this stage")  # fmt: skip
    for place in (i for i in places if layers[i].infinite or not math.isfinite(layers[i].relative)):
        for axis in (top, bottom):
            axis.axvspan(place - 0.5, place + 0.5, color=BAD, alpha=0.25, label="not finite")
    bottom.set_yscale("log")
    bottom.bar(places, [layer.range_share or math.nan for layer in layers], color=RANGE)
    bottom.axhline(1.0, color=BAD, linewidth=1)
    bottom.set_ylim(1e-6, 4)
    for axis in (top, bottom):
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    short = [layer.layer.removeprefix("decoder.").replace("levels.", "") for layer in layers]
    bottom.set_xticks(list(places), short, rotation=90, fontsize=7)
