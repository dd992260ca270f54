# SPDX-License-Identifier: Apache-2.0
"""Every figure that the package draws, with object-oriented matplotlib: it leaves pyplot and a notebook's backend alone."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import new_file
from .processing.image_processing_agevlm import to_rgb
from .processing.rows import mask_from_rle, message_text

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

    LogHistory = Sequence[Mapping[str, Any]]

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
"""Colors that people with color vision deficiency can distinguish (Okabe and Ito)."""

HISTOGRAM_BINS = 30
"""Bins of the histograms of similarities."""

ATTENTION_SCALE = (0.1, 100.0)
"""The ends of the color scale of attention, in multiples of the attention of a cell if all were spread evenly over the image."""

_BAR_HEIGHT = 0.6  # inches, of the color bar with its numbers and its unit

CURVES = ("lm_loss", "guidance_loss", "pointing_accuracy", "attention_iou")
"""The curves of a training run, by the names that `AgeVlmTrainer` logs."""


def _save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure, which appears when it is whole."""
    with new_file(path) as partial:
        figure.savefig(partial)


def new_figure(width: float, height: float, **kwargs: Any) -> Figure:
    """An empty figure, its size in inches; `savefig` writes it.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; to draw figures: pip install 'agevlm[eval]'") from error
    return Figure(figsize=(width, height), **{"layout": "constrained", "dpi": 110, **kwargs})


def choose_colors(names: Iterable[str], reference: str | None = None) -> dict[str, str]:
    """A color for each name, the same whenever the names are; black for the reference."""
    colors = dict(zip((name for name in names if name != reference), itertools.cycle(COLORS), strict=False))
    return colors if reference is None else {**colors, reference: "black"}


# --- images ---


def draw_masks(dataset: Dataset, path: str | os.PathLike, rows: int = 6) -> None:
    """Write a PNG of some rows, evenly spread: an image, its masks in colors, and its phrases with their scores.

    Args:
        dataset: with masks; rows without any are left out.
        path: of the PNG.
        rows: the largest number of rows to draw.

    Raises:
        ValueError: if no row has a mask.
        ImportError: if matplotlib is not installed.
    """
    grounding = dataset.select_columns("grounding")
    masked = [i for i, row in enumerate(grounding) if any(e["mask"] for e in row["grounding"] or [])]
    if not masked:
        raise ValueError("no row has a mask, so there is nothing to draw")
    chosen = [masked[i] for i in np.linspace(0, len(masked) - 1, min(rows, len(masked))).round().astype(int)]
    columns = min(3, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = new_figure(4.6 * columns, 5 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, chosen, strict=False):
        row = dataset[index]
        shown = next(entry["image"] for entry in row["grounding"] if entry["mask"])
        phrases = []
        for entry in (entry for entry in row["grounding"] if entry["image"] == shown):
            phrase = message_text(row["messages"][entry["message"]])[entry["start"] : entry["end"]]
            score = "" if entry["score"] is None else f"  {entry['score']:.2f}"
            mask = mask_from_rle(entry["mask"]) if entry["mask"] else None
            phrases.append((f"{phrase}{score}{'' if entry['mask'] else '  (no mask)'}", mask))
        axis.set_title(f"row {index}", fontsize=10, loc="left")
        _show_masks(axis, row["images"][shown], phrases)
    _save(figure, path)


def _show_masks(axis: Any, image: Image.Image, phrases: Sequence[tuple[str, np.ndarray | None]]) -> None:
    """An image with the mask of each phrase, bool `(height, width)` or None, and a legend of the phrases."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    image = to_rgb(image)
    image.thumbnail((640, 640))
    axis.imshow(image)
    legend = []
    colors = itertools.cycle(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    for text, mask in phrases:
        label = textwrap.fill(text, 48).replace("$", r"\$")
        if mask is None:
            legend.append(Patch(facecolor="none", edgecolor="gray", label=label))
            continue
        color = next(colors)
        legend.append(Patch(color=color, label=label))
        small = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        axis.imshow(np.where(small[..., None], [*color, 0.45], 0.0))
        if small.any() and not small.all():
            axis.contour(small, [0.5], colors=[color], linewidths=1.5)
    if (more := len(legend) - 8) > 0:
        legend[8:] = [Patch(facecolor="none", edgecolor="none", label=f"and {more} more")]
    axis.legend(
        handles=legend, loc="upper left", bbox_to_anchor=(0, -0.01), frameon=False, fontsize=10, borderaxespad=0
    )


def draw_heatmaps(
    image: Image.Image,
    maps: np.ndarray,
    titles: Sequence[str],
    path: str | os.PathLike,
    caption: str | None = None,
    *,
    labels: Sequence[str] = ("image",),
    cell: tuple[float, float] | None = None,
    sink: np.ndarray | None = None,
    rest: str = "sink",
) -> None:
    """Writes a PNG with the image, and the image under each map `(n, rows, columns)`, side by side.

    A color means the same in every figure, whatever the image, the grid and the other maps: the attention on a cell, in
    multiples of what it were if all attention was spread evenly over the map's cells. The scale is logarithmic
    ([`ATTENTION_SCALE`]). So a phrase that attends to nothing in the image is dark. The strongest cell of other maps is
    framed. The numbers above are the attention on the strongest cell and on the sink.

    Args:
        maps: the share of the attention that is on each cell; or `(phrases, n, rows, columns)`, for a row of the figure each.
        path: of the PNG.
        titles: of the `n` columns.
        caption: above the figure.
        labels: the title of the image in each row.
        cell: width and height of a map's cell in pixels of the image; by default the map covers the image exactly.
        sink: the share of the attention that is on the sink, `(n,)` or `(phrases, n)`; None for a model without a sink.
        rest: what that share is called.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    maps = maps if maps.ndim == 4 else maps[None]
    sinks = [[None] * maps.shape[1]] * len(maps) if sink is None else np.reshape(sink, maps.shape[:2]).tolist()
    image = to_rgb(image)
    count, columns = len(maps), maps.shape[1] + 1
    # In inches: panels as large as a width of 15 and a height of 18 allow, within what can be read and is worth looking at.
    side = min(2.6, max(1.4, min(15 / columns, 18 / count)))
    width = max(1.25, side * min(1, image.width / image.height))  # at least that of the title
    height = side * min(1, image.height / image.width)
    letters = int(13 * width)  # that fit into an inch, by the width
    labels = [textwrap.fill(textwrap.shorten(label, 3 * letters), letters) for label in labels]
    lines = [line for text in (caption or "").splitlines() for line in textwrap.wrap(text, columns * letters)]
    heights = [height + 0.15 * (max(label.count("\n"), sink is not None) + 1) + 0.15 for label in labels]
    total = sum(heights) + 0.15 + _BAR_HEIGHT + (0.18 * len(lines) + 0.1) * bool(lines)
    figure = new_figure(columns * width, total)
    panels_place = (0, _BAR_HEIGHT / total, 1, 1 - _BAR_HEIGHT / total)
    figure.get_layout_engine().set(h_pad=0.06, rect=panels_place)  # type: ignore[call-arg]
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    cell = cell or (image.width / maps.shape[3], image.height / maps.shape[2])
    extent = (0, cell[0] * maps.shape[3], cell[1] * maps.shape[2], 0)
    gray = image.convert("L")
    plain: dict[str, Any] = {"parse_math": False, "fontsize": 9}  # a "$" is no mathematics
    panels = figure.subplots(count, columns, squeeze=False)
    colors: Any = {"norm": LogNorm(*ATTENTION_SCALE), "cmap": "inferno"}
    for number, (axes, label, row) in enumerate(zip(panels, labels, maps, strict=True)):
        axes[0].imshow(image)
        axes[0].set_title(label, **plain)
        for axis, attention, title, on_sink in zip(axes[1:], row, titles, sinks[number], strict=True):
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
            relative = np.clip(attention * attention.size, *ATTENTION_SCALE)
            axis.imshow(relative, alpha=0.6, interpolation="bilinear", extent=extent, **colors)
            y, x = np.unravel_index(attention.argmax(), attention.shape)
            frame = Rectangle((x * cell[0], y * cell[1]), *cell, fill=False, edgecolor="cyan", linewidth=1.2)
            if relative.max() > ATTENTION_SCALE[0]:
                axis.add_patch(frame)
            texts = [title] * (number == 0) + [f"max {attention.max():.2f}"]
            if on_sink is not None:
                texts.append(f"{rest} {on_sink:.2f}")
            axis.set_title("\n".join(texts), **plain)
        for axis in axes:
            axis.set(xlim=(0, image.width), ylim=(image.height, 0))
            axis.set_axis_off()
    # Not of the panels, whose colors let the image through.
    bar_width = min(0.9, 6 / (columns * width))
    place = figure.add_axes((0.5 - bar_width / 2, 0.42 / total, bar_width, 0.09 / total))
    bar = figure.colorbar(ScalarMappable(**colors), place, orientation="horizontal", extend="both", extendfrac=0.03)
    low, high = (round(math.log10(end)) for end in ATTENTION_SCALE)
    ticks = [10.0**power for power in range(low, high + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    unit = textwrap.wrap(
        "attention on a cell, in multiples of an even spread over the image", int(15 * columns * width)
    )
    bar.set_label("\n".join(unit), fontsize=8)
    if lines:
        figure.suptitle("\n".join(lines), parse_math=False, fontsize=10)
    _save(figure, path)


def draw_grounding(
    image: Image.Image, phrases: Sequence[Mapping[str, Any]], path: str | os.PathLike, caption: str | None = None
) -> None:
    """Writes a PNG: an image with the point and the box of each phrase, and a legend of the phrases with their confidence.

    Args:
        phrases: of each its `text`, `source`, `point`, `box`, `confidence` and `there`, as in
            [`~agevlm.inference.grounding.GroundedPhrase`]. What is not there is named in the legend only.
        path: of the PNG.
        caption: above the image.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    lines = [line for text in (caption or "").splitlines() for line in textwrap.wrap(text, 60)]
    side = 4.6 / max(image.size)
    figure = new_figure(4.8, side * image.height + 0.22 * (len(lines) + max(1, len(phrases))) + 0.3)
    from matplotlib import patheffects
    from matplotlib.patches import Patch, Rectangle

    axis = figure.subplots()
    axis.imshow(to_rgb(image))
    axis.set_axis_off()
    outline: list = [patheffects.withStroke(linewidth=3.5, foreground="white")]
    legend = []
    for phrase, color in zip(phrases, itertools.cycle(COLORS[:-1]), strict=False):
        shown = phrase["point"] is not None and phrase["there"] is not False
        state = {True: ": there", False: ": not there", None: ""}[phrase["there"]]
        confidence = "" if phrase["confidence"] is None else f", confidence {phrase['confidence']:.2f}"
        label = f"{textwrap.shorten(phrase['text'], 40)} ({phrase['source']}){state}{confidence}".replace("$", r"\$")
        legend.append(Patch(facecolor="none", edgecolor=color if shown else "none", linewidth=1.8, label=label))
        if shown:
            left, top, right, bottom = phrase["box"]
            box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.8)
            axis.add_patch(box).set_path_effects(outline)
            axis.plot(*phrase["point"], "o", color=color, markersize=7, markeredgecolor="white")
    axis.set(xlim=(0, image.width), ylim=(image.height, 0))
    if lines:
        figure.suptitle("\n".join(lines), parse_math=False, fontsize=10)
    if legend:
        figure.legend(handles=legend, loc="outside lower left", frameon=False, fontsize=9)
    _save(figure, path)


