# SPDX-License-Identifier: Apache-2.0
"""Grounded answers: points, boxes and confidence of planted maps, calibrations of other weights, the command."""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from evaluation_cases import age_vlm
from PIL import Image
from scipy import ndimage
from tiny import IMAGE, tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision

from agevlm import AgeVlmForConditionalGeneration, AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.inference.attention import Attention, Phrase
from agevlm.inference.grounding import (
    FEATURES,
    MAP_FEATURES,
    Calibration,
    find_boxes,
    find_calibration,
    find_regions,
    ground,
    ground_attention,
    ground_reply,
    map_features,
    noun_phrases,
    trained_fingerprint,
)
from agevlm.inference.replies import cross_attention_layers, reply
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE

SIZE = 32  # pixels; the tiny tower makes 4x4 tokens of them
QUESTION = "Is there a dog, or is the dog not there?"


def picture(width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def made_calibration(model=None, **settings) -> Calibration:
    """With a confidence that says how much of the attention is on the image."""
    features = {name: {"mean": 0.0, "scale": 1.0, "weight": float(name == "image_share")} for name in FEATURES}
    return Calibration("" if model is None else trained_fingerprint(model), features=features, **settings)


@pytest.fixture(scope="module")
def parts():
    return age_vlm()


@pytest.fixture(scope="module")
def sink_parts():
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    llama = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id, cross_attention_sink=True)
    return open_gates(model), processor


def planted(maps, width, height, cell, phrases=("dog",)) -> Attention:
    """Maps `(blocks, phrases, rows, columns)` of an image."""
    named = [Phrase(text, "question", 0, len(text)) for text in phrases]
    blocks = [f"before layer {layer}" for layer in range(len(maps))]
    return Attention(picture(width, height), "?", "!", named, [[]] * len(named), blocks, np.float32(maps), cell)


# --- maps ---


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_regions_and_boxes_are_those_of_another_library(threshold):
    rng = np.random.default_rng(1)
    maps = ndimage.gaussian_filter(rng.random((200, 9, 13)), (0, 0.7, 0.7)).astype(np.float32)
    regions = find_regions(torch.from_numpy(maps), threshold)
    boxes = find_boxes(regions, (7.5, 10.0), (91, 84)).numpy()
    several = 0
    for attention, region, box in zip(maps, regions.numpy(), boxes, strict=True):
        labels, count = ndimage.label(attention >= threshold * attention.max(), np.ones((3, 3)))
        label = labels[np.unravel_index(attention.argmax(), attention.shape)]
        assert np.array_equal(region, labels == label)
        rows, columns = ndimage.find_objects(labels)[label - 1]
        expected = [columns.start * 7.5, rows.start * 10, min(columns.stop * 7.5, 91), min(rows.stop * 10, 84)]
        np.testing.assert_allclose(box, expected)
        several += count > 1
    assert several > 50, "other regions are left out"


def test_a_planted_map_has_its_point_and_its_box():
    """In an image of 40x20 pixels whose cells are of 10x8: the last row of cells reaches beyond it."""
    attention = np.full((3, 4), 0.01)
    attention[1, 1], attention[2, 2], attention[0, 3] = 0.4, 0.3, 0.2  # the last is not connected
    found = planted(attention[None, None], 40, 20, (10.0, 8.0))
    (phrase,) = ground_attention(found, Calibration(threshold=0.5, point="peak"), [0]).phrases
    assert (phrase.point, phrase.box) == ([15.0, 12.0], [10.0, 8.0, 30.0, 20.0])
    (phrase,) = ground_attention(found, Calibration(threshold=0.5, point="center"), [0]).phrases
    middle = (
        0.4 * np.array([15, 12]) + 0.3 * np.array([25, 18])
    ) / 0.7  # the visible part of the lower cell ends at 20
    assert phrase.point == pytest.approx(middle, abs=0.01)
    assert (phrase.confidence, phrase.there) == (None, None)


def test_only_the_chosen_blocks_are_read():
    maps = np.zeros((3, 1, 2, 2))
    maps[0, 0, 0, 0], maps[1, 0, 1, 1], maps[2, 0, 0, 1] = 1, 0.6, 0.3
    found = planted(maps, 20, 20, (10.0, 10.0))
    settings = {"threshold": 0.9, "point": "peak"}
    points = [
        ground_attention(found, Calibration(layers=layers, **settings), [2, 5, 8]).phrases[0].point
        for layers in (None, (5,), (5, 8), (8,))
    ]
    assert points == [[5, 5], [15, 15], [15, 15], [15, 5]]


def test_words_before_the_image_have_no_place():
    maps = np.zeros((2, 2, 3, 3))
    maps[:, 1, 1, 1] = 0.5
    found = planted(maps, 30, 30, (10.0, 10.0), ("dog", "cat"))
    before, after = ground_attention(found, made_calibration(), [0, 1]).phrases
    assert (before.point, before.box, before.confidence, before.there) == (None,) * 4
    assert after.box == [10, 10, 20, 20]
    assert after.there is not None


