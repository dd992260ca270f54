# SPDX-License-Identifier: Apache-2.0
"""Where words of a question and its answer look: the maps, their places in the image, the command."""

import copy
import json
import re
import sys

import numpy as np
import pytest
import torch
from command_line import run
from evaluation_cases import llava
from figures import drawn_figures
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tiny import IMAGE, tiny_tokenizer
from tiny_models import GRID, open_gates, tiny_llama, tiny_vision
from tokenizers import processors

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.evaluation.answers import Question, answer_batch
from agevlm.inference import attention as attention_maps
from agevlm.inference.attention import (
    Phrase,
    attend,
    choose_phrases,
    find_phrase,
    find_question,
)
from agevlm.inference.generation import render_chat, render_question
from agevlm.inference.replies import block_titles, decode_with_offsets
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE

SIZE = 32  # pixels; the tiny tower makes 4x4 tokens of them
QUESTION = "Is there a dog, or is the Dog not there?"


def build(chat_template=DEFAULT_CHAT_TEMPLATE, **config):
    """A model that says nothing but letters and spaces, so that the text shows its tokens without a tokenizer."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    llama = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id, **config)
    model.generation_config.suppress_tokens = [
        token for token in range(len(tokenizer)) if not re.fullmatch(" ?[A-Za-z]+", tokenizer.decode([token]))
    ]
    return open_gates(model), processor


@pytest.fixture(scope="module")
def parts():
    return build()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, parts):
    """The model as a checkpoint, and a LLaVA."""
    place = tmp_path_factory.mktemp("models")
    for part in parts:
        part.save_pretrained(place / "age_vlm")
    for part in llava():
        part.save_pretrained(place / "llava")
    picture().save(place / "picture.png")
    return place


def picture(width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_ids(processor, question) -> list[int]:
    """As Transformers tokenizes a conversation."""
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return inputs["input_ids"][0]


@torch.no_grad()
def greedy(model, processor, ids: list[int], length: int) -> list[int]:
    """`ids` and what follows, a token at a time and without a cache."""
    pixels = processor.image_processor(picture(), return_tensors="pt")
    for _ in range(length):
        logits = model(input_ids=torch.tensor([ids]), **pixels).logits[0, -1]
        logits[model.generation_config.suppress_tokens] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return ids


@torch.no_grad()
def eager_maps(model, processor, ids: list[int]) -> np.ndarray:
    """Attention of each token `(blocks, tokens, rows, columns)`: eager attention's own weights, the mean of the heads."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    pixels = processor.image_processor(picture(), return_tensors="pt")
    weights = model(input_ids=torch.tensor([ids]), output_attentions=True, **pixels).cross_attentions
    return torch.stack(weights).mean(2)[:, 0].unflatten(-1, GRID).numpy()


def places(processor, ids: list[int], span: tuple[int, int]) -> list[int]:
    """Which of the tokens hold some of the characters of a text that `ids` spell, one after another."""
    ends = np.cumsum([len(processor.tokenizer.decode([token])) for token in ids])
    starts = [0, *ends[:-1]]
    return [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < span[1] and end > span[0]]


# --- maps ---


@pytest.mark.parametrize("predicting", [False, True])
def test_maps_of_generated_words_are_the_attention_of_their_tokens(parts, predicting):
    model, processor = parts
    asked = prompt_ids(processor, QUESTION)
    ids = greedy(model, processor, asked, 12)
    answer = processor.tokenizer.decode(ids[len(asked) :])
    weights = eager_maps(model, processor, ids)

    attention = attend(model, processor, picture(), QUESTION, predicting=predicting, max_new_tokens=12)
    assert attention.answer == answer
    words = answer.split()
    assert [phrase.text for phrase in attention.phrases] == words
    assert attention.maps.shape == (len(block_titles(model)), len(words), *GRID)
    end, lengths = 0, set()
    for number, word in enumerate(words):
        start = answer.index(word, end)
        end = start + len(word)
        rows = [len(asked) + i for i in places(processor, ids[len(asked) :], (start, end))]
        assert attention.tokens[number] == [processor.tokenizer.decode([ids[row]]) for row in rows]
        rows = [row - predicting for row in rows]
        np.testing.assert_allclose(attention.maps[:, number], weights[:, rows].mean(1), atol=1e-5)
        lengths.add(len(rows))
    assert len(words) > 2
    assert max(lengths) > 1, "a word of several tokens is averaged"
    differences = np.abs(np.diff(weights[:, len(asked) :], axis=1)).max((0, 2, 3))
    assert (differences > 1e-3).all(), "each token looks elsewhere, so that a shift would show"