def color_attention(attention: np.ndarray, zoom: int = 8) -> Image.Image:
    """A map `(rows, columns)` in the colors of [`draw_heatmaps`], each cell `zoom` pixels wide and high, RGB.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
    except ImportError as error:
        raise ImportError(f"{error}; to draw figures: pip install 'agevlm[eval]'") from error
    relative = Image.fromarray(np.clip(attention * attention.size, *ATTENTION_SCALE).astype(np.float32))
    rows, columns = attention.shape
    smooth = np.asarray(relative.resize((columns * zoom, rows * zoom), Image.Resampling.BILINEAR))
    colors = colormaps["inferno"](LogNorm(*ATTENTION_SCALE)(smooth), bytes=True)
    return Image.fromarray(np.ascontiguousarray(colors[..., :3]))


# --- numbers ---


def draw_training(
    logs: LogHistory | Mapping[str, Sequence[LogHistory]],
    path: str | os.PathLike,
    stage_ends: Sequence[int] = (),
    *,
    names: Sequence[str] = CURVES,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG of training curves, a panel for each name that was logged; nothing where none was.

    Args:
        logs: the log history of a trainer's state; or, to compare runs, the log histories of each, one a seed, by title. Of
            several seeds the mean is a thick line and each seed a thin one.
        path: of the PNG.
        stage_ends: steps at which a dotted line is drawn, for several stages one after another.
        names: of the curves; that of a validation, `eval_` and the name, is dashed.
        colors: of the titles.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    runs = logs if isinstance(logs, Mapping) else {"": [logs]}
    every = [log for histories in runs.values() for log in histories]
    names = [name for name in names if any(_points(log, key) for key in (name, f"eval_{name}") for log in every)]
    if not names:
        return
    colors = colors or choose_colors(runs)
    legend: dict[str, Any] = {}
    figure = new_figure(4 * len(names), 3.2 + 0.3 * (len(runs) > 1))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for title, histories in runs.items():
            for key, style, label in ((name, "-", "training"), (f"eval_{name}", "--", "validation")):
                curves = [points for log in histories if (points := _points(log, key))]
                if not curves:
                    continue
                line = {"color": colors[title], "linestyle": style}
                if len(curves) > 1:
                    for points in curves:
                        axes.plot(list(points), list(points.values()), **line, alpha=0.3, linewidth=0.7)
                steps = sorted(set.intersection(*map(set, curves)))
                means = [statistics.fmean(points[step] for points in curves) for step in steps]
                marker = "o" if len(steps) < 20 else None
                (drawn,) = axes.plot(steps, means, **line, marker=marker, markersize=3, linewidth=1.6)
                legend.setdefault(" ".join(filter(None, (title, label if key != name or not title else ""))), drawn)
        for step in stage_ends:
            axes.axvline(step, color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if "loss" not in name:
            axes.set_ylim(0, 1)
    if len(legend) > 1:
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def draw_similarity(matching: np.ndarray, random: np.ndarray, path: str | os.PathLike, title: str) -> None:
    """Writes a PNG: the histograms of the similarities of matching and of random pairs, `(n,)` each, over each other.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure(6, 3.4)
    axis = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate([matching, random]), HISTOGRAM_BINS)
    for values, name, color in ((matching, "matching", COLORS[0]), (random, "random", COLORS[1])):
        axis.hist(values, edges.tolist(), alpha=0.55, color=color, label=f"{name} image, mean {values.mean():.3f}")
    axis.set_xlabel("cosine similarity of the text's hidden states to those without an image")
    axis.set_ylabel("texts")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=9, frameon=False)
    _save(figure, path)


