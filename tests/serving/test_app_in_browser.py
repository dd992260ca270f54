# SPDX-License-Identifier: Apache-2.0
"""The app in a real browser, headless: `make test-app`."""

import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import age_vlm, picture
from page_colors import contrast
from PIL import Image

from agevlm.inference.attention import Phrase, show_reply
from agevlm.inference.generation import open_image
from agevlm.inference.replies import reply
from agevlm.plots import color_attention
from agevlm.serving.app import Sessions, build_app, launch
from agevlm.serving.batching import Batcher
from agevlm.serving.conversation import Limits

pytestmark = [pytest.mark.minutes, pytest.mark.browser]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
INSTALL = (
    "the tests of the app need Playwright and Chromium: pip install 'agevlm[dev]', and apt install chromium or "
    "playwright install chromium"
)
QUESTION = "Is the dog a dog?"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.fail(INSTALL, pytrace=False)
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=next(filter(None, map(shutil.which, names)), None), args=FLAGS
            )
        except Error as error:
            pytest.fail(f"{INSTALL} ({str(error).splitlines()[0]})", pytrace=False)
        yield opened
        opened.close()


class App:
    """A running app; `passes` has the number of rows of each forward pass of its model."""

    def __init__(self, limits: Limits, **settings):
        self.model, self.processor = age_vlm(cross_attention_sink=True)
        self.model.generation_config.eos_token_id = None
        self.model.config.get_text_config().max_position_embeddings = 4096
        self.passes: list[int] = []
        self.generated: list[int] = []
        self.batcher = Batcher(self.model, self.processor, **settings)
        self.sessions = Sessions(self.model, self.processor, limits)
        self.model.register_forward_pre_hook(
            lambda model, args, kwargs: self.passes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        generate = self.model.generate

        def counted(**kwargs):
            self.generated.append(len(kwargs["input_ids"]))
            return generate(**kwargs)

        self.model.generate = counted
        self.app = build_app(self.batcher, self.sessions, title="tiny <b>model</b>")
        _, self.url, _ = launch(self.app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)

    def close(self):
        self.app.close(verbose=False)
        self.batcher.close()


@pytest.fixture(scope="module")
def app():
    running = App(Limits(tokens=1000, new_tokens=NEW_TOKENS, images=3))
    yield running
    running.close()


@pytest.fixture(scope="module")
def slow_app():
    """An app whose answers take long."""
    running = App(Limits(tokens=4000, new_tokens=3000))
    yield running
    running.close()


class User:
    """A page of the app, and what one does on it."""

    def __init__(self, browser, url, **settings):
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")

    def add(self, *files: Path):
        before = self.page.locator("#question .thumbnail-item").count()
        self.page.set_input_files("#question input[type=file]", [str(file) for file in files])
        self.page.wait_for_function(
            f"document.querySelectorAll('#question .thumbnail-item').length == {before + len(files)}"
        )

    def say(self, question: str):
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def ask(self, question: str, *files: Path) -> str:
        """The answer."""
        answers = self.page.locator("#conversation .answer")
        before = answers.count()
        if files:
            self.add(*files)
        self.say(question)
        self.page.wait_for_function(f"document.querySelectorAll('#conversation .answer').length == {before + 1}")
        self.page.wait_for_function("!document.querySelector('#writing .answer, #picture .map')")
        return answers.nth(before).text_content()

    def words(self, text: str):
        return self.page.locator(f"#conversation .word:text-is('{text}')")

    def click(self, word, **settings) -> str:
        """The address of the map that appears."""
        before = self.map()
        word.click(**settings)
        self.page.wait_for_function(f"![undefined, {before!r}].includes(document.querySelector('#picture .map')?.src)")
        return self.map()

    def wait_for_map(self, address: str):
        self.page.wait_for_function(f"(document.querySelector('#picture .map') || {{}}).src == {address!r}")

    def map(self) -> str:
        return self.page.evaluate("(document.querySelector('#picture .map') || {}).src || ''")

    def text(self, place: str) -> str:
        return self.page.locator(place).inner_text()


@pytest.fixture
def new_user(browser, app):
    users = []

    def make(url=app.url, **settings):
        users.append(User(browser, url, **settings))
        return users[-1]

    yield make
    for user in users:
        assert user.errors == []
        outside = [url for url in user.requests if not re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:)", url)]
        assert outside == []  # no font, script or report from or to elsewhere
        user.context.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    found = []
    for number in range(4):
        found.append(folder / f"picture{number}.png")
        picture(number).resize((200, 160 + 40 * number)).save(found[-1])
    return found


def expected_maps(app, files, question: str, span: tuple[int, int]) -> np.ndarray:
    """The maps of words of a first question about images, from a pass of its own: `(blocks, rows, columns)`."""
    images = [{"type": "image", "image": open_image(file)} for file in files]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
    (found,) = reply(app.model, app.processor, [messages], max_new_tokens=NEW_TOKENS, maps=True)
    phrase = Phrase(question[slice(*span)], "question", *span)
    return show_reply(app.model, app.processor, found, question, [phrase], image=len(files) - 1).maps[:, 0]


def test_ask_and_click(app, new_user, files):
    """The answer is that of the model alone; a click shows the map of that very word, and the model does not run for it."""
    user = new_user()
    user.page.evaluate(
        "() => { window.lengths = []; new MutationObserver(() => { const p = document.querySelector('#writing .answer');"
        "if (p) window.lengths.push(p.textContent.length); }).observe(document.querySelector('#writing'), "
        "{childList: true, subtree: true, characterData: true}); }"
    )
    answer = user.ask(QUESTION, files[0])
    lengths = user.page.evaluate("window.lengths")
    assert len(set(lengths)) > 2  # it has grown before the eyes
    assert sorted(lengths) == lengths
    images = [{"type": "image", "image": open_image(files[0])}]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]
    (alone,) = reply(app.model, app.processor, [messages], max_new_tokens=NEW_TOKENS)
    assert alone.text in answer

    before, dogs = len(app.passes), [match.span() for match in re.finditer("dog", QUESTION)]
    assert user.map() == ""
    seen = [user.click(user.words("dog").nth(number)) for number in range(2)]
    assert seen[0] != seen[1]
    choose_block(user, "before layer")
    block = user.map()
    assert block not in seen
    user.page.check("#grounded input")
    user.page.wait_for_selector("#picture .box")
    assert "not there" not in user.text("#picture")  # there is no calibration
    assert "No confidence" in user.text("#picture")
    assert len(app.passes) == before
    for span, address in zip(dogs, seen, strict=True):
        maps = expected_maps(app, files[:1], QUESTION, span)
        ours = np.asarray(Image.open(urllib.request.urlopen(address)).convert("RGB")).astype(int)
        assert abs(ours - np.asarray(color_attention(maps.mean(0))).astype(int)).max() <= 8  # kept as float16
    assert re.search(r"sink \d\.\d\d", user.text("#picture"))
    assert user.page.locator("#conversation .word[aria-pressed=true]").all_inner_texts() == ["dog"]


