# SPDX-License-Identifier: Apache-2.0
"""Scenes as an examination, and attention maps on the image."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import IMAGE, tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.data.features import image_features, scene_images, select_features
from agevlm.data.scene_builder import build_scenes
from agevlm.evaluation.attention import find_phrase, phrase_maps
from agevlm.evaluation.pope import parse_yes_no
from agevlm.evaluation.scenes import evaluate_scenes, points_at, render_question, scene_questions, score_maps
from agevlm.plots import draw_heatmaps
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE
from agevlm.processing.rows import mask_from_rle

SIZE = 32  # pixels; the tiny tower makes 4x4 tokens of them


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    torch.manual_seed(0)
    model = from_parts(
        tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tiny_vision(),
        image_token_id=processor.image_token_id,
    )
    return open_gates(model), processor


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for kind in ("cutouts", "backgrounds"):
        (folder / kind).mkdir()
    for number, name in enumerate(("dog", "cat", "apple", "car")):
        cutout = Image.new("RGBA", (40, 40))
        ImageDraw.Draw(cutout).ellipse((2, 2, 38, 38), fill=(60 * number, 255 - 60 * number, 128, 255))
        cutout.save(folder / "cutouts" / f"{name}.png")
    for number in range(3):
        Image.new("RGB", (90, 90), (80 * number, 40, 90)).save(folder / "backgrounds" / f"{number}.png")
    return build_scenes(
        folder / "cutouts",
        folder / "backgrounds",
        folder / "out",
        num_train=1,
        num_validation=1,
        num_test=6,
        image_size=64,
        max_objects=2,
        questions_per_scene=4,
        progress=False,
    )["test"]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_points_at_looks_at_the_middle_of_the_strongest_cell():
    maps = np.zeros((3, 2, 4))
    maps[0, 0, 0] = maps[1, 1, 3] = maps[2, 0, 2] = 1
    mask = np.zeros((20, 40), dtype=bool)
    mask[5, 5] = mask[15, 35] = True  # the middles of cells (0, 0) and (1, 3), and nothing else
    assert points_at(maps, mask).tolist() == [True, True, False]


def test_find_phrase():
    assert find_phrase("A dog, a Dog?", "dog") == (9, 12)
    with pytest.raises(ValueError, match="'cat' does not occur"):
        find_phrase("A dog", "cat")


@pytest.mark.parametrize(("width", "height", "cells"), [(50, 50, (4, 4)), (60, 30, (2, 4)), (10, 40, (4, 1))])
def test_phrase_maps_lie_on_the_image(parts, width, height, cells):
    model, processor = parts
    question = "Is there a dog in this image?"
    text = render_question(processor, question)
    spans = [find_phrase(text, "dog"), find_phrase(text, question), (0, 4)]
    maps = phrase_maps(model, processor, text, picture(width, height), spans)
    assert maps.shape == (len(model.config.text_config.cross_attention_layers), 3, *cells)
    # Nothing is lost with the padding, and what stands before the image sees nothing of it.
    np.testing.assert_allclose(maps[:, :2].sum((-2, -1)), 1, atol=1e-5)
    assert (maps[:, 2] == 0).all()


def test_drawn_heatmaps(tmp_path):
    maps = np.zeros((2, 3, 3))
    maps[0, 0, 0], maps[1, 2, 2] = 1, 1
    path = tmp_path / "maps.png"
    draw_heatmaps(Image.new("RGB", (60, 60), "grey"), maps, ["first", "second"], path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The bright corner is top left in the first map, bottom right in the second.
    panels = np.array_split(pixels.sum(-1), 3, axis=1)[1:]
    rows, columns = panels[0].shape
    near = [panel[rows // 4 : 3 * rows // 4] for panel in panels]
    half = near[0].shape[0] // 2
    assert near[0][:half, : columns // 2].mean() > near[0][half:, columns // 2 :].mean()
    assert near[1][:half, : columns // 2].mean() < near[1][half:, columns // 2 :].mean()


@torch.no_grad()
def test_features_of_many_images_are_those_of_each(parts):
    model, processor = parts
    pictures = [picture(20 + 7 * n, 30) for n in range(5)]
    features = image_features(model, processor, pictures, batch_size=2)
    for row, image in enumerate(pictures):
        inputs = processor.image_processor(image, return_tensors="pt")
        alone = model.get_image_features(**inputs)
        selected = select_features(features, [row])
        torch.testing.assert_close(selected.last_hidden_state, alone.last_hidden_state)
        assert torch.equal(selected.visual_attention_mask, alone.visual_attention_mask)
        assert selected.grid == alone.grid


def test_scores_are_those_of_the_answers(parts, scenes):
    model, processor = parts
    results, questions = evaluate_scenes(model, processor, scenes, batch_size=3, progress=None)
    assert len(questions) == sum(len(row["answers"]) for row in scenes)
    assert all(question.answer is not None for question in questions)
    for kind in ("existence", "count", "position"):
        asked = [question for question in questions if question.kind == kind]
        expected = Counter(question.expected for question in asked)
        assert results[kind]["questions"] == len(asked)
        if kind == "existence":  # read by POPE's rules, by which anything without a no is a yes
            right = [parse_yes_no(question.answer) == question.expected.lower() for question in asked]
        else:
            right = [question.answer == question.expected for question in asked]
        assert results[kind]["score"] == np.mean(right)
        assert results[kind]["chance"] == max(expected.values()) / len(asked)
    mapped = [question for question in questions if question.spans]
    assert results["pointing"]["questions"] == len(mapped) > 0
    shares = [mask_from_rle(question.masks[0]).mean() for question in mapped]
    assert results["pointing"]["chance"] == pytest.approx(np.mean(shares))


def test_a_right_answer_counts_and_a_wrong_one_does_not(parts, scenes, monkeypatch):
    """Scores of a model that knows the answers are 1, and those of one that says the same to all are chance."""
    model, processor = parts

    def answer(text: str):
        def batch_decode(tokens, **kwargs):
            return [text] * len(tokens)

        return batch_decode

    constant = Counter(q.expected for q in scene_questions(scenes) if q.kind == "count").most_common(1)[0][0]
    monkeypatch.setattr(processor, "batch_decode", answer(constant), raising=False)
    results, questions = evaluate_scenes(model, processor, scenes, progress=None)
    assert results["count"]["score"] == results["count"]["chance"]
    assert results["existence"]["yes_ratio"] == 1
    assert results["existence"]["f1"] == pytest.approx(2 / 3)  # half of the answers are yes

    names = next(question.expected for question in questions if question.kind == "objects")
    monkeypatch.setattr(processor, "batch_decode", answer(names), raising=False)
    results, questions = evaluate_scenes(model, processor, scenes, progress=None)
    given = set(names.split(", "))
    overlaps = []
    for question in questions:
        if question.kind == "objects":
            expected = set(question.expected.split(", "))
            right = len(given & expected)
            overlaps.append(0 if not right else 2 / (len(given) / right + len(expected) / right))
    assert results["objects"]["score"] == pytest.approx(np.mean(overlaps))


def test_answers_do_not_depend_on_batching(parts, scenes):
    model, processor = parts
    answers = []
    for batch_size in (1, 5):
        _, questions = evaluate_scenes(model, processor, scenes, batch_size=batch_size, progress=None)
        answers.append([question.answer for question in questions])
    assert answers[0] == answers[1]


def test_every_scene_has_one_image(scenes):
    images = scene_images(scenes)
    assert sorted(images) == sorted(set(scenes["scene"]))
    assert all(image.size == (64, 64) and image.mode == "RGB" for image in images.values())


def test_maps_are_scored_against_the_mask_and_its_share():
    mask = np.zeros((40, 40), dtype=bool)
    mask[:20, 10:20] = True  # 2 of 16 cells of a 4x4 map
    on, uniform, off = np.zeros((4, 4)), np.full((4, 4), 1 / 16), np.zeros((4, 4))
    on[:2, 1] = 0.5
    off[3, 3] = 1
    scores = score_maps(np.stack([on, uniform, off]).astype(np.float32), mask)
    assert scores["pointing"].tolist() == [1, 0, 0]  # the first of equal cells is at the top left, outside
    assert scores["mass"] == pytest.approx([1, 2 / 16, 0])
    # On the area's scale the uniform map is 1/8 everywhere: 2 * 1/8 shared, 2 + 14 * 1/8 in all.
    assert scores["iou"] == pytest.approx([1, 0.25 / 3.75, 0])