def test_maps_are_of_the_tokens_that_were_generated_and_not_of_those_their_text_would_have(parts, monkeypatch):
    model, processor = parts
    tokenizer = processor.tokenizer
    asked = prompt_ids(processor, QUESTION)
    said = [token for letter in "dogcat" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert len(tokenizer("dogcat", add_special_tokens=False)["input_ids"]) < len(said) == 6
    left = iter(said)

    def choose(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(left)]), 0.0)

    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: generate(**{**kwargs, "max_new_tokens": 6, "logits_processor": [choose]})
    )
    attention = attend(model, processor, picture(), QUESTION, phrases=["cat"])
    assert attention.tokens == [["c", "a", "t"]]
    weights = eager_maps(model, processor, [*asked, *said])[:, -3:].mean(1)
    np.testing.assert_allclose(attention.maps[:, 0], weights, atol=1e-5)


@pytest.mark.parametrize("answer", [None, "A dog is there"])
def test_maps_of_the_question_are_those_of_its_tokens_whatever_the_answer(parts, answer):
    model, processor = parts
    asked = prompt_ids(processor, QUESTION)
    text = render_question(processor, QUESTION)
    phrase = "or is the Dog"
    rows = places(processor, asked, find_phrase(text, phrase))
    expected = eager_maps(model, processor, asked)[:, rows].mean(1)
    for predicting in (False, True):  # nothing predicts a question
        options = {"phrases": [phrase], "predicting": predicting, "max_new_tokens": 3}
        attention = attend(model, processor, picture(), QUESTION, answer, **options)
        assert [phrase.source for phrase in attention.phrases] == ["question"]
        np.testing.assert_allclose(attention.maps[:, 0], expected, atol=1e-5)


def test_maps_of_a_given_answer(parts):
    model, processor = parts
    answer = "A dog is there"
    asked = prompt_ids(processor, QUESTION)
    ids = [*asked, *processor.tokenizer(answer, add_special_tokens=False)["input_ids"]]
    attention = attend(model, processor, picture(), QUESTION, answer)
    weights = eager_maps(model, processor, ids)[:, len(asked) :]
    for number, word in enumerate(("A", "dog", "is", "there")):
        start = answer.index(word)
        rows = places(processor, ids[len(asked) :], (start, start + len(word)))
        np.testing.assert_allclose(attention.maps[:, number], weights[:, rows].mean(1), atol=1e-5)


def without_bos(template: str) -> str:
    return template.replace("{{ bos_token or '' }}", "")


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, without_bos(DEFAULT_CHAT_TEMPLATE)])
@pytest.mark.parametrize("way", ["attend", "answer_batch"])
def test_the_special_tokens_are_those_that_the_chat_template_writes(template, way):
    """The tokenizer would add a BOS token, as Llama 3's does, to the one that the template has written or not."""
    model, processor = build(template)
    tokenizer = processor.tokenizer
    text = render_question(processor, QUESTION)
    assert text.count(tokenizer.bos_token) == (template == DEFAULT_CHAT_TEMPLATE)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    if way == "attend":
        attend(model, processor, picture(), QUESTION, max_new_tokens=2)
    else:
        answer_batch(model, processor, [Question("q", picture, QUESTION)], 2)
    prompts = [ids for ids in seen if len(ids) > 1]  # in generation, the later tokens come alone
    assert prompts
    for ids in prompts:
        written = tokenizer.decode(ids)
        assert written.startswith(text)
        assert written.count(tokenizer.bos_token) == text.count(tokenizer.bos_token)