def choose_block(user, text: str):
    before = user.map()
    user.page.click("#block input")
    user.page.locator("[role=option]", has_text=text).first.click()
    user.page.wait_for_function(f"document.querySelector('#picture .map').src != {before!r}")


def test_words_by_keyboard(new_user, files):
    user = new_user()
    user.ask(QUESTION, files[0])
    pressed = "#conversation .word[aria-pressed=true]"
    user.page.locator("#conversation .thumb").focus()
    user.page.keyboard.press("Tab")
    user.page.keyboard.press("Home")  # one stop of Tab for all words; arrows go on from it
    user.page.keyboard.press("ArrowRight")
    user.page.keyboard.press("ArrowRight")
    assert user.page.evaluate("document.activeElement.textContent") == "dog"
    user.page.keyboard.press("Enter")
    user.page.wait_for_selector("#picture .map")
    one = user.map()
    assert user.page.locator(pressed).all_inner_texts() == ["dog"]
    assert user.page.evaluate("document.activeElement.textContent") == "dog"
    user.page.keyboard.press("ArrowRight")
    user.page.keyboard.press("ArrowRight")
    user.page.keyboard.press("Shift+Enter")
    assert user.page.locator(pressed).all_inner_texts() == ["dog", "a", "dog"]
    user.page.wait_for_function(f"document.querySelector('#picture .map').src != {one!r}")
    assert "dog a dog in the question" in user.text("#picture")


