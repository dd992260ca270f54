# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and data that several tests of evaluation need."""

import pytest
from evaluation_cases import age_vlm, cv_rows, llava, picture, pope_rows, write_lines
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both models as checkpoints; AGE-VLM's processor again without its template."""
    place = tmp_path_factory.mktemp("models")
    for build in (age_vlm, llava):
        for part in build():
            part.save_pretrained(place / build.__name__)
    model, processor = age_vlm()
    model.save_pretrained(place / "no_template")
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(place / "no_template")
    tiny_llama(vocab_size=len(processor.tokenizer)).save_pretrained(place / "text_only")
    processor.tokenizer.save_pretrained(place / "text_only")
    return place


@pytest.fixture
def pope_files(tmp_path):
    """The authors' folder, and COCO's."""
    for category in ("random", "popular", "adversarial"):
        write_lines(tmp_path / "pope" / f"coco_pope_{category}.json", pope_rows(category))
    (tmp_path / "pope" / "coco_ground_truth_objects.json").write_text("{}")
    (tmp_path / "val2014").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    return tmp_path / "pope", tmp_path / "val2014"


@pytest.fixture
def cv_files(tmp_path):
    folder = tmp_path / "cv"
    (folder / "img").mkdir(parents=True)
    rows = cv_rows()
    for number in range(len(rows)):
        picture(number).save(folder / "img" / f"{number}.png")
    for kind in ("2D", "3D"):
        write_lines(folder / f"test_{kind.lower()}.jsonl", [row for row in rows if row["type"] == kind])
    return folder
