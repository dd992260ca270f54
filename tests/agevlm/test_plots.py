# SPDX-License-Identifier: Apache-2.0
"""Figures: what is in them."""

import numpy as np
import pytest
from grounded_rows import filled, make_dataset, make_row
from PIL import Image

from agevlm import plots
from agevlm.plots import draw_masks
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