def test_turns_and_images(app, new_user, files):
    user = new_user()
    user.ask("Is there a dog?", files[0])
    first = user.click(user.words("dog"))
    user.ask("And a cat?")
    user.words("dog").click()
    user.wait_for_map(first)  # of the pass that answered it
    user.ask("Compare them: sofa or bird?", files[1], files[2])
    thumbs = user.page.locator("#conversation .thumb")
    pressed = [thumbs.nth(number).get_attribute("aria-pressed") for number in range(3)]
    assert pressed == ["false", "false", "true"]
    third = user.click(user.words("sofa"))
    base = user.page.get_attribute("#picture .base", "src")
    thumbs.nth(1).click()
    user.page.wait_for_function(f"document.querySelector('#picture .base').src != {base!r}")
    assert user.map() != third
    user.words("dog").click()
    user.page.wait_for_function("document.querySelector('#picture').innerText.includes('before the image')")
    user.page.wait_for_function("!document.querySelector('#picture .map')")
    thumbs.nth(0).click()
    user.wait_for_map(first)
    user.add(files[3])
    user.say("And this?")
    user.page.wait_for_selector("#notice [role=alert]")
    assert "room for 3 images" in user.text("#notice")
    user.page.click("#new")
    user.page.wait_for_function("!document.querySelector('#conversation .answer')")
    assert user.page.locator("#picture .base").count() == 0
    user.ask("Hello")
    assert user.page.locator("#conversation .answer").count() == 1


def test_text_only(new_user):
    user = new_user()
    assert user.ask("Hello there")
    assert user.page.locator("#conversation .word").count() == 0
    assert "no image" in user.text("#picture")


def test_what_is_no_image_is_said_and_the_question_stays(new_user, files, tmp_path):
    (tmp_path / "notes.png").write_text("Not an image")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:300])
    user = new_user()
    for name in ("notes.png", "cut.png"):
        user.add(tmp_path / name)
        user.say("What is this?")
        user.page.wait_for_function(f"document.querySelector('#notice').innerText.includes('{name} is no image')")
        assert user.page.input_value("#question textarea") == "What is this?"
        assert user.page.locator("#conversation .answer").count() == 0
        user.page.locator("#question .thumbnail-item button, #question .thumbnail-item .delete-button").first.click()
        user.page.wait_for_function("!document.querySelector('#question .thumbnail-item')")
    assert user.ask("What is this?", files[0])
    assert user.page.locator("#notice [role=alert]").count() == 0


def test_empty_and_long_questions(new_user, files):
    user = new_user()
    user.add(files[0])
    user.say("   ")
    user.page.wait_for_selector("#notice [role=alert]")
    assert "empty" in user.text("#notice")
    user.say("How many cats are there? " * 200)
    user.page.wait_for_function("document.querySelector('#notice').innerText.includes('too long')")
    assert user.page.input_value("#question textarea").startswith("How many")
    user.say("How many cats?")
    user.page.wait_for_selector("#conversation .answer")


def test_what_is_typed_is_text(new_user, files):
    user = new_user()
    typed = '<img src=x onerror="window.broken=1"> {{value}} ${1+1} <b>dog</b>'
    user.ask(typed, files[0])
    assert user.text("#conversation .question") == typed
    user.click(user.words("dog"))
    assert user.page.evaluate("window.broken") is None
    assert user.text("#title") == "tiny <b>model</b>"


