# SPDX-License-Identifier: Apache-2.0
"""What the app keeps and shows, without a browser: words, maps, limits, and what it says when it cannot start."""

import base64
import copy
import html
import io
import re
import socket
import sys
import threading
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from command_line import run
from evaluation_cases import age_vlm, picture
from matplotlib import colormaps
from PIL import Image
from tiny_laboratory import tiny_checkpoint
from tiny_models import tiny_llama

from agevlm.inference.generation import render_chat
from agevlm.inference.grounding import Calibration
from agevlm.inference.replies import Reply
from agevlm.serving import page
from agevlm.serving.app import Sessions, build_app, write
from agevlm.serving.batching import Batcher
from agevlm.serving.conversation import Conversation, Limits, Word

pytestmark = pytest.mark.slow

# Words of it occur twice, and so does the word that the template writes behind it.
QUESTIONS = ["Is the dog a dog?", "And the cat: is the cat here?", "assistant"]
IMAGES = [[picture(0)], [picture(1), picture(2)], []]


@pytest.fixture(scope="module")
def parts():
    model, processor = age_vlm()
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.fixture(scope="module")
def batcher(parts):
    with Batcher(*parts) as batcher:
        yield batcher


def talk_about(batcher: Batcher, limits: Limits, questions, images) -> tuple[Conversation, list[Reply]]:
    """A conversation, and the replies as the model gave them."""
    talk, whole = Conversation(batcher.model, batcher.processor, limits, Calibration(reason="none")), []
    for question, new in zip(questions, images, strict=True):
        whole.append(list(write(batcher, talk.ask(question, new), limits.new_tokens))[-1])
        talk.add(question, new, whole[-1])
    return talk, whole


@pytest.fixture(scope="module")
def told(batcher):
    return talk_about(batcher, Limits(new_tokens=7), QUESTIONS, IMAGES)


def words(text: str) -> list[tuple[int, int]]:
    """Runs of letters and digits."""
    return [match.span() for match in re.finditer(r"\w+", text)]


def eager_maps(model, processor, found: Reply) -> torch.Tensor:
    """Eager cross-attention of one pass over all that `found` has: `(blocks, tokens, visual tokens)`."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = processor(text=found.prompt, images=found.images, add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([found.tokens])], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True, use_cache=False)
    return torch.stack(outputs.cross_attentions)[:, 0].mean(1)


def place_of_question(talk: Conversation, number: int) -> int:
    """The first character of a turn's question in its prompt, found by asking something unmistakable in its place."""
    before = Conversation(talk.model, talk.processor, talk.limits, Calibration())
    before.turns = talk.turns[:number]
    mark = "\x00" * 3
    return render_chat(talk.processor, before.ask(mark, IMAGES[number]), add_generation_prompt=True).index(mark)


def test_each_word_has_the_map_of_its_own_tokens(parts, told):
    """Against eager attention of one pass over each turn's prompt and answer."""
    model, processor = parts
    talk, whole = told
    for number, (question, reply) in enumerate(zip(QUESTIONS, whole, strict=True)):
        maps = eager_maps(model, processor, reply).unflatten(-1, (len(reply.images), 4, 4))
        first = place_of_question(talk, number)
        encoded = processor.tokenizer(reply.prompt, add_special_tokens=False, return_offsets_mapping=True)
        for start, end in words(question):
            places = enumerate(encoded["offset_mapping"])
            tokens = [i for i, (a, b) in places if a < first + end and b > first + start and a < b]
            for image in range(len(reply.images)):
                found = talk.look(Word(number, "question", start, end), image)
                assert found.phrases[0].text == question[start:end]
                rows, columns = found.maps.shape[2:]
                expected = maps[:, tokens, image, :rows, :columns].mean(1)
                np.testing.assert_allclose(found.maps[:, 0], expected.numpy(), atol=2e-3)


def test_equal_words_differ(told):
    talk, _ = told
    for number, word in enumerate(["dog", "cat"]):
        spans = [match.span() for match in re.finditer(word, QUESTIONS[number])]
        one, other = (talk.look(Word(number, "question", *span), 0).maps for span in spans)
        assert abs(one - other).max() > 1e-3  # a hundred times the precision of what is kept