# --- phrases ---


def test_phrases_are_looked_for_in_the_answer_and_then_in_the_question():
    question, answer = "Is the dog a dog?", "The dog is not a DOG, there's no sofa-bed."
    chosen = choose_phrases(question, answer, ["dog", "the dog", "Is the", "a dog?", "."])
    found = [(phrase.source, phrase.start, phrase.text) for phrase in chosen]
    assert found == [
        ("answer", 17, "DOG"),  # the last place, in its own spelling
        ("answer", 0, "The dog"),
        ("question", 0, "Is the"),
        ("question", 11, "a dog?"),
        ("answer", 41, "."),
    ]
    words = ["The", "dog", "is", "not", "a", "DOG", "there's", "no", "sofa-bed"]
    assert [phrase.text for phrase in choose_phrases(question, answer)] == words
    for phrase in choose_phrases(question, answer):
        assert answer[phrase.start : phrase.end] == phrase.text
    assert choose_phrases(question, answer, [Phrase("dog", "question", 7, 10)]) == [Phrase("dog", "question", 7, 10)]
    for phrase in ("cat", ""):
        with pytest.raises(ValueError, match=f"'{phrase}' occurs neither in the question .* choose words"):
            choose_phrases(question, answer, [phrase])
    for empty in ("", " ?!"):
        with pytest.raises(ValueError, match="has no words: name words of the question"):
            choose_phrases(question, empty)


def test_letters_that_change_their_length_move_no_phrase():
    assert len("İ".lower()) == 2
    assert find_phrase("A dog, a Dog?", "dog") == (9, 12)
    assert find_phrase("İİ dog", "Dog") == (3, 6)
    assert find_phrase("a.a dog? a(", "a(") == (9, 11)


def test_a_phrase_without_a_token(parts):
    model, processor = parts
    trimmed = copy.deepcopy(processor)  # offsets without the space before a word, as some tokenizers have them
    trimmed.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    with pytest.raises(ValueError, match="' ' of the question has no token: choose words"):
        attend(model, trimmed, picture(), "Is there a dog?", "Yes", [" "])


@pytest.mark.parametrize(
    "text",
    ["A brown dog and a white cat.", "  two  spaces\n", "naïve café: 犬と猫 🦄🦄!", "", "🦄"],
)
def test_offsets_of_tokens_are_the_tokenizers_own(text):
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    decoded, offsets = decode_with_offsets(tokenizer, encoded["input_ids"])
    assert decoded == text
    assert [tuple(pair) for pair in offsets.tolist()] == encoded["offset_mapping"]


def test_special_tokens_have_no_characters():
    tokenizer = tiny_tokenizer()
    words = tokenizer("dog cat", add_special_tokens=False, return_offsets_mapping=True)
    ids = [tokenizer.bos_token_id, *words["input_ids"], tokenizer.eos_token_id, tokenizer.eos_token_id]
    text, offsets = decode_with_offsets(tokenizer, ids)
    assert text == "dog cat"
    assert [tuple(pair) for pair in offsets.tolist()] == [(0, 0), *words["offset_mapping"], (7, 7), (7, 7)]


def test_a_character_that_was_not_generated_to_its_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("dog 🦄", add_special_tokens=False)["input_ids"]
    text, offsets = decode_with_offsets(tokenizer, ids[:-1])
    assert text == "dog \ufffd"
    assert offsets[-1].tolist() == [4, 5]
    assert offsets.shape == (len(ids) - 1, 2)


# --- places in the image ---