def test_features_do_not_depend_on_the_grid_and_say_what_they_are_named():
    even = torch.full((2, 1, 4, 4), 1 / 16)
    one = torch.zeros(2, 1, 4, 4)
    one[..., 1, 2] = 1
    half = torch.zeros(2, 1, 4, 4)
    half[0, 0, 0, 0], half[1, 0, 3, 3] = 1, 1  # two blocks that point at different cells
    dim = one * 0.25  # three quarters are elsewhere
    values = {
        name: dict(zip(MAP_FEATURES, map_features(maps, 0.9)[0].tolist(), strict=True))
        for name, maps in {"even": even, "one": one, "half": half, "dim": dim}.items()
    }
    assert values["even"]["peak"] == pytest.approx(0)
    assert values["even"]["order"] == pytest.approx(0)
    assert values["one"]["peak"] == pytest.approx(np.log(16))
    assert [values["one"][name] for name in ("order", "region_share", "agreement")] == pytest.approx([1, 1, 1])
    assert [values["half"][name] for name in ("order", "region_share", "agreement")] == pytest.approx([0.75, 0.5, 0.5])
    assert values["dim"]["image_share"] == pytest.approx(np.log(0.251 / 0.751))
    for name in ("peak", "order", "region_share", "agreement"):
        assert values["dim"][name] == pytest.approx(values["one"][name], abs=1e-5)
    finer = torch.nn.functional.interpolate(even, scale_factor=2) / 4
    np.testing.assert_allclose(map_features(finer, 0.9)[0], list(values["even"].values()), atol=1e-6)
    assert map_features(torch.zeros(2, 1, 4, 4), 0.9).isfinite().all()


# --- phrases ---


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is there a dog in the image?", "Yes", ["dog"]),
        ("Is there no dog in the image?", "No, there is no dog.", ["dog", "dog"]),
        ("Which objects are in this image?", "bell, red bell", ["bell", "red bell"]),
        ("Where is it?", "top left", []),
    ],
)
def test_noun_phrases_are_things_that_an_image_can_show(question, answer, expected):
    found = noun_phrases(question, answer)
    assert [phrase.text for phrase in found] == expected
    for phrase in found:
        assert {"question": question, "answer": answer}[phrase.source][phrase.start : phrase.end] == phrase.text


def test_equal_words_are_grounded_each_at_its_own_place(parts):
    model, processor = parts
    found = ground(model, processor, picture(), f" {QUESTION}\n", "A dog", calibration=made_calibration(threshold=0.1))
    assert [(phrase.text, phrase.source) for phrase in found.phrases] == [
        ("dog", "question"), ("dog", "question"), ("dog", "answer"),
    ]  # fmt: skip
    assert [phrase.start for phrase in found.phrases] == [11, 26, 2]
    assert QUESTION[11:14] == QUESTION[26:29] == "dog"
    assert len({tuple(phrase.point) for phrase in found.phrases}) == 3


# --- replies ---


def test_a_reply_is_grounded_without_another_pass(parts, monkeypatch):
    model, processor = parts
    image = picture(60, 30)
    first = {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "A dog?"}]}
    content = [{"type": "image", "image": image}, {"type": "text", "text": "And the cat?"}]
    messages = [first, {"role": "assistant", "content": "No."}, {"role": "user", "content": content}]
    (found,) = reply(model, processor, [messages], max_new_tokens=5, maps=True)
    monkeypatch.setattr(type(model), "forward", None)
    grounded = ground_reply(model, processor, found, "And the cat?", ["cat"], image=1, calibration=Calibration())
    start = found.prompt.index("cat")
    attention = found.maps.on_image(found.maps.of_span(start, start + 3), 1).mean(0)
    row, column = np.unravel_index(int(attention.argmax()), attention.shape)
    cells = attention >= 0.5 * attention.max()
    labels, _ = ndimage.label(cells, np.ones((3, 3)))
    rows, columns = ndimage.find_objects(labels)[labels[row, column] - 1]
    # The image fills the width of the square and half of its height: cells of 15x15 pixels.
    expected = [columns.start * 15, rows.start * 15, columns.stop * 15, rows.stop * 15]
    assert grounded.phrases[0].box == pytest.approx(expected)
    assert grounded.image.size == (60, 30)
    early = ground_reply(model, processor, found, "A dog?", image=1, calibration=Calibration())
    assert early.phrases[0].point is None, "the second image is after it"
    with pytest.raises(ValueError, match="has 2 images, and none with the number 2"):
        ground_reply(model, processor, found, "A dog?", image=2)