def test_words_of_the_answer(parts, told):
    """The tokens of an answer are those that were written, whatever they would be if they were read again."""
    model, processor = parts
    talk, whole = told
    reply = whole[0]
    maps = eager_maps(model, processor, reply).unflatten(-1, (1, 4, 4))
    length = len(processor.tokenizer(reply.prompt, add_special_tokens=False)["input_ids"])
    found = talk.look(Word(0, "answer", 0, len(reply.text)), 0)
    rows, columns = found.maps.shape[2:]
    expected = maps[:, length : length + len(reply.tokens), 0, :rows, :columns].mean(1)
    np.testing.assert_allclose(found.maps[:, 0], expected.numpy(), atol=2e-3)


def test_looking_takes_no_pass_of_the_model(parts, told):
    model, _ = parts
    talk, _ = told
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    inner = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for number, question in enumerate(QUESTIONS):
        for start, end in words(question):
            page.show_map(talk.look(Word(number, "question", start, end), 0), None)
        page.show_grounded(talk.ground(number, 0))
    hook.remove()
    inner.remove()
    assert passes == []


@pytest.mark.parametrize(
    "data",
    [{"turn": 0, "source": "system", "start": 0, "end": 2}, {"turn": 0}, {"image": "x"}, {"image": None}, [], 3],
)
def test_a_click_that_the_page_never_sends_is_no_error(parts, batcher, data):
    """The functions that the page calls, as Gradio calls them."""
    import gradio as gr

    sessions = Sessions(*parts, Limits(new_tokens=2))
    talk = sessions["me"].conversation
    found = list(write(batcher, talk.ask(QUESTIONS[0], IMAGES[0]), 2))[-1]
    talk.add(QUESTIONS[0], IMAGES[0], found)
    app = build_app(batcher, sessions)
    (pick,) = (function.fn for function in app.fns.values() if function.name == "pick")
    request = gr.Request(session_hash="me")
    shown = pick("average", False, gr.EventData(None, data), request)
    assert ("conversation that has ended" in shown.props["caption"]) == (isinstance(data, dict) and "source" in data)


def test_words_before_an_image_see_nothing_of_it(told):
    talk, _ = told
    assert talk.look(Word(0, "question", 0, 2), 1) is None
    assert "before the image" in page.show_map(None, None)[1]
    with pytest.raises(ValueError, match="image"):
        talk.ground(0, 1)


def test_a_text_only_conversation_has_no_words_to_click(batcher):
    talk, _ = talk_about(batcher, Limits(new_tokens=3), ["Hello", "And you?"], [[], []])
    assert "<button" not in page.show_conversation(talk.turns)


@pytest.mark.parametrize("word", [Word(9, "question", 0, 2), Word(-1, "answer", 0, 2), Word(0, "question", 900, 901)])
def test_a_word_that_is_not_there(word, told):
    with pytest.raises(ValueError, match="has ended"):
        told[0].look(word, 0)


# --- what is kept ---


def test_a_conversation_keeps_the_maps_of_each_token_once(told):
    talk, whole = told
    kept = [turn.reply.maps.maps for turn in talk.turns]
    assert {maps.dtype for maps in kept} == {torch.float16}
    assert sum(maps.shape[1] for maps in kept) <= len(whole[-1].maps.ids)
    # Nothing larger is held by a view.
    assert all(maps.untyped_storage().nbytes() == maps.nbytes for maps in kept)
    pixels = sum(3 * image.width * image.height for images in IMAGES for image in images)
    assert talk.nbytes == pixels + sum(2 * maps.numel() for maps in kept)


def test_limits_of_a_conversation(batcher):
    limits = Limits(tokens=120, new_tokens=4, images=2)
    talk, _ = talk_about(batcher, limits, ["Dog?", "Cat?"], [[picture(0)], [picture(1)]])
    with pytest.raises(ValueError, match="room for 2 images"):
        talk.ask("Sofa?", [picture(2)])
    with pytest.raises(ValueError, match=r"too long: start a new one \(\d+ tokens .* at most 120\)"):
        talk.ask("How many cats are there? " * 20)
    with pytest.raises(ValueError, match="question is too long: shorten it"):
        Conversation(talk.model, talk.processor, limits, Calibration()).ask("How many cats are there? " * 40)
    # The model was made for 256 tokens.
    with pytest.raises(ValueError, match="at most 256"):
        Conversation(talk.model, talk.processor, Limits(), Calibration()).ask("How many cats are there? " * 40)


def test_users_have_conversations_of_their_own_and_only_so_many_are_kept(parts):
    sessions = Sessions(*parts, most=3)
    first = sessions["a"]
    assert sessions["b"].conversation is not first.conversation
    assert sessions["a"] is first
    for name in "cde":
        sessions[name].conversation.turns.append(name)
    assert len(sessions) == 3
    assert first.stopped  # an answer that is being written to it ends
    assert sessions["a"] is not first
    assert sessions["a"].conversation.turns == []
    sessions.end("a")
    sessions.end("nobody")
    assert len(sessions) == 2