@pytest.mark.parametrize(("width", "height", "cells"), [(50, 50, (4, 4)), (60, 30, (2, 4)), (10, 40, (4, 1))])
def test_maps_lie_on_the_image(parts, width, height, cells):
    model, processor = parts
    maps = attend(model, processor, picture(width, height), QUESTION, "", ["dog", QUESTION]).maps
    assert maps.shape == (len(block_titles(model)), 2, *cells)
    np.testing.assert_allclose(maps.sum((-2, -1)), 1, atol=1e-5)  # nothing is lost with the padding


@pytest.mark.parametrize(("width", "height"), [(32, 32), (50, 33), (33, 50), (200, 61), (9, 70)])
def test_cells_are_where_the_image_processor_puts_their_pixels(parts, width, height):
    """White pixels in a cell's box, and nowhere else, arrive in that cell."""
    model, processor = parts
    attention = attend(model, processor, picture(width, height), QUESTION, "Yes")
    rows, columns = attention.maps.shape[2:]
    scale = 8  # in a larger copy, so that the box can be cut to the pixel
    dark = Image.new("RGB", (scale * width, scale * height))
    black = processor.image_processor(dark, return_tensors="pt")["pixel_values"]
    for row in range(rows):
        for column in range(columns):
            peak = np.zeros((rows, columns))
            peak[row, column] = 0.5
            strongest = attention.strongest(peak)
            assert (strongest["row"], strongest["column"], strongest["attention"]) == (row, column, 0.5)
            left, top, right, bottom = strongest["box"]
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            image = dark.copy()
            image.paste("white", [round(scale * side) for side in (left, top, right, bottom)])
            pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            light = torch.nn.functional.adaptive_avg_pool2d((pixels - black).mean(1), GRID)[0]
            assert light.argmax() == row * GRID[1] + column
            assert light[row, column] > 0.85 * light.sum()  # the rest is resampling at the border
    boxes = [attention.strongest(np.eye(1, rows * columns, i).reshape(rows, columns)) for i in (0, rows * columns - 1)]
    assert boxes[0]["box"][:2] == [0, 0]
    assert boxes[1]["box"][2:] == [width, height]  # the cells cover all of the image


def test_everything_is_in_the_json(parts):
    model, processor = parts
    attention = attend(model, processor, picture(60, 30), QUESTION, "A dog is there", ["dog", "or is"])
    content = json.loads(json.dumps(attention.to_dict()))
    assert content["image_size"] == {"width": 60, "height": 30}
    assert content["grid"] == {"rows": 2, "columns": 4}
    assert content["cell"] == {"width": 15, "height": 15}
    for number, (text, source, whole) in enumerate(
        [("dog", "answer", "A dog is there"), ("or is", "question", QUESTION)]
    ):
        phrase = content["phrases"][number]
        assert (phrase["phrase"], phrase["in"]) == (text, source)
        assert content[source][phrase["start"] : phrase["end"]] == whole[phrase["start"] : phrase["end"]] == text
        assert "".join(phrase["tokens"]).strip() == text
        *blocks, average = phrase["maps"]
        assert [entry["block"] for entry in phrase["maps"]] == [*block_titles(model), "average"]
        maps = np.array([entry["map"] for entry in blocks])
        np.testing.assert_allclose(maps, attention.maps[:, number], atol=1e-7)
        np.testing.assert_allclose(average["map"], maps.mean(0), atol=1e-7)
        for entry in phrase["maps"]:
            cells, strongest = np.array(entry["map"]), entry["strongest"]
            assert strongest["attention"] == pytest.approx(cells.max(), abs=1e-7)
            x, y = 15 * strongest["column"], 15 * strongest["row"]
            assert strongest["box"] == [x, y, x + 15, y + 15]
            assert cells[strongest["row"], strongest["column"]] == cells.max()


