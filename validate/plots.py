"""The plots and contact sheets of `validate`: matplotlib's Figure API (pyplot keeps global state) or PIL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddexport.runtime.errors import DDError
from ddexport.validate.metrics.tokens import margins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ddexport.validate.metrics._base import Comparison, FloatArray, ImagePair
    from ddexport.validate.report import Report

KINDS = {  # of the methods of `validate distilled`
    "teacher": "#3b4252",
    "student": "#1f6fb4",
    "student and teacher": "#2e8b57",
    "baseline": "#c8783c",
}
PARTS = {"student": "#0072b2", "teacher": "#e69f00", "decoder": "#56b4e9", "the rest": "#999999"}  # of a time
BLUE, ORANGE, RED, INK, GREY, PALE = "#2f6fb5", "#d9822b", "#c0303b", "#1d2129", "#667085", "#e3e5ea"
DPI = 200
SHOWN_IMAGES, SHOWN_SAMPLES, COLUMNS = 4, 10, 5
TILE, GAP, HEAD, ZOOM = 192, 12, 22, 2  # pixels of a contact sheet
DECADES, BINS = (-9, 3), 60  # of the axis of margins

Pixels = npt.NDArray[np.uint8]


def of_parity(report: Report, comparison: Comparison, names: Sequence[str]) -> dict[str, Image.Image]:
    """The pictures of a parity report by title: samples of every schedule, the worst images, the margins.

    names: of the classes, or of the texts.
    """
    labels = report.settings["labels"]
    chosen = np.linspace(0, len(labels) - 1, min(SHOWN_SAMPLES, len(labels))).round().astype(int)
    captions = [names[labels[i]] for i in chosen]
    pictures = {}
    for pair in (pair for pair in comparison.pictures() if pair.pixels):
        title = f"Samples, {pair.scope.partition(',')[0]}"
        pictures[title] = samples([_to_uint8(pair.got[i]) for i in chosen], captions)
    if comparison.students:
        margins_picture = token_margins(comparison, report.settings["limits"]["token_margin"])
        pictures["Logit margin between the first and the second choice of a token"] = margins_picture
    pictures["The images that differ most, and the difference amplified"] = worst_images(comparison)
    return pictures


def of_fid(report: Report) -> dict[str, Image.Image]:
    """The pictures of a report of image quality by title; {} where no FID was measured."""
    known = any(row.name == "FID, bundle" for row in report.rows)
    return {"FID against the number of steps, with 95 % intervals": against_steps(report)} if known else {}


def samples(images: Sequence[Pixels] | Pixels, captions: Sequence[str]) -> Image.Image:
    """Images (H, W, 3) uint8 with their captions, `COLUMNS` side by side."""
    tiles = list(zip(images, captions, strict=True))
    return _sheet([("", tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)])


def worst_images(comparison: Comparison) -> Image.Image:
    """The images that differ most: bundle, PyTorch and their amplified difference, one row each."""
    rows = []
    for pair, index, size in ranked(comparison.pictures()):
        factor = amplification(size)
        difference = np.abs(pair.got[index].astype(np.float64) - pair.expected[index]) * factor
        sides = [(pair.got[index], "bundle"), (pair.expected[index], "PyTorch")]
        sides.append((difference, f"difference × {factor:,.0f}"))
        title = f"up to {size:.2g} of 1: {pair.scope}, {pair.places[index]}"
        rows.append((title, [(_to_uint8(image), caption) for image, caption in sides]))
    return _sheet(rows)


def token_margins(comparison: Comparison, limit: float) -> Image.Image:
    """How clear the reference's choices were: a histogram of its top-2 logit margins on a logarithmic axis.

    Differing tokens are marked in red below the axis. What lies left of `limit` can be excused; the largest
    logit error shows how far rounding really reaches.
    """
    pairs = [pair for pair in comparison.students if not pair.itself]
    values = np.concatenate([margins(pair.expected.logits)[pair.decided()] for pair in pairs])
    faults = np.concatenate([margins(pair.expected.logits)[pair.differing()] for pair in pairs])
    errors = [np.abs(pair.got.logits.astype(np.float64) - pair.expected.logits).max() for pair in pairs]
    error = float(np.max(errors))  # NaN where one is
    low, high = (10.0**power for power in DECADES)
    drawn = [np.clip(np.nan_to_num(part, nan=low), low, high) for part in (values, faults)]

    figure, axes = _axes()
    axes.hist(drawn[0], bins=np.logspace(*DECADES, BINS + 1), color=BLUE, alpha=0.85, rwidth=0.9)
    axes.axvline(limit, color=ORANGE, lw=1.6, ls="--", label=f"limit {limit:.2g}")
    if math.isfinite(error) and error > 0:
        axes.axvline(error, color=GREY, lw=1.6, label=f"largest logit error {error:.2g}")
    else:
        axes.plot([], [], color=GREY, lw=1.6, label=f"largest logit error {error:g}")
    if len(faults):
        base = np.full(len(faults), -0.035)
        axes.plot(
            drawn[1], base, "^", color=RED, ms=6, transform=axes.get_xaxis_transform(), clip_on=False,
            label=f"{len(faults):,} tokens differ",
        )  # fmt: skip
    shown = [*drawn[0], *drawn[1], max(limit, low), max(error, low) if math.isfinite(error) else limit]
    axes.set_xscale("log")
    ends = math.log10(min(shown)) - 0.05, math.log10(max(shown)) + 0.05  # no line lies on the frame
    axes.set_xlim(10 ** math.floor(ends[0]), 10 ** math.ceil(ends[1]))
    axes.set_ylabel(f"{len(values):,} tokens")
    axes.tick_params(axis="x", pad=9)  # below the marks
    axes.set_xlabel("largest logit less the second")
    return _image(figure, axes)


def against_steps(report: Report) -> Image.Image:
    """FID of bundle and PyTorch against the number of steps, with 95 % whiskers; a report of kind fid."""
    figure, axes = _axes()
    rows = [row for row in report.rows if math.isfinite(row.value)]
    scopes = list(dict.fromkeys(row.scope for row in rows if row.name == "FID, bundle"))
    for side, colour, shift in (("bundle", BLUE, -0.06), ("PyTorch", ORANGE, 0.06)):
        points = {row.scope: row for row in rows if row.name == f"FID, {side}" and row.scope in scopes}
        if not points:
            continue
        places = [scopes.index(scope) + shift for scope in points]
        values = [row.value for row in points.values()]
        ends = [(row.value if row.low is None else row.low, row.value if row.high is None else row.high)
                for row in points.values()]  # fmt: skip
        whiskers = np.abs(np.array(ends).T - values)
        axes.errorbar(places, values, whiskers, fmt="o", ms=7, capsize=4, lw=1.4, color=colour, label=side)
        for place, value in zip(places, values, strict=True):
            text, align = ((-9, -3), "right") if shift < 0 else ((9, -3), "left")
            axes.annotate(
                f"{value:.3g}", (place, value), text, textcoords="offset points", ha=align, color=colour
            )
    axes.set_xticks(range(len(scopes)), scopes)
    axes.set_xlim(-0.6, len(scopes) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("FID (lower is better)")
    return _image(figure, axes)


def frechet_against_time(
    rows: Sequence[Mapping[str, Any]], title: str, batches: Sequence[int]
) -> Image.Image:
    """Frechet distance against the time of an image, a panel for each batch size, both axes logarithmic.

    rows: of `validate distilled`. Each method that was timed is a point, with its number of passes and a bar
    for the range over the seeds.
    """
    figure = _figure(5.6 * len(batches), 4.6, dpi=110)
    figure.suptitle(f"{title}: quality against time", fontsize=12)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        panel.set(xscale="log", yscale="log", xlabel=f"ms per image, batch {batch}")
        for kind, colour in KINDS.items():
            own = [row for row in rows if row["kind"] == kind]
            if not own:
                continue
            times, distances = ([row[key] for row in own] for key in (f"ms_{batch}", "frechet"))
            bars = [row.get("frechet_half_range", 0.0) for row in own]
            panel.errorbar(times, distances, bars, fmt="o", color=colour, capsize=3, lw=0.8, label=kind)
            for row, point in zip(own, zip(times, distances, strict=True), strict=True):
                place = {"xytext": (6, 6), "textcoords": "offset points"}
                panel.annotate(str(row["passes"]), point, color=colour, fontsize=10, **place)
        panel.margins(x=0.1, y=0.12)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        panel.tick_params(which="both", labelsize=9)
        panel.grid(True, which="both", color="#e4e4e8", lw=0.6)
        _without_frame(panel)
    panels[0].set_ylabel("Frechet distance (lower is better)")
    panels[-1].legend(title="passes of a network", fontsize=9, title_fontsize=9, frameon=False)
    return _drawn(figure)


def bench_bars(rows: Sequence[Mapping[str, Any]], title: str) -> Image.Image:
    """Stacked bars of student, teacher, decoder and the rest, a panel a model and batch; 1000 pixels wide.

    rows: of `ddexport bench`; those that were not timed are left out.
    """
    timed = [row for row in rows if row["total_ms"] is not None]
    grouped = groupby(timed, key=lambda row: f"{row['model']}, batch {row['batch']}")
    groups = [(name, list(group)) for name, group in grouped]
    heights = [len(group) + 1 for _, group in groups]
    figure = _figure(10, 1.3 + sum(0.34 * height + 0.4 for height in heights), dpi=100)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, group) in zip(panels, groups, strict=True):
        _bench_panel(panel, group)
        panel.set_title(name, loc="left", fontsize=10)
    legends = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels]
    shown = {name: bars for legend in legends for bars, name in legend}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, frameon=False)
    return _drawn(figure)


def panels_of_images(panels: Mapping[str, FloatArray], columns: int) -> Image.Image:
    """Sets of images (N, 3, H, W) in [0, 1] side by side under their names, each in rows of `columns`."""
    count, channels, height, width = next(iter(panels.values())).shape
    rows = count // columns
    size = (columns * width * ZOOM, rows * height * ZOOM)
    sheet = Image.new("RGB", (len(panels) * (size[0] + GAP) + GAP, HEAD + size[1] + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (name, images) in enumerate(panels.items()):
        left = GAP + number * (size[0] + GAP)
        tiles = images.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
        pixels = (tiles.reshape(rows * height, columns * width, channels) * 255).round().astype(np.uint8)
        pen.text((left, 3), name, "black", font=font)
        sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (left, HEAD))
    return sheet


def sheet_of_sentences(
    rows: Sequence[tuple[str, Sequence[FloatArray]]], titles: Sequence[str], remark: str
) -> Image.Image:
    """Sentences, each beside sets of images (n, 3, H, W) in [0, 1] under their titles."""
    count, _, height, width = rows[0][1][0].shape
    font, wide, high = _font(15), count * width * ZOOM, height * ZOOM
    lines = (remark, *(sentence for sentence, _ in rows))
    text = round(max(map(font.getlength, lines))) + 2 * GAP
    size = (text + len(titles) * (wide + GAP), 2 * HEAD + len(rows) * (high + GAP // 2))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((text + column * (wide + GAP), 3), title, INK, font=font)
    for number, (sentence, sets) in enumerate(rows):
        top = HEAD + GAP // 2 + number * (high + GAP // 2)
        pen.text((text - GAP, top + high // 2), sentence, INK, font=font, anchor="rm")
        for column, images in enumerate(sets):
            pixels = _to_uint8(images.transpose(1, 2, 0, 3).reshape(3, height, count * width))
            tiles = Image.fromarray(pixels).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(tiles, (text + column * (wide + GAP), top))
    pen.text((text - GAP, size[1] - HEAD), remark, GREY, font=font, anchor="ra")
    return sheet


def ranked(pairs: Sequence[ImagePair]) -> list[tuple[ImagePair, int, float]]:
    """The images with the largest difference, each once, where it is worst: pair, index, difference."""
    worst: dict[int, tuple[ImagePair, int, float]] = {}
    for pair in pairs:
        sizes = np.abs(pair.got.astype(np.float64) - pair.expected).max(axis=(1, 2, 3))
        for i, size in enumerate(np.nan_to_num(sizes, nan=np.inf)):
            if i not in worst or size > worst[i][2]:
                worst[i] = (pair, i, float(size))
    return sorted(worst.values(), key=lambda entry: -entry[2])[:SHOWN_IMAGES]


def amplification(size: float) -> float:
    """The factor, of one digit, that makes a difference of `size` nearly white and keeps it below one."""
    if not math.isfinite(size) or size <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(-math.log10(size))
    return float(max(math.floor(1.0 / (size * power)) * power, 1.0))


def _to_uint8(image: FloatArray | npt.NDArray[np.float64]) -> Pixels:
    """(3, H, W) in [0, 1] -> (H, W, 3); what is not finite is white."""
    values = np.rint(np.clip(np.nan_to_num(image, nan=1.0), 0.0, 1.0) * 255.0)
    return np.asarray(values.astype(np.uint8).transpose(1, 2, 0))


def _sheet(rows: Sequence[tuple[str, Sequence[tuple[Pixels, str]]]]) -> Image.Image:
    """Rows of tiles, each tile above its caption, each row below its title if it has one."""
    width = max(len(tiles) for _, tiles in rows) * (TILE + GAP) + GAP
    font = _font(width // 40)  # the same on the page, where every sheet is as wide as a column
    line = width // 40 + GAP
    height = GAP + sum(TILE + line * (2 if title else 1) + GAP for title, _ in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for title, tiles in rows:
        if title:
            draw.text((GAP, top), _fitted(title, font, width - 2 * GAP), fill=INK, font=font)
            top += line
        for column, (pixels, caption) in enumerate(tiles):
            left = GAP + column * (TILE + GAP)
            sheet.paste(_tile(pixels), (left, top))
            place = (left + TILE // 2, top + TILE + 4)
            draw.text(place, _fitted(caption, font, TILE), fill=GREY, font=font, anchor="ma")
        top += TILE + line + GAP
    return sheet


def _tile(pixels: Pixels) -> Image.Image:
    """(H, W, 3) uint8, scaled to fit a tile."""
    picture = Image.fromarray(pixels)
    scale = TILE / max(picture.size)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), method)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """That of the plots: Pillow's own lacks most of Unicode."""
    import matplotlib as mpl

    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text as fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _bench_panel(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a row, with its time and ratio; a wrong one says so."""
    several = len({row["threads"] for row in rows}) > 1
    names, texts = [], []
    for row in rows:
        threads = f", {row['threads']} thr." if several else ""
        names.append(f"{row['backend']} {row['precision']}, steps {row['steps']}{threads}")
        ratio = "" if row["speedup"] is None else f"  {row['speedup']:.2f}x"
        digits = ".3g" if row["total_ms"] < 1000 else ".0f"
        texts.append(f"{row['total_ms']:{digits}} ms{ratio}{'  WRONG' if row['passed'] is False else ''}")
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        # Medians of the parts need not sum to the median of the whole.
        widths = [
            max(row["total_ms"] - start, 0.0) if part == "the rest" else row[f"{part}_ms"] or 0.0
            for row, start in zip(rows, left, strict=True)
        ]
        if any(widths):
            panel.barh(range(len(rows)), widths, left=left, color=colour, height=0.7, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (end, text) in enumerate(zip(left, texts, strict=True)):
        colour = RED if text.endswith("WRONG") else "black"
        panel.text(end + 0.01 * max(left), place, text, va="center", fontsize=8.5, color=colour)
    panel.set_yticks(range(len(rows)), names, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, max(left) * 1.35)
    panel.set_xlabel("milliseconds per batch, median", fontsize=9)
    panel.grid(axis="x", alpha=0.3)
    _without_frame(panel)


def _figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure; width, height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DDError("the plot needs matplotlib", 'pip install "ddexport[validate]"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _axes() -> tuple[Figure, Any]:
    """An empty plot in the project's look."""
    figure = _figure(6.4, 3.6, DPI)
    axes = figure.subplots()
    axes.grid(axis="y", color=PALE, lw=0.7)
    _without_frame(axes)
    return figure, axes


def _without_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _image(figure: Figure, axes: Any) -> Image.Image:
    """The finished plot, with its legend above the axes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False, borderaxespad=0)
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