def test_who_stops_listening_cancels_the_reply(parts):
    model, processor = parts
    with Batcher(model, processor) as batcher:
        passes = []
        hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
        writing = write(batcher, Conversation(model, processor, Limits(), Calibration()).ask("Dog?"), 200)
        assert isinstance(next(writing), str)
        writing.close()
        assert isinstance(list(write(batcher, [{"role": "user", "content": "Cat?"}], 3))[-1], Reply)
        hook.remove()
    assert len(passes) < 150


def test_a_batcher_can_be_forked_before_it_is_asked(parts):
    """A Space's GPU is in a process that is forked from the one that has loaded the model."""
    before = threading.active_count()
    batcher = Batcher(*parts)
    assert threading.active_count() == before
    assert batcher.submit([{"role": "user", "content": "Cat?"}], max_new_tokens=1).result().text is not None
    batcher.close()
    Batcher(*parts).close()


# --- what is shown ---


class Shown(HTMLParser):
    """The text of a page, the data of its buttons and their texts."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.buttons, self.sources, self.inside = "", [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        data = dict(attributes)
        if tag == "button":
            self.buttons.append([data, ""])
            self.inside = True
        elif tag == "img":
            self.sources.append(data["src"])
        else:
            assert tag in ("div", "p", "span", "b", "ul", "li"), tag

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.buttons[-1][1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "button"


def opened(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def test_each_word_is_a_button_with_its_span(told):
    talk, _ = told
    found = Shown(page.show_conversation(talk.turns, 1))
    texts = {(str(n), "question"): turn.question for n, turn in enumerate(talk.turns)}
    texts |= {(str(n), "answer"): turn.reply.text for n, turn in enumerate(talk.turns)}
    seen = [(data, text) for data, text in found.buttons if data["class"] == "word"]
    for data, text in seen:
        assert texts[data["data-turn"], data["data-source"]][int(data["data-start"]) : int(data["data-end"])] == text
    assert [text for data, text in seen if data["data-source"] == "question"] == [
        question[start:end] for question in QUESTIONS for start, end in words(question)
    ]
    thumbs = [data for data, _ in found.buttons if data["class"] == "thumb"]
    assert [(data["data-image"], data["aria-pressed"]) for data in thumbs] == [
        ("0", "false"), ("1", "true"), ("2", "false"),
    ]  # fmt: skip
    assert all(max(opened(source).size) <= page.THUMB_SIDE for source in found.sources)


@pytest.mark.parametrize("text", ["<b>{{value}}</b> ${1+1} `x`", "</button><script>alert(1)</script>", 'a & b "c"'])
def test_what_users_type_is_text(text):
    source = page.show_question(text, [], 0) + page.show_answer(text)
    assert Shown(source).text.count(text) == 2
    assert not re.search(r"[{}`$]|<script|<b>", source)


def test_a_map_over_its_image(told):
    """Colors mean the same as in figures; the layer covers what the cells cover; the shares are one."""
    talk, _ = told
    found = talk.look(Word(1, "question", 8, 11), 2)
    for block, expected in [(None, found.maps[:, 0].mean(0)), *enumerate(found.maps[:, 0])]:
        layer, caption = page.show_map(found, block)
        rows, columns = expected.shape
        colors = np.asarray(opened(Shown(layer).sources[0]))
        zoom = colors.shape[0] // rows
        centers = colors[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(float)
        scaled = np.log(np.clip(expected * expected.size, 0.1, 100) / 0.1) / np.log(1000)
        wanted = colormaps["inferno"](scaled)[..., :3] * 255
        assert abs(centers - wanted).mean() < 12  # pixels beside the center are mixed with their neighbors
        width, height = (float(part) for part in re.findall(r"(?:width|height):([\d.]+)%", layer)[:2])
        image = found.image
        assert width == pytest.approx(100 * columns * found.cell[0] / image.width, abs=0.01)
        assert height == pytest.approx(100 * rows * found.cell[1] / image.height, abs=0.01)
        left, top = (float(re.search(rf"strongest.*{side}:([\d.]+)%", layer)[1]) for side in ("left", "top"))
        row, column = np.unravel_index(expected.argmax(), expected.shape)
        assert left == pytest.approx(100 * column * found.cell[0] / image.width, abs=0.01)
        assert top == pytest.approx(100 * row * found.cell[1] / image.height, abs=0.01)
        text = Shown(caption).text
        assert "cat in the question" in text
        shares = dict(re.findall(r"(strongest cell|this image|sink|other images) (\d\.\d\d)", text))
        assert float(shares["strongest cell"]) == pytest.approx(expected.max(), abs=0.006)
        assert float(shares["this image"]) + float(shares["other images"]) == pytest.approx(1, abs=0.02)
        assert "sink" not in shares  # the model has none


def test_the_share_of_the_sink():
    model, processor = age_vlm(cross_attention_sink=True)
    with Batcher(model, processor) as batcher:
        talk, _ = talk_about(batcher, Limits(new_tokens=2), ["Dog?"], [[picture(0)]])
    found = talk.look(Word(0, "question", 0, 3), 0)
    for block in (None, 0, 3):
        shares = dict(re.findall(r"(this image|sink) (\d\.\d\d)", Shown(page.show_map(found, block)[1]).text))
        assert 0.01 < float(shares["sink"]) < 0.99
        assert float(shares["this image"]) + float(shares["sink"]) == pytest.approx(1, abs=0.02)


def test_points_and_boxes(told):
    talk, _ = told
    found = talk.ground(0, 0)
    layer, caption = page.show_grounded(found)
    boxes = re.findall(r'class="box" style="left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%', layer)
    drawn = [phrase for phrase in found.phrases if phrase.box]
    assert len(boxes) == len(drawn) > 0
    for shown, phrase in zip(boxes, drawn, strict=True):
        left, top, width, height = (float(side) / 100 for side in shown)
        sides = (left, top, left + width, top + height)
        scaled = [side * length for side, length in zip(sides, found.image.size * 2, strict=True)]
        assert scaled == pytest.approx(phrase.box, abs=0.02)
        assert html.escape(phrase.text) in caption
    assert "No confidence: none" in caption


def test_what_is_not_there_is_said_and_not_drawn(told):
    talk, _ = told
    found = talk.ground(0, 0)
    absent = [replace(phrase, confidence=0.1, there=False) for phrase in found.phrases]
    layer, caption = page.show_grounded(replace(found, phrases=absent, reason=None))
    assert layer == ""
    assert caption.count("not there, confidence 0.10") == len(absent) > 0


# --- starting ---


@pytest.fixture
def checkpoint(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def refused(monkeypatch, capsys, *arguments) -> str:
    code, printed = run(monkeypatch, capsys, "app", *arguments)
    assert code == 2, printed
    assert printed.count("agevlm: error:") == 1
    assert "Traceback" not in printed
    return printed


def test_the_port_is_taken(monkeypatch, capsys, tmp_path):
    """It is said before the model is loaded, which takes long."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        printed = refused(monkeypatch, capsys, tmp_path / "no_model", "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be used" in printed
    assert "--port" in printed