def test_ten_users_at_once(new_user, files):
    """Each gets the answer that it gets alone, and they are answered in few batches."""
    from gradio_client import Client, handle_file

    running = App(Limits(new_tokens=NEW_TOKENS), max_wait=2.0)
    try:
        questions = [f"Is there a {name} here?" for name in ("dog", "cat", "sofa", "bird", "fish")] * 2
        chosen = [files[number % 3] for number in range(10)]
        clients = [Client(running.url, verbose=False) for _ in questions]

        def talk(number: int) -> str:
            message = {"text": questions[number], "files": [handle_file(chosen[number])]}
            job = clients[number].submit(message=message, api_name="/ask")
            job.result(timeout=120)
            return job.outputs()[-1][2]

        with ThreadPoolExecutor(10) as pool:
            said = list(pool.map(talk, range(10)))
        assert sum(running.generated) == 10
        assert len(running.generated) <= 3
        assert len(running.sessions) == 10
        for number, conversation in enumerate(said):
            content = [
                {"type": "image", "image": open_image(chosen[number])},
                {"type": "text", "text": questions[number]},
            ]
            messages = [{"role": "user", "content": content}]
            (alone,) = reply(running.model, running.processor, [messages], max_new_tokens=NEW_TOKENS)
            talk_of_one = running.sessions[clients[number].session_hash].conversation
            assert [turn.reply.text for turn in talk_of_one.turns] == [alone.text]
            assert [turn.question for turn in talk_of_one.turns] == [questions[number]]
            assert conversation.count('<p class="answer">') == 1
        assert (
            len({turn.reply.text for turn in (s.conversation.turns[0] for s in running.sessions._by_name.values())})
            > 3
        )
    finally:
        running.close()


def wait_until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_users_do_not_see_each_other(new_user, files):
    one, other = new_user(), new_user()
    one.ask("Is there a dog?", files[0])
    other.ask("Is there a cat?", files[1])
    assert "dog" not in other.text("#conversation")
    one.click(one.words("dog"))
    assert other.map() == ""
    assert other.page.get_attribute("#picture .base", "src") != one.page.get_attribute("#picture .base", "src")


def test_a_user_who_leaves_while_the_answer_is_written(slow_app, new_user, files):
    """The row is canceled, and nothing of the user is kept."""
    user = new_user(slow_app.url)
    user.add(files[0])
    user.say(QUESTION)
    user.page.wait_for_function(
        "(document.querySelector('#writing .answer') || {innerText: ''}).innerText.length > 20"
    )
    assert len(slow_app.sessions) == 1
    user.page.close()
    wait_until(lambda: len(slow_app.sessions) == 0)
    time.sleep(0.5)
    before = len(slow_app.passes)
    time.sleep(0.5)
    assert len(slow_app.passes) == before < 3000


def test_stop(slow_app, new_user, files):
    user = new_user(slow_app.url)
    user.add(files[0])
    user.say(QUESTION)
    user.page.wait_for_selector("#writing .answer")
    user.page.click("#question .stop-button")
    user.page.wait_for_function("document.querySelector('#notice').innerText.includes('Stopped')")
    assert user.page.input_value("#question textarea") == QUESTION
    time.sleep(0.5)
    before = len(slow_app.passes)
    time.sleep(0.5)
    assert len(slow_app.passes) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_looks(scheme, width, new_user, files):
    """Everything is within the width, the picture stays in view, and texts can be read (WCAG AA)."""
    user = new_user(viewport={"width": width, "height": 844}, color_scheme=scheme)
    for number in range(4):
        user.ask(f"Number {number}: {QUESTION}", *files[:1] * (number == 0))
    user.page.locator("#conversation .word").last.click()
    user.page.wait_for_selector("#picture .map")
    assert user.page.evaluate("document.documentElement.scrollWidth") == width
    box = user.page.locator("#picture .frame").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 844
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    image, layer = (user.page.locator(f"#picture {name}").bounding_box() for name in (".base", ".map"))
    assert (layer["x"], layer["y"]) == pytest.approx((image["x"], image["y"]), abs=1)
    places = (
        "#conversation .word[aria-pressed=false]",
        "#conversation .word[aria-pressed=true]",
        "#picture figcaption p",
        "#title h1",
    )
    for place in places:
        assert contrast(user.page, place) >= 4.5, place


def test_long_words_stay_in_their_column(new_user, files):
    user = new_user(viewport={"width": 1440, "height": 844})
    user.ask(f"Is there a {'dog' * 60}?", files[0])
    user.page.locator("#conversation .word").nth(3).click()
    user.page.check("#grounded input")
    user.page.wait_for_selector("#picture .grounded")
    texts = user.page.locator("#picture figcaption :is(p, li)").all()
    assert len(texts) >= 2
    for text in texts:
        assert text.evaluate("text => text.scrollWidth <= text.clientWidth"), text.inner_text()