@pytest.mark.parametrize("which", ["parts", "sink_parts"])
def test_confidence_of_models_with_and_without_a_sink(which, request):
    """The made calibration reads the share of the attention on the image; without a sink all of it is there."""
    model, processor = request.getfixturevalue(which)
    found = ground(model, processor, picture(), QUESTION, "Yes", calibration=made_calibration())
    (written,) = reply(model, processor, [[{"role": "user", "content": [
        {"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]}]], max_new_tokens=1, maps=True)  # fmt: skip
    for phrase in found.phrases:
        start = written.prompt.index(QUESTION) + phrase.start
        share = float(written.maps.of_span(start, start + 3).sum(1).mean())
        assert phrase.confidence == pytest.approx((share + 1e-3) / (1 + 2e-3), abs=1e-3)
        assert phrase.there == (phrase.confidence >= 0.5)
        assert which == "sink_parts" or phrase.confidence > 0.99


def test_json(parts):
    found = ground(*parts, picture(40, 30), QUESTION, "A dog", calibration=made_calibration())
    content = json.loads(json.dumps(found.to_dict()))
    assert content == found.to_dict()
    assert set(content) == {"question", "answer", "image_size", "phrases", "reason"}
    assert content["image_size"] == {"width": 40, "height": 30}
    for phrase in content["phrases"]:
        assert set(phrase) == {"text", "source", "start", "end", "point", "box", "confidence", "there"}
        assert content[phrase["source"]][phrase["start"] : phrase["end"]] == phrase["text"]
        left, top, right, bottom = phrase["box"]
        x, y = phrase["point"]
        assert 0 <= left < x < right <= 40
        assert 0 <= top < y < bottom <= 30
        assert 0 <= phrase["confidence"] <= 1
        assert isinstance(phrase["there"], bool)


def test_an_image_is_turned_upright(parts):
    image = picture(40, 30)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # turn it by 90 degrees to the right
    expected = ground(*parts, image, QUESTION, "Yes").to_dict()
    assert ground(*parts, turned, QUESTION, "Yes").to_dict() == expected


# --- calibrations ---


def test_a_calibration_is_of_the_weights_that_it_was_made_for(tmp_path, parts):
    model, processor = copy.deepcopy(parts)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert "has no grounding.json: run `agevlm calibrate" in find_calibration(loaded).reason
    layers = (cross_attention_layers(model.config)[1],)
    made = made_calibration(loaded, layers=layers, threshold=0.3, point="peak", data={"split": "validation"})
    made.save(tmp_path)
    assert find_calibration(loaded) == made
    half = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert find_calibration(half) == made
    half.to(torch.bfloat16)
    assert find_calibration(half) == made
    assert ground(loaded, processor, picture(), QUESTION, "Yes").phrases[0].confidence is not None

    with torch.no_grad():
        next(iter(loaded.model.language_model.cross_attn.values())).q_proj.weight[0, 0] += 0.1
    stale = ground(loaded, processor, picture(), QUESTION, "Yes")
    assert "was made for other weights: run `agevlm calibrate" in stale.reason
    assert {(phrase.confidence, phrase.there) for phrase in stale.phrases} == {(None, None)}
    loaded.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "grounding.json").exists()
    (tmp_path / "grounding.json").rename(tmp_path / "trained" / "grounding.json")
    assert find_calibration(loaded, tmp_path / "trained").features == {}


def test_weights_are_read_again_only_when_they_have_changed(parts, monkeypatch):
    model, _ = copy.deepcopy(parts)
    digests, real = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: digests.append(1) or real(*data))
    weight = next(iter(model.model.language_model.cross_attn.values())).q_proj.weight
    found = [trained_fingerprint(model) for _ in range(3)]
    assert (len(set(found)), len(digests)) == (1, 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=0.1)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found.append(trained_fingerprint(model))
    with torch.no_grad():
        weight.mul_(2)
    found.append(trained_fingerprint(model))
    assert len(set(found)) == len(digests) == 3
    model.load_state_dict(state)
    assert trained_fingerprint(model) == found[0]
    weight.data = weight.data * 2  # as `to` gives other values
    assert trained_fingerprint(model) not in found


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"weights": 1}', "cut", "nan", "threshold", "layer", "no layer"])
def test_a_damaged_calibration_is_refused(tmp_path, parts, damage):
    model, _ = parts
    file = tmp_path / "grounding.json"
    made_calibration(model).save(tmp_path)
    whole = json.loads(file.read_text())
    if damage == "nan":
        whole["bias"] = float("nan")
    elif damage == "threshold":
        whole["threshold"] = 0
    elif damage == "layer":
        whole["layers"] = [77]
    elif damage == "no layer":
        whole["layers"] = []
    file.write_text(file.read_text()[:50] if damage == "cut" else damage if damage[:1] in "[{" else json.dumps(whole))
    with pytest.raises(ValueError, match=r"grounding.json is damaged .*agevlm calibrate"):
        find_calibration(model, tmp_path)