def test_a_host_that_is_not_here(monkeypatch, capsys, tmp_path):
    assert "192.0.2.1" in refused(monkeypatch, capsys, tmp_path / "no_model", "--host", "192.0.2.1")


def test_the_model_is_missing(monkeypatch, capsys, tmp_path):
    assert "no_model" in refused(monkeypatch, capsys, tmp_path / "no_model", "--port", free_port())


def test_a_language_model_is_refused(monkeypatch, capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    assert "llama" in refused(monkeypatch, capsys, tmp_path / "llama", "--port", free_port())


def test_gradio_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'agevlm[app]'" in refused(monkeypatch, capsys, tmp_path / "no_model")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_command_serves_the_app_until_it_is_interrupted(monkeypatch, capsys, checkpoint):
    """Ctrl-C ends it, and its port is free again."""
    port, got = free_port(), {}

    def interrupt(self, timeout=None):
        got["page"] = urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read().decode()
        raise KeyboardInterrupt

    real = threading.Event

    class Interrupted(real):
        wait = interrupt

    monkeypatch.setattr("agevlm.cli.app.Event", Interrupted)
    code, printed = run(monkeypatch, capsys, "app", checkpoint, "--port", port)
    assert (code, printed.count("agevlm: interrupted")) == (130, 1), printed
    assert f"http://127.0.0.1:{port}/" in printed
    assert "before layer" in got["page"]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_model_is_asked_by_the_function_that_gets_the_gpu(parts):
    decorated = []

    def gpu(function):
        decorated.append(function)
        return function

    with Batcher(*parts) as batcher:
        build_app(batcher, Sessions(*parts), gpu=gpu)
        (ask,) = decorated
        *pieces, last = ask([{"role": "user", "content": "Cat?"}], 3)
    assert "".join(pieces) == last.text
