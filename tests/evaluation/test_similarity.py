# SPDX-License-Identifier: Apache-2.0
"""Matching against random pairs: what is compared, its numbers, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run
from datasets import Dataset
from evaluation_cases import age_vlm, llava
from PIL import Image

from agevlm.evaluation.similarity import Pair, Similarity, measure_similarity, other_images, text_pairs
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention
from agevlm.processing.rows import mask_to_rle

ANSWERS = ("a brown dog", "two cats", "a red sofa and one dog", "Paris", "nothing but a white cat")


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def rows(kind: str | None = "objects") -> Dataset:
    """Five images, each with a question and an answer; with `kind`, as grounded scenes."""
    examples = [
        {
            "images": [picture(number)],
            "messages": [
                {"role": "user", "content": "What is in this image?"},
                {"role": "assistant", "content": answer},
            ],
            **({} if kind is None else {"kind": kind, "scene": 10 + number}),
        }
        for number, answer in enumerate(ANSWERS)
    ]
    return Dataset.from_list(examples)


def gates(model, value: float):
    for module in model.modules():
        if isinstance(module, AgeVlmCrossAttention):
            module.gate.data.fill_(value)
    return model


@torch.no_grad()
def state(model, processor, prompt: str, answer: str, image: Image.Image | None) -> torch.Tensor:
    """The answer's hidden states, one text at a time, from the layer's own parts: its input, and what its self-attention adds."""
    content = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    # The tokenizer adds its special tokens where the template has not written them.
    settings = {"add_special_tokens": not text.startswith(processor.tokenizer.bos_token), "return_tensors": "pt"}
    if image is None:
        inputs = processor.tokenizer(text, **settings)
    else:
        inputs = processor(images=image, text=text, **settings)
    layer, seen = model.get_decoder().layers[-1], {}
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda module, args: seen.update(before=args[0])),
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.update(added=output[0])),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    # The shortest run of tokens, from the end, that reads as the answer.
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    read = processor.tokenizer.decode
    length = next(n for n in range(1, len(ids)) if answer in read(ids[-n:]))
    after = next(n for n in range(length, -1, -1) if answer in read(ids[-length : len(ids) - n]))
    states = (seen["before"] + seen["added"])[0]
    return states[-length : len(states) - after]


@pytest.mark.parametrize("build", [age_vlm, llava])
def test_similarities_are_those_of_each_text_alone(build):
    model, processor = build()
    model = model.eval()
    data = rows(None)
    found = measure_similarity(model, processor, data, batch_size=3, progress=None)
    pairs, load = text_pairs(data)
    others = other_images(pairs)
    for number, pair in enumerate(pairs):
        right, wrong, without = (
            state(model, processor, pair.prompt, pair.text, image)
            for image in (load(pair.image), load(others[number]), None)
        )
        for got, a, b in (
            (found.matching, right, without),
            (found.random, wrong, without),
            (found.between, right, wrong),
        ):
            expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            assert got[number] == pytest.approx(float(expected), abs=1e-5)
    assert found.between.max() < 1 - 1e-6  # these models use their image


def test_a_model_that_ignores_its_image_sees_no_difference():
    model, processor = age_vlm()
    found = measure_similarity(gates(model, 0.0).eval(), processor, rows(None), progress=None)
    np.testing.assert_allclose(found.between, 1.0, atol=1e-6)
    # Without an image the text lacks the token that stands for it, which is the same for all images.
    np.testing.assert_array_equal(found.matching, found.random)
    assert found.auroc == pytest.approx(0.5)


def test_texts_about_one_image_share_its_features():
    model, processor = age_vlm()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    data = rows(None)
    twice = Dataset.from_list([{**row, "images": [picture(number // 2)]} for number, row in enumerate(data)])
    found = measure_similarity(model, processor, twice, batch_size=5, progress=None)
    pairs, _ = text_pairs(twice)
    others = {image // 2 for image in other_images(pairs)}
    assert seen == [3, len(others)]  # the matching images, and the random ones
    alone = measure_similarity(model, processor, twice, batch_size=1, progress=None)
    for name in ("matching", "random", "between"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-5)


def test_numbers_by_hand():
    # The matching images move the states by 0.5, 0.3, 0.1, the random ones by 0.4, 0.1: won 1 + 1, 0 + 1, 0 + half of 6.
    found = Similarity(np.array([0.5, 0.7, 0.9]), np.array([0.6, 0.9]), np.array([0.2, 0.4, 0.9]))
    assert found.auroc == pytest.approx((2 + 1 + 0.5) / 6)
    # Both have one of their values at 0.9 and no other bin in common.
    assert found.overlap == pytest.approx(1 / 3)
    assert found.summary()["matching_mean"] == pytest.approx(0.7)
    assert found.summary()["between_mean"] == pytest.approx(0.5)
    assert found.summary()["pairs"] == 3
    alike = Similarity(*(np.array([0.1, 0.2, 0.3]) for _ in range(3)))
    assert alike.auroc == pytest.approx(0.5)
    assert alike.overlap == pytest.approx(1.0)
    separated = Similarity(np.array([0.1, 0.2]), np.array([0.8, 0.9]), np.array([0.0, 0.0]))
    assert separated.auroc == 1.0
    assert separated.overlap == 0.0


def test_random_images_are_of_other_texts():
    pairs = [Pair(image, "What?", text) for image, text in enumerate(["a dog", "a dog", "a cat", "a car"])]
    drawn = np.array([other_images(pairs, seed) for seed in range(50)])
    assert {tuple(sorted(set(column))) for column in drawn[:, :2].T} == {(2, 3)}
    assert set(drawn[:, 2]) == {0, 1, 3}
    assert other_images(pairs, 7) == other_images(pairs, 7)


def test_random_images_show_nothing_of_the_text():
    """Images that show some of what a text names are not random ones for it; what is grounded nowhere counts for nothing."""
    shown = [{"dog"}, {"dog", "cat"}, {"cat"}, {"car"}, {"dog", "car", "cat"}]
    pairs = [Pair(image, "What?", f"text {image}", frozenset(names)) for image, names in enumerate(shown)]
    drawn = np.array([other_images(pairs, seed) for seed in range(50)])
    assert [set(column) for column in drawn[:, :4].T] == [{2, 3}, {3}, {0, 3}, {0, 1, 2}]
    assert set(drawn[:, 4]) == {0, 1, 2, 3}  # each shows something of it

    def entry(mask: list[list[bool]], start: int, end: int) -> dict:
        return {"message": 1, "start": start, "end": end, "image": 0, "box": None, "mask": mask_to_rle(np.array(mask))}

    grounding = [
        [entry([[True]], 2, 11), entry([[False]], 0, 1)],  # "brown dog", and "a" which is not there
        [{**entry([[True]], 4, 8), "mask": None}],  # "cats", with no mask
        *([] for _ in range(3)),
    ]
    named, _ = text_pairs(rows().add_column("grounding", [[*entries] for entries in grounding]))
    assert [pair.names for pair in named] == [{"brown dog"}, {"cats"}, set(), set(), set()]


def test_scenes_are_asked_for_their_objects_only():
    data = rows().add_column("extra", list(range(5)))
    data = data.map(lambda row: {"kind": "objects" if row["scene"] % 2 == 0 else "count"})
    pairs, load = text_pairs(data)
    assert [pair.image for pair in pairs] == [10, 12, 14]
    assert [pair.text for pair in pairs] == [ANSWERS[0], ANSWERS[2], ANSWERS[4]]
    assert np.array_equal(np.asarray(load(12)), np.asarray(picture(2)))
    assert len(text_pairs(data, 2)[0]) == 2


def test_rows_without_one_image_are_dropped():
    images = [[], [picture(1)], [picture(2), picture(3)], [picture(4)], None]
    data = Dataset.from_list([{**row, "images": some} for row, some in zip(rows(None), images, strict=True)])
    pairs, load = text_pairs(data)
    assert [pair.text for pair in pairs] == [ANSWERS[1], ANSWERS[3]]
    assert np.array_equal(load(3), picture(4))
    with pytest.raises(ValueError, match=r"at least two rows with one image each .*Found 0 rows"):
        text_pairs(data.select([0, 2, 4]))


def test_too_few_texts_and_other_decoders_are_refused():
    with pytest.raises(ValueError, match=r"at least two rows with one image each .*different answers\. Found 1 rows"):
        text_pairs(rows().select([0]))
    with pytest.raises(
        ValueError, match=r"at least two rows with one image each .*The data lacks images; it has kind, "
    ):
        text_pairs(rows().select_columns(["kind", "messages"]))
    model, processor = age_vlm()
    layer = SimpleNamespace()
    model.get_decoder = lambda: SimpleNamespace(layers=[layer])
    with pytest.raises(ValueError, match="SimpleNamespace has no post_attention_layernorm"):
        measure_similarity(model, processor, rows(None), progress=None)


@pytest.mark.parametrize("build", [age_vlm, llava])
def test_the_command(build, tmp_path, monkeypatch, capsys):
    model, processor = build()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    rows(None).save_to_disk(tmp_path / "rows")

    command = ("similarity", "--model", tmp_path / "model")
    given = (*command, "--data", tmp_path / "rows")
    code, printed = run(monkeypatch, capsys, *given, "--out", tmp_path / "out", "--batch-size", 2)
    assert code == 0, printed
    assert "AUROC" in printed
    written = json.loads((tmp_path / "out" / "similarity.json").read_text())
    expected = measure_similarity(model.eval(), processor, rows(None), progress=None)
    assert written["auroc"] == pytest.approx(expected.auroc)
    assert f"{expected.overlap:.3f}" in printed
    np.testing.assert_allclose(written["matching"], expected.matching, atol=1e-5)
    assert (tmp_path / "out" / "similarity.png").is_file()

    code, printed = run(monkeypatch, capsys, *given, "--out", tmp_path / "out")
    assert (code, "already exists" in printed) == (2, True)
    code, printed = run(monkeypatch, capsys, *command, "--data", tmp_path / "none", "--out", tmp_path / "other")
    assert (code, "none" in printed) == (2, True)
    assert not (tmp_path / "other").exists()