def test_the_sinks_share_is_what_is_not_on_the_image(monkeypatch, tmp_path):
    """Against eager attention's own weights."""
    model, processor = build(cross_attention_sink=True)
    text = "A dog"
    found = attend(model, processor, picture(), QUESTION, text, ["dog", "or is"])
    prompt = render_question(processor, QUESTION)
    ids = processor.tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    on_image = eager_maps(model, processor, ids).sum((2, 3))
    for number, start in enumerate((len(prompt) + text.index("dog"), prompt.index("or is"))):
        chosen = places(processor, ids, (start, start + len(found.phrases[number].text)))
        np.testing.assert_allclose(found.sink[:, number], 1 - on_image[:, chosen].mean(1), atol=1e-5)
    assert 0.001 < found.sink.min() < found.sink.max() < 0.999
    wide = attend(model, processor, picture(60, 30), QUESTION, text)  # cells are cut off the map, and they are padding
    np.testing.assert_allclose(wide.sink + wide.maps.sum((2, 3)), 1, atol=1e-5)
    for number, phrase in enumerate(found.to_dict()["phrases"]):
        *blocks, average = [entry["sink"] for entry in phrase["maps"]]
        np.testing.assert_allclose(blocks, found.sink[:, number], atol=1e-7)
        assert average == pytest.approx(np.mean(blocks), abs=1e-7)
    drawn = drawn_figures(monkeypatch)
    found.draw(tmp_path / "x.png")
    shown = [axis.get_title().split("\n")[-1] for axis in drawn[0].axes if "sink" in axis.get_title()]
    expected = np.concatenate([found.sink, found.sink.mean(0, keepdims=True)]).T.flatten()
    assert shown == [f"sink {share:.2f}" for share in expected]


def test_a_model_without_a_sink_has_no_share_of_it(parts, monkeypatch, tmp_path):
    found = attend(*parts, picture(), QUESTION, "Yes")
    assert found.sink is None
    assert "sink" not in json.dumps(found.to_dict())
    drawn = drawn_figures(monkeypatch)
    found.draw(tmp_path / "x.png")
    assert not any("sink" in axis.get_title() for axis in drawn[0].axes)


# --- figures ---


@pytest.mark.parametrize(
    ("count", "width", "height"), [(1, 60, 30), (3, 30, 60), (4, 32, 32), (12, 20, 90), (30, 90, 20)]
)
def test_a_figure_has_a_row_a_phrase_and_nothing_overlaps(parts, tmp_path, monkeypatch, count, width, height):
    model, processor = parts
    words = ["there", "extraordinarily", "$5", "a_b^c", "dog"]
    answer = " ".join(words[i % len(words)] for i in range(count))
    wanted = None if count > 4 else words[:count]
    attention = attend(model, processor, picture(width, height), QUESTION * 3, answer, wanted)
    drawn = drawn_figures(monkeypatch)
    attention.draw(tmp_path / "attention.png")
    (figure,) = drawn
    columns = len(block_titles(model)) + 2  # the image, the blocks, their average
    *panels, bar = figure.axes
    assert len(panels) == min(len(attention.phrases), 12) * columns
    labels = [axis.get_title().replace("\n", " ") for axis in panels[::columns]]
    assert labels == [f"{phrase.text} ({phrase.source})" for phrase in attention.phrases[:12]]
    titles = [axis.get_title().split("\n")[0] for axis in panels[1:columns]]
    assert titles == [*block_titles(model), "average"]
    if len(attention.phrases) > 12:
        assert f"the first 12 of {len(attention.phrases)} phrases" in figure.get_suptitle()

    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [axis.title for axis in panels] + [figure._suptitle]
    boxes = [artist.get_window_extent(renderer) for artist in [*texts, *panels]]
    boxes.append(bar.get_tightbbox(renderer))
    for i, box in enumerate(boxes):
        assert box.width * box.height > 100
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            apart = box.x0 >= other.x1 or other.x0 >= box.x1 or box.y0 >= other.y1 or other.y0 >= box.y1
            assert apart, (box, other)
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width <= 1800
        assert image.height <= 3000


