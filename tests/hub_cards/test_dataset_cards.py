# SPDX-License-Identifier: Apache-2.0
"""Cards of data sets: true counts, licenses of what they are made of, and folders that load as they did."""

import numpy as np
import pytest
from command_line import run
from datasets import load_dataset, load_from_disk
from huggingface_hub import DatasetCard
from PIL import Image, ImageDraw

from agevlm import add_masks
from agevlm.hub_cards import write_dataset_card
from agevlm.provenance import describe, read_provenance

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


@pytest.fixture
def scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("cutouts", "Drawings: CC BY-SA 4.0."), ("backgrounds", "Photographs: CC0.")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ATTRIBUTION.md").write_text(f"{text}\n")
    for number, name in enumerate(("apple", "dog", "key")):
        cutout = Image.new("RGBA", (60, 60))
        ImageDraw.Draw(cutout).ellipse((2, 2, 57, 57), fill=(80 * number, 200, 90, 255))
        cutout.save(f"cutouts/{name}.png")
        Image.new("RGB", (80, 80), (40 * number,) * 3).save(f"backgrounds/{number}.png")
    sizes = [
        "--train",
        "3",
        "--validation",
        "1",
        "--test",
        "2",
        "--image-size",
        "64",
        "--max-objects",
        "2",
        "--seed",
        "7",
    ]
    code, printed = run(monkeypatch, capsys, "scenes", "--cutouts", tmp_path / "cutouts", "--backgrounds", "backgrounds", "--out", "my_scenes", *sizes)  # fmt: skip
    assert code == 0, printed
    return tmp_path / "my_scenes"


def test_scenes_have_a_card_with_true_counts_and_all_licenses(scenes):
    card = DatasetCard.load(scenes / "README.md")
    rows = load_from_disk(str(scenes))
    for split, part in rows.items():
        phrases = [phrase for row in part["grounding"] for phrase in row]
        masked = [phrase for phrase in phrases if phrase["mask"] is not None]
        counts = [len(part), len(set(part["scene"])), len(phrases), len(masked)]
        assert f"| {split} | {' | '.join(map(str, counts))} |" in card.text
    assert card.data.license == ["cc-by-sa-4.0", "cc0-1.0"]
    assert card.data.language == "en"
    assert card.data.size_categories == "n<1K"
    assert "image-text-to-text" in card.data.task_categories
    assert "| seed | 7 |" in card.text
    assert "| cut-outs | cutouts | cc-by-sa-4.0 |" in card.text
    assert "Drawings: CC BY-SA 4.0." in card.text
    assert str(scenes.parent) not in (scenes / "README.md").read_text()
    assert all(f"| `{column}` |" in card.text for column in rows["train"].column_names)
    assert describe(scenes) == {"name": "my_scenes", "license": card.data.license, "language": "en", "kind": "grounded scenes"}  # fmt: skip


def test_a_folder_with_a_card_loads_as_the_hub_will_load_it(scenes):
    """`load_dataset` finds the splits that the card names, and none of the JSON files is taken for rows."""
    saved, loaded = load_from_disk(str(scenes)), load_dataset(str(scenes))
    assert list(loaded) == list(saved)
    for split, part in loaded.items():
        assert part.features == saved[split].features
        assert part["messages"] == saved[split]["messages"]
    pixels = [np.asarray(rows["test"][0]["images"][0]) for rows in (saved, loaded)]
    assert (pixels[0] == pixels[1]).all()


class Whole:
    """A teacher whose every mask is the whole image."""

    settings = {"teacher": "whole", "file": "/nowhere/me/weights.pth"}

    def accepts(self, prompt):
        return True

    def masks(self, images, prompts):
        shapes = [image.size[::-1] for image in images]
        return [[(np.ones(shape, bool), 0.5)] * len(asked) for shape, asked in zip(shapes, prompts, strict=True)]


def test_masks_carry_on_what_the_scenes_are(scenes):
    given = {"attribution": (scenes / "ATTRIBUTION.md").read_text(), "provenance": read_provenance(scenes)}
    rows = load_from_disk(str(scenes))["train"]
    add_masks(rows, Whole(), "masked", overwrite=True, progress=False, **given)
    card = DatasetCard.load("masked/README.md")
    assert card.text.index("### agevlm scenes") < card.text.index("### agevlm masks")
    assert f"masked {sum(map(len, rows['grounding']))}" in card.text
    assert "| cut-outs | cutouts |" in card.text
    assert "/nowhere" not in card.text
    assert card.data.license == ["cc-by-sa-4.0", "cc0-1.0"]
    assert load_from_disk("masked")["messages"] == rows["messages"]


def test_a_data_set_of_others_has_a_card_without_what_is_unknown(scenes):
    """Of a data set without provenance and licenses, nothing is said about them; on the Hub it is named by its id."""
    load_from_disk(str(scenes))["test"].remove_columns(["scene", "kind", "answers"]).save_to_disk("plain")
    card = write_dataset_card("plain", repo_id="me/plain", license="mit")
    assert 'load_dataset("me/plain")' in card.text
    assert "How it was made" not in card.text
    assert "says nothing about the licenses" in card.text
    assert card.data.license == "mit"
    assert "None" not in str(card)
    own = card.content.replace("Written by agevlm", "Mine")
    (scenes.parent / "plain/README.md").write_text(own)
    assert write_dataset_card("plain") is None