def draw_bars(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], float | None] | None]],
    path: str | os.PathLike,
    heading: str,
    *,
    titles: Mapping[str, str] | None = None,
    colors: Mapping[str, str] | None = None,
    reference: str | None = None,
) -> None:
    """Writes a PNG with a panel for each score: a bar for each name with the standard deviation of its values, each value as a
    dot, and chance as a dashed line.

    Args:
        panels: by the title of the panel and the name of the bar the values, one a seed, and chance; None where there is
            no value, or no chance.
        path: of the PNG.
        heading: above the figure.
        titles: of the names, for the legend; the names themselves by default.
        colors: of the names.
        reference: the name that is drawn as a line across each panel rather than as a bar.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.0, 2.9 * columns), 2.2 * lines + 1.1)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [name for name in dict.fromkeys(itertools.chain(*panels.values())) if name != reference]
    titles, colors = titles or {}, colors or choose_colors(bars)
    chance_line = {"color": "#b00020", "linestyle": "--", "linewidth": 1.2}
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        for place, name in enumerate(bars):
            if (scores := found.get(name)) is None:
                axes.text(place, 0.02, "none", ha="center", color="gray", fontsize=8)
                continue
            values, chance = scores
            mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
            axes.bar(place, mean, 0.72, yerr=spread, capsize=4, color=colors[name], alpha=0.75, ecolor="black")
            if len(values) > 1:
                beside = [place + 0.16 * (i - (len(values) - 1) / 2) for i in range(len(values))]
                axes.scatter(beside, values, s=9, color="black", zorder=3, linewidths=0)
            if chance is not None:
                axes.plot([place - 0.5, place + 0.5], [chance] * 2, **chance_line)
        if reference is not None and (scores := found.get(reference)) is not None:
            mean, spread = statistics.fmean(scores[0]), statistics.stdev(scores[0]) if len(scores[0]) > 1 else 0.0
            axes.axhline(mean, color="black", linewidth=1.2)
            axes.axhspan(mean - spread, mean + spread, color="black", alpha=0.12, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set(xlim=(-0.6, len(bars) - 0.4), ylim=(0, 1.05), xticks=[])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    legend: list[Any] = [Patch(color=colors[name], alpha=0.75, label=titles.get(name, name)) for name in bars]
    if reference is not None:
        legend.append(Line2D([], [], color="black", linewidth=1.2, label=titles.get(reference, reference)))
    legend.append(Line2D([], [], **chance_line, label="chance"))  # type: ignore[arg-type]
    figure.suptitle(heading, fontsize=11)
    figure.legend(handles=legend, loc="outside lower center", ncols=min(3, len(legend)), frameon=False, fontsize=9)
    _save(figure, path)


def draw_grounding_scores(scores: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG of what [`~agevlm.evaluation.grounding.Grounding`] has scored: each score with its interval and its chance, and
    how often things are there at each confidence.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    reliability = scores.get("calibration_error")
    shown = {name: row for name, row in scores.items() if "chance" in row}
    figure = new_figure(9 if reliability else 5.5, 3.6)
    panels = figure.subplots(1, 2 if reliability else 1, squeeze=False)[0]
    axis = panels[0]
    for place, row in enumerate(shown.values()):
        ends = [[row["score"] - row["low"]], [row["high"] - row["score"]]]
        axis.errorbar([row["score"]], [place], xerr=np.clip(ends, 0, None), fmt="o", color=COLORS[0], capsize=3)
        axis.plot([row["chance"]] * 2, [place - 0.35, place + 0.35], color="#b00020", linestyle="--", linewidth=1.2)
        if "best_on_grid" in row:
            axis.plot(row["best_on_grid"], place, "|", color=COLORS[2], markersize=16)
    names = {
        "there": "AUROC: there",
        "there_answer": "AUROC: in answers",
        "box_iou": "box IoU",
        "yes_no": "yes/no answers",
    }
    axis.set_yticks(range(len(shown)), [names.get(name, name.replace("_", " ")) for name in shown])
    axis.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6))
    axis.set_title("value with 95% interval\nred: chance; green: best box of whole cells", fontsize=9)
    if reliability:
        confidence, share, count = zip(*reliability["bins"], strict=True)
        axis = panels[1]
        axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
        axis.scatter(confidence, share, [8 + 120 * n / max(count) for n in count], color=COLORS[0], alpha=0.7)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share that is there")
        axis.set_title(f"{reliability['phrases']} phrases, error {reliability['score']:.3f}", fontsize=9)
    for axis in panels:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _points(log: LogHistory, key: str) -> dict[int, float]:
    """The finite values of a log history, by step."""
    return {entry["step"]: entry[key] for entry in log if key in entry and math.isfinite(entry[key])}
