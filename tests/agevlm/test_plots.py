# SPDX-License-Identifier: Apache-2.0
"""Figures: what is in them, and that drawing leaves pyplot and its backend alone."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from figures import drawn_figures
from grounded_rows import filled, make_dataset, make_row
from PIL import Image

from agevlm import plots
from agevlm.cli.options import FIGURE_SUFFIXES
from agevlm.plots import choose_colors, draw_bars, draw_heatmaps, draw_masks, draw_similarity, draw_training
from agevlm.processing.rows import mask_to_rle


def test_preview_shows_masks_and_phrases(tmp_path, monkeypatch):
    image = Image.new("RGB", (60, 40), "gray")
    mask = mask_to_rle(filled(image, (10, 10, 30, 30)))
    many = [(f"thing {i}", None, mask) for i in range(12)]
    rows = [make_row(image, ("a $5 dog", None, mask), ("a cat", None, None)), make_row(image), make_row(image, *many)]
    rows[0]["grounding"][0]["score"] = 0.876
    figures = []
    new_figure = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    draw_masks(make_dataset(rows), tmp_path / "preview.png")
    first, second = figures[0].axes
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["row 0", "row 2"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [r"a \$5 dog  0.88", "a cat  (no mask)"]
    assert [text.get_text() for text in second.get_legend().get_texts()][-2:] == ["thing 7", "and 4 more"]
    overlay = first.get_images()[1].get_array()
    np.testing.assert_array_equal(np.asarray(overlay)[..., 3] > 0, filled(image, (10, 10, 30, 30)))
    with pytest.raises(ValueError, match="no row has a mask"):
        draw_masks(make_dataset([make_row(image)]), tmp_path / "none.png")


def test_figures_can_be_written_in_each_format_of_the_command_line(tmp_path):
    for suffix in (*FIGURE_SUFFIXES, ".PNG"):
        path = tmp_path / f"x{suffix}"
        draw_heatmaps(Image.new("RGB", (60, 60), "gray"), np.eye(3)[None], ["first"], path)
        assert path.stat().st_size > 1000


def test_preview_shows_transparent_images_on_white(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    image = Image.new("RGBA", (60, 40), (200, 0, 0, 0))
    draw_masks(
        make_dataset([make_row(image, ("a dog", None, mask_to_rle(filled(image, (10, 10, 30, 30)))))]),
        tmp_path / "x.png",
    )
    assert np.unique(drawn[0].axes[0].get_images()[0].get_array()).tolist() == [255]


def test_drawn_heatmaps(tmp_path):
    maps = np.zeros((2, 3, 3))
    maps[0, 0, 0], maps[1, 2, 2] = 1, 1
    path = tmp_path / "maps.png"
    draw_heatmaps(Image.new("RGB", (60, 60), "gray"), maps, ["first", "second"], path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The bright corner is top left in the first map, bottom right in the second.
    panels = np.array_split(pixels.sum(-1), 3, axis=1)[1:]
    rows, columns = panels[0].shape
    near = [panel[rows // 4 : 3 * rows // 4] for panel in panels]
    half = near[0].shape[0] // 2
    assert near[0][:half, : columns // 2].mean() > near[0][half:, columns // 2 :].mean()
    assert near[1][:half, : columns // 2].mean() < near[1][half:, columns // 2 :].mean()


def test_the_strongest_cell_is_framed_where_it_lies_in_the_image(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    maps = np.zeros((1, 2, 3, 4))
    maps[0, 0, 2, 1] = maps[0, 1, 0, 3] = 1
    draw_heatmaps(
        Image.new("RGB", (40, 25), "gray"), maps, ["a", "b"], tmp_path / "x.png", labels=["dog"], cell=(10, 10)
    )
    frames = [axis.patches[0].get_bbox().extents.tolist() for axis in drawn[0].axes[1:-1]]
    assert frames == [[10, 20, 20, 30], [30, 0, 40, 10]]
    for axis in drawn[0].axes[:-1]:  # the last row of cells reaches beyond the image
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, 40), (25, 0))
    assert drawn[0].axes[1].images[1].get_extent() == [0, 40, 30, 0]


# --- heat maps ---


def panel_colors(figure) -> list[np.ndarray]:
    """Of each map of a figure the colors of its cells, as drawn, `(rows, columns, 4)`."""
    maps = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    return [shown.to_rgba(shown.get_array(), alpha=1) for shown in maps]


def attention(share: float, inside: tuple[slice, slice] | None = None, grid=(16, 16)) -> np.ndarray:
    """A map that has `share` of the attention, spread evenly over the cells inside, or over all."""
    cells = np.zeros(grid)
    cells[inside if inside is not None else (slice(None), slice(None))] = 1
    return share * cells / cells.sum()


DOG = (slice(9, 15), slice(2, 8))
FOUND, ABSENT, UNIFORM = attention(0.98, DOG), attention(0.01), attention(1.0)


def draw(monkeypatch, path, maps, **kwargs):
    drawn = drawn_figures(monkeypatch)
    image = Image.new("RGB", (64, 64), "white")
    draw_heatmaps(image, np.stack(maps), [f"map {number}" for number in range(len(maps))], path, **kwargs)
    return drawn[-1]


def brightness(image_file, box) -> float:
    with Image.open(image_file) as image:
        return float(np.asarray(image.convert("L").crop(box)).mean())


def test_a_panel_of_an_absent_phrase_is_dark(tmp_path, monkeypatch):
    figure = draw(monkeypatch, tmp_path / "absent.png", [ABSENT])
    (absent,) = panel_colors(figure)
    assert absent[..., :3].max() < 0.05
    (found,) = panel_colors(draw(monkeypatch, tmp_path / "found.png", [FOUND]))
    assert found[..., :3].sum(-1)[DOG].min() > 1.2, "a found dog glows"
    assert np.delete(found, np.arange(9, 15), axis=0)[..., :3].max() < 0.05
    assert not figure.axes[1].patches, "nothing is framed where nothing is attended"
    # In the written file too, where the picture is white and each panel alone.
    position = figure.axes[1].get_window_extent()
    height = figure.bbox.height
    box = (position.x0 + 2, height - position.y1 + 2, position.x1 - 2, height - position.y0 - 2)
    assert brightness(tmp_path / "absent.png", box) < brightness(tmp_path / "found.png", box) < 255 * 0.75


def test_a_color_always_means_the_same(tmp_path, monkeypatch):
    """Alone or among others, in a figure of other maps, of another grid or for another picture."""
    alone = panel_colors(draw(monkeypatch, tmp_path / "a.png", [ABSENT]))[0]
    among = panel_colors(draw(monkeypatch, tmp_path / "b.png", [FOUND, ABSENT, UNIFORM, 0 * UNIFORM]))
    np.testing.assert_array_equal(among[1], alone)
    np.testing.assert_array_equal(among[0], panel_colors(draw(monkeypatch, tmp_path / "c.png", [FOUND]))[0])
    drawn = drawn_figures(monkeypatch)
    rows = np.stack([[FOUND, UNIFORM], [ABSENT, FOUND]])
    draw_heatmaps(Image.new("RGB", (20, 90), "blue"), rows, ["a", "b"], tmp_path / "d.png", labels=["x", "y"])
    for got, expected in zip(panel_colors(drawn[-1]), (among[0], among[2], alone, among[0]), strict=True):
        np.testing.assert_array_equal(got, expected)
    # As much attention relative to an even spread, in cells of other sizes.
    for grid in ((4, 4), (7, 3), (48, 48)):
        (coarse,) = panel_colors(draw(monkeypatch, tmp_path / "e.png", [attention(1.0, grid=grid)]))
        np.testing.assert_allclose(coarse, np.broadcast_to(among[2][0, 0], coarse.shape), atol=1e-6)
    order = [
        panel_colors(draw(monkeypatch, tmp_path / "f.png", [attention(share)]))[0][0, 0, :3].sum()
        for share in (0.03, 0.1, 0.3, 1)
    ]
    assert order == sorted(order)
    assert order[0] < order[-1]


def test_the_color_bar_has_the_scale_of_the_panels_and_a_unit(tmp_path, monkeypatch):
    for maps in ([ABSENT], [FOUND, UNIFORM]):
        figure = draw(monkeypatch, tmp_path / "x.png", maps)
        *panels, bar = figure.axes
        assert "multiples of an even spread" in " ".join(bar.get_xlabel().split())
        assert [tick.get_text() for tick in bar.get_xticklabels()] == ["0.1", "1", "10", "100"]
        norms = [axis.images[1].norm for axis in panels[1:]]
        assert {(norm.vmin, norm.vmax, type(norm)) for norm in norms} == {(0.1, 100.0, type(norms[0]))}
        assert bar.get_xlim() == pytest.approx((0.1, 100.0))
        assert norms[0](1.0) == pytest.approx(1 / 3)  # three powers of ten


def test_titles_have_the_sinks_share_where_there_is_a_sink(tmp_path, monkeypatch):
    figure = draw(monkeypatch, tmp_path / "x.png", [FOUND, ABSENT], sink=np.array([0.02, 0.99]))
    titles = [axis.get_title().split("\n") for axis in figure.axes[1:3]]
    assert titles == [["map 0", "max 0.03", "sink 0.02"], ["map 1", "max 0.00", "sink 0.99"]]
    figure = draw(monkeypatch, tmp_path / "y.png", [FOUND, ABSENT])
    assert [axis.get_title().split("\n") for axis in figure.axes[1:3]] == [
        ["map 0", "max 0.03"],
        ["map 1", "max 0.00"],
    ]


@pytest.mark.parametrize("mode", ["I;16", "LA", "RGBA", "P", "L", "CMYK"])
def test_heatmaps_show_images_of_all_modes_as_the_processor_reads_them(tmp_path, monkeypatch, mode):
    gray = np.full((8, 8), 102, np.uint8)
    image = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert("RGB").convert(mode)
    )
    if mode in ("RGBA", "LA"):
        image.putalpha(0)
    drawn = drawn_figures(monkeypatch)
    draw_heatmaps(image, UNIFORM[None], ["map"], tmp_path / "x.png")
    expected = 255 if mode in ("RGBA", "LA") else 102
    for axis in drawn[0].axes[:2]:
        np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=3)


# --- training curves ---

LOG = [
    {"step": 1, "loss": 3.0, "lm_loss": 2.0, "pointing_accuracy": 0.1},
    {"step": 1, "eval_lm_loss": 2.5},
    {"step": 2, "loss": 2.0, "lm_loss": 1.0, "pointing_accuracy": float("nan")},
    {"step": 3, "lm_loss": 0.5, "pointing_accuracy": 0.7},
]


def lines(axes) -> list[tuple[list, str, str]]:
    """Of each curve its points, its style and its color; the lines between stages are left out."""
    curves = [line for line in axes.get_lines() if line.get_linestyle() != ":"]
    return [([*zip(*line.get_data(), strict=True)], line.get_linestyle(), line.get_color()) for line in curves]


def test_the_curves_of_one_run(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    draw_training(LOG, tmp_path / "training.png", [2])
    (figure,) = drawn
    loss, pointing = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["lm loss", "pointing accuracy"]
    assert [(points, style) for points, style, _ in lines(loss)] == [
        ([(1, 2.0), (2, 1.0), (3, 0.5)], "-"),
        ([(1, 2.5)], "--"),
    ]
    assert [points for points, _, _ in lines(pointing)] == [[(1, 0.1), (3, 0.7)]]
    assert pointing.get_ylim() == (0, 1)
    for axes in figure.axes:
        (end,) = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert list(end.get_xdata()) == [2, 2]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", "validation"]
    draw_training([{"step": 1, "loss": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_curves_of_several_runs_and_seeds(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    seeds = [[{"step": step, "lm_loss": step + seed} for step in range(1, 4 - seed)] for seed in (0, 1)]
    runs = {"guided": seeds, "unguided": [[{"step": 1, "lm_loss": 9.0}]]}
    draw_training(runs, tmp_path / "training.png", colors={"guided": "red", "unguided": "blue"})
    (axes,) = drawn[0].axes
    assert [(points, color) for points, _, color in lines(axes)] == [
        ([(1, 1), (2, 2), (3, 3)], "red"),  # each seed, thin
        ([(1, 2), (2, 3)], "red"),
        ([(1, 1.5), (2, 2.5)], "red"),  # their mean, at the steps that all have
        ([(1, 9.0)], "blue"),
    ]
    assert [line.get_linewidth() for line in axes.get_lines()] == [0.7, 0.7, 1.6, 1.6]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["guided", "unguided"]


# --- scores ---


def test_bars_have_their_values_spread_and_chance(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    panels = {
        "count": {"guided": ([0.2, 0.4], 0.25), "unguided": ([0.1], None), "all": ([0.6, 0.8], 0.3)},
        "pointing": {"guided": ([0.9, 0.7], 0.1), "unguided": None, "all": None},
    }
    draw_bars(panels, tmp_path / "bars.png", "test", titles={"guided": "with guidance"}, reference="all")
    (figure,) = drawn
    count, pointing = (axes for axes in figure.axes if axes.get_title())
    assert [axes.get_title() for axes in (count, pointing)] == ["count", "pointing"]
    heights = [[bar.get_height() for container in axes.containers for bar in getattr(container, "patches", [])]
               for axes in (count, pointing)]  # fmt: skip
    assert heights == [pytest.approx([0.3, 0.1]), pytest.approx([0.8])]
    levels = [sorted({float(y) for line in axes.get_lines() for y in line.get_ydata()}) for axes in (count, pointing)]
    assert {0.25, 0.7} <= {round(level, 6) for level in levels[0]}  # chance, and the reference's mean
    assert 0.1 in levels[1]
    assert [text.get_text() for text in pointing.texts] == ["none"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["with guidance", "unguided", "all", "chance"]
    assert figure.get_suptitle() == "test"


def test_colors_stay_with_their_names():
    assert choose_colors(["a", "b", "c"], "b") == {**choose_colors(["a", "c"]), "b": "black"}
    assert len(set(choose_colors("abcdefg").values())) == 7


def test_the_histograms_of_similarities(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    rng = np.random.default_rng(0)
    matching, random = rng.normal(0.6, 0.1, 200), rng.normal(0.8, 0.05, 150)
    draw_similarity(matching, random, tmp_path / "similarity.png", "a model")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "a model"
    assert [sum(bar.get_height() for bar in bars) for bars in axes.containers] == [200, 150]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"matching image, mean {matching.mean():.3f}", f"random image, mean {random.mean():.3f}"]


# --- pyplot ---


def draw_everything(folder):
    image = Image.new("RGB", (60, 40), "gray")
    row = make_row(image, ("a dog", None, mask_to_rle(filled(image, (10, 10, 30, 30)))))
    draw_masks(make_dataset([row]), folder / "masks.png")
    draw_heatmaps(image, np.ones((1, 2, 3)), ["first"], folder / "maps.png")
    draw_training(LOG, folder / "training.png")
    draw_similarity(np.array([0.1, 0.2]), np.array([0.3, 0.4]), folder / "similarity.png", "title")
    draw_bars({"score": {"a": ([0.5], 0.1)}}, folder / "bars.png", "heading")


@pytest.mark.parametrize("backend", ["svg", "pdf"])
def test_drawing_changes_neither_the_backend_nor_pyplots_figures(tmp_path, backend):
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    try:
        matplotlib.use(backend)
        shown = pyplot.figure()
        parameters = dict(matplotlib.rcParams)
        draw_everything(tmp_path)
        assert matplotlib.get_backend() == backend
        assert dict(matplotlib.rcParams) == parameters
        assert pyplot.get_fignums() == [shown.number]
        assert pyplot.gcf() is shown
    finally:
        pyplot.close("all")
        matplotlib.use(before)
    for file in ("masks", "maps", "training", "similarity", "bars"):
        with Image.open(tmp_path / f"{file}.png") as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 5


def test_drawing_does_not_import_pyplot(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from agevlm.plots import draw_similarity\n"
        "draw_similarity(np.array([0.1, 0.2]), np.array([0.3, 0.4]), sys.argv[1], 'title')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "similarity.png")], check=True)
    assert (tmp_path / "similarity.png").is_file()
