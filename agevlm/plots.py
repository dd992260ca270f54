# SPDX-License-Identifier: Apache-2.0
"""Every figure that the package draws: object-oriented matplotlib, which leaves a notebook's backend alone."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .processing.rows import mask_from_rle, message_text

if TYPE_CHECKING:
    from datasets import Dataset


def draw_masks(dataset: Dataset, path: str | os.PathLike, rows: int = 6) -> None:
    """Write a PNG of some rows, evenly spread: an image, its masks in colours, and its phrases with their scores.

    Args:
        dataset: with masks; rows without any are passed over.
        path: of the PNG.
        rows: at most so many.

    Raises:
        ValueError: if no row has a mask.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    grounding = dataset.select_columns("grounding")
    masked = [i for i, row in enumerate(grounding) if any(e["mask"] for e in row["grounding"] or [])]
    if not masked:
        raise ValueError("no row has a mask, so there is nothing to draw")
    chosen = [masked[i] for i in np.linspace(0, len(masked) - 1, min(rows, len(masked))).round().astype(int)]
    columns = min(3, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 5 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, chosen, strict=False):
        row = dataset[index]
        shown = next(entry["image"] for entry in row["grounding"] if entry["mask"])
        entries = [entry for entry in row["grounding"] if entry["image"] == shown]
        image = row["images"][shown].convert("RGB")
        image.thumbnail((640, 640))
        axis.imshow(image)
        axis.set_title(f"row {index}", fontsize=10, loc="left")
        legend = []
        colours = iter([plt.get_cmap("tab10")(i % 10)[:3] for i in range(len(entries))])
        for entry in entries:
            phrase = message_text(row["messages"][entry["message"]])[entry["start"] : entry["end"]]
            score = "" if entry["score"] is None else f"  {entry['score']:.2f}"
            label = textwrap.fill(f"{phrase}{score}{'' if entry['mask'] else '  (no mask)'}", 48).replace("$", r"\$")
            if not entry["mask"]:
                legend.append(Patch(facecolor="none", edgecolor="grey", label=label))
                continue
            colour = next(colours)
            legend.append(Patch(color=colour, label=label))
            small = Image.fromarray(mask_from_rle(entry["mask"])).resize(image.size, Image.Resampling.NEAREST)
            mask = np.asarray(small)
            axis.imshow(np.where(mask[..., None], [*colour, 0.45], 0.0))
            if mask.any() and not mask.all():
                axis.contour(mask, [0.5], colors=[colour], linewidths=1.5)
        more = len(legend) - 8
        if more > 0:
            legend[8:] = [Patch(facecolor="none", edgecolor="none", label=f"and {more} more")]
        axis.legend(
            handles=legend, loc="upper left", bbox_to_anchor=(0, -0.01), frameon=False, fontsize=10, borderaxespad=0
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


HISTOGRAM_BINS = 30
"""Bins of the histograms of similarities."""

CURVES = ("lm_loss", "guidance_loss", "pointing_accuracy", "attention_iou")
"""What `training.png` draws, of the names that `AgeVlmTrainer` logs."""


def draw_training(
    log_history: Sequence[dict[str, Any]], path: str | os.PathLike, stage_ends: Sequence[int] = ()
) -> None:
    """Draws the curves of a training run.

    Args:
        log_history: of a trainer's state.
        path: the PNG to write.
        stage_ends: steps at which a dotted line is drawn, for several stages one after another.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in CURVES if any({name, f"eval_{name}"} & entry.keys() for entry in log_history)]
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, label in ((name, "training"), (f"eval_{name}", "validation")):
            points = [(e["step"], e[key]) for e in log_history if key in e and math.isfinite(e[key])]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3, label=label
                )
        for step in stage_ends:
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if "loss" not in name:
            axes.set_ylim(0, 1)
        if any(f"eval_{name}" in entry for entry in log_history):
            axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def draw_heatmaps(
    image: Image.Image,
    maps: np.ndarray,
    titles: Sequence[str],
    path: str | Path,
    caption: str | None = None,
    *,
    labels: Sequence[str] = ("image",),
    cell: tuple[float, float] | None = None,
) -> None:
    """Writes a PNG with the image, and the image under each map `(n, rows, columns)`, side by side.

    Each map has its own colour scale, from no attention to its maximum, so that faint maps can be read too. Its strongest
    cell is framed, and the number above says how much of the attention it holds.

    Args:
        maps: or `(phrases, n, rows, columns)`, for a row of the figure each.
        titles: of the `n` columns.
        labels: what stands above the image in each row.
        cell: width and height of a map's cell in pixels of the image (see [`cell_size`]); by default the map covers the
            image exactly.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(f"{error}; to draw heat maps: pip install 'agevlm[eval]'") from error

    maps = maps if maps.ndim == 4 else maps[None]
    count, columns = len(maps), maps.shape[1] + 1
    # In inches: panels as large as a width of 15 and a height of 18 allow, within what can be read and is worth looking at.
    side = min(2.6, max(1.4, min(15 / columns, 18 / count)))
    width = max(1.25, side * min(1, image.width / image.height))  # at least that of the title
    height = side * min(1, image.height / image.width)
    letters = int(13 * width)  # that fit into an inch, by the width
    labels = [textwrap.fill(textwrap.shorten(label, 3 * letters), letters) for label in labels]
    lines = [line for text in (caption or "").splitlines() for line in textwrap.wrap(text, columns * letters)]
    heights = [height + 0.15 * (label.count("\n") + 1) + 0.15 for label in labels]
    figure = Figure(
        figsize=(columns * width, sum(heights) + 0.15 + (0.18 * len(lines) + 0.1) * bool(lines)),
        layout=ConstrainedLayoutEngine(h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    cell = cell or (image.width / maps.shape[3], image.height / maps.shape[2])
    extent = (0, cell[0] * maps.shape[3], cell[1] * maps.shape[2], 0)
    grey = image.convert("L")
    plain: dict[str, Any] = {"parse_math": False, "fontsize": 9}  # a "$" is no mathematics
    panels = figure.subplots(count, columns, squeeze=False)
    for number, (axes, label, row) in enumerate(zip(panels, labels, maps, strict=True)):
        axes[0].imshow(image)
        axes[0].set_title(label, **plain)
        for axis, attention, title in zip(axes[1:], row, titles, strict=True):
            axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
            axis.imshow(attention, cmap="inferno", vmin=0, alpha=0.6, interpolation="bilinear", extent=extent)
            y, x = np.unravel_index(attention.argmax(), attention.shape)
            frame = Rectangle((x * cell[0], y * cell[1]), *cell, fill=False, edgecolor="cyan", linewidth=1.2)
            axis.add_patch(frame)
            axis.set_title(f"{title}\n" * (number == 0) + f"max {attention.max():.2f}", **plain)
        for axis in axes:
            axis.set(xlim=(0, image.width), ylim=(image.height, 0))
            axis.set_axis_off()
    if lines:
        figure.suptitle("\n".join(lines), parse_math=False, fontsize=10)
    figure.savefig(path, dpi=110)


def draw_similarity(found: Any, path: str | os.PathLike, title: str) -> None:
    """Writes a PNG: the histograms of matching and random pairs over each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    edges = np.histogram_bin_edges(np.concatenate([found.matching, found.random]), HISTOGRAM_BINS)
    for values, name, colour in ((found.matching, "matching", "tab:blue"), (found.random, "random", "tab:orange")):
        axis.hist(values, edges.tolist(), alpha=0.55, color=colour, label=f"{name} image, mean {values.mean():.3f}")
    axis.set_xlabel("cosine similarity of the text's hidden states to those without an image")
    axis.set_ylabel("texts")
    axis.set_title(f"{title}\nAUROC {found.auroc:.2f}, overlap {found.overlap:.2f}", fontsize=10)
    axis.legend(fontsize=9, frameon=False)
    figure.savefig(Path(path), dpi=110)
    plt.close(figure)