def test_without_matplotlib(parts, tmp_path, monkeypatch):
    model, processor = parts
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    attention = attend(model, processor, picture(), QUESTION, "Yes")
    with pytest.raises(ImportError, match="pip install 'agevlm"):
        attention.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- the commands ---


@pytest.mark.parametrize("predicting", [False, True])
def test_command(monkeypatch, capsys, tmp_path, folders, parts, predicting):
    model, processor = parts
    image, out = folders / "picture.png", tmp_path / "new" / "out"
    code, printed = run(
        monkeypatch, capsys, "attention", "--model", folders / "age_vlm", "--image", image, f" {QUESTION} ",
        "--max-new-tokens", 9, "--out", out, *["--predicting"] * predicting,
    )  # fmt: skip
    assert code == 0, printed
    expected = attend(model, processor, picture(), QUESTION, predicting=predicting, max_new_tokens=9)
    content = json.loads((out / "attention.json").read_text())
    wanted = {
        "model": str(folders / "age_vlm"),
        "image": str(image),
        "generated": True,
        "predicting": predicting,
        **expected.to_dict(),
    }
    maps = [
        np.array([block.pop("map") for phrase in found["phrases"] for block in phrase["maps"]])
        for found in (content, wanted)
    ]
    np.testing.assert_allclose(*maps, atol=1e-6)
    attention = [
        [block["strongest"].pop("attention") for phrase in found["phrases"] for block in phrase["maps"]]
        for found in (content, wanted)
    ]
    np.testing.assert_allclose(*attention, atol=1e-6)
    assert content == wanted
    assert expected.answer.strip() in printed
    assert sorted(file.name for file in out.iterdir()) == ["attention.json", "attention.png"]
    expected.draw(tmp_path / "expected.png")
    pictures = [np.asarray(Image.open(file), dtype=int) for file in (out / "attention.png", tmp_path / "expected.png")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_command_with_phrases_of_question_and_answer(monkeypatch, capsys, tmp_path, folders):
    code, printed = run(
        monkeypatch, capsys, "attention", "--model", folders / "age_vlm", "--image", folders / "picture.png", QUESTION,
        "--answer", "Yes, a dog.", "--phrase", "DOG", "--phrase", "not there", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, printed
    content = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert (content["answer"], content["generated"]) == ("Yes, a dog.", False)
    found = [(phrase["phrase"], phrase["in"], phrase["start"]) for phrase in content["phrases"]]
    assert found == [("dog", "answer", 7), ("not there", "question", QUESTION.index("not there"))]


@pytest.mark.parametrize("phrase", ["dog", None])
def test_ask_draws_the_maps_of_the_question(monkeypatch, capsys, tmp_path, folders, parts, phrase):
    """With one pass of the image through the tower, and the figure of `attend`."""
    model, processor = parts
    seen = []
    generate, attended = type(model).generate, type(model).get_image_features
    monkeypatch.setattr(type(model), "generate", lambda *args, **kw: seen.append("answer") or generate(*args, **kw))
    monkeypatch.setattr(
        type(model), "get_image_features", lambda *args, **kw: seen.append("tower") or attended(*args, **kw)
    )
    code, printed = run(
        monkeypatch, capsys, "ask", "--model", folders / "age_vlm", "--image", folders / "picture.png", QUESTION,
        *(["--phrase", phrase] if phrase else []), "--heatmap", tmp_path / "heatmap.png", "--max-new-tokens", 4,
    )  # fmt: skip
    assert code == 0, printed
    assert sorted(seen) == ["answer", "tower"]
    place = QUESTION.index("Dog")  # the last one
    span = (place, place + 3) if phrase else (0, len(QUESTION))
    asked = Phrase(QUESTION[slice(*span)], "question", *span)
    expected = attend(model, processor, picture(), QUESTION, phrases=[asked], max_new_tokens=4)
    assert expected.answer.strip() in printed
    assert expected.phrases == [asked]
    expected.draw(tmp_path / "expected.png")
    assert (tmp_path / "heatmap.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_ask_looks_up_its_phrase_in_the_question(monkeypatch, capsys, tmp_path, folders):
    command = ["ask", "--model", folders / "age_vlm", "--image", folders / "picture.png", QUESTION]
    code, printed = run(monkeypatch, capsys, *command, "--heatmap", tmp_path / "x.foo")
    assert code == 2
    assert f"--heatmap {tmp_path / 'x.foo'}: the name of a figure must end with .png, .jpg, .pdf, .svg" in printed
    code, printed = run(monkeypatch, capsys, *command, "--phrase", "cat", "--heatmap", tmp_path / "x.png")
    assert code == 2
    assert "The phrase 'cat' does not occur in the text" in printed
    code, printed = run(monkeypatch, capsys, *command, "--phrase", "dog")
    assert code == 2
    assert "name the figure to write with --heatmap" in printed


def test_ask_asks_other_models_too_and_shows_their_maps(monkeypatch, capsys, tmp_path, folders):
    command = ["ask", "--model", folders / "llava", "--image", folders / "picture.png", "Is there a dog?"]
    code, printed = run(monkeypatch, capsys, *command, "--max-new-tokens", 4)
    assert code == 0, printed
    model, processor = llava()
    (expected,) = answer_batch(model, processor, [Question("q", picture, "Is there a dog?")], 4)
    assert "".join(expected["answer"].split()) in "".join(printed.split())
    code, printed = run(monkeypatch, capsys, *command, "--heatmap", tmp_path / "x.png")
    assert code == 0, printed
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--phrase": "cat"}, "'cat' occurs neither in the question"),
        ({"--phrase": "cat", "--answer": "A dog."}, "nor in the answer 'A dog.': choose words of them"),
        ({"--answer": " "}, "has no words: name words of the question as phrases"),
        ({"--model": "{models}/nowhere"}, "nowhere"),
        ({"--image": "{models}/nowhere.png"}, "nowhere.png"),
        ({"--image": "{models}/age_vlm/config.json"}, "Cannot read image"),
        ({"--out": "{models}/age_vlm"}, "already exists; choose another output folder"),
        ({"question": " "}, "The question is empty"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, folders, changes, message):
    options = {
        "question": QUESTION,
        "--model": "{models}/age_vlm",
        "--image": "{models}/picture.png",
        "--out": str(tmp_path / "out"),
        "--max-new-tokens": "2",
        **changes,
    }
    before = sorted(folders.rglob("*"))
    command = [options.pop("question"), *(part for option in options.items() for part in option)]
    code, printed = run(monkeypatch, capsys, "attention", *(part.format(models=folders) for part in command))
    assert code == 2, printed
    assert message.format(models=folders) in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())
    assert sorted(folders.rglob("*")) == before


def test_a_figure_that_cannot_be_drawn_leaves_nothing(monkeypatch, capsys, tmp_path, folders):
    def draw(self, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(attention_maps.Attention, "draw", draw)
    code, printed = run(
        monkeypatch, capsys, "attention", "--model", folders / "age_vlm", "--image", folders / "picture.png", QUESTION,
        "--answer", "Yes", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert "No space left" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("question", ["assistant", "user", "t", "Is the assistant a user?", "<|eot_id|>"])
def test_a_question_is_found_though_the_template_writes_the_same_behind_it(parts, question):
    processor = parts[1]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "No."}]
    prompt = render_chat(processor, [*turns, {"role": "user", "content": question}], add_generation_prompt=True)
    other = render_chat(processor, [*turns, {"role": "user", "content": "\0"}], add_generation_prompt=True)
    assert find_question(processor, prompt, question) == other.index("\0")
