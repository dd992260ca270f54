# SPDX-License-Identifier: Apache-2.0
"""The app: ask about images in a browser, and click any word to see where it looks."""

import contextlib
import functools
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..inference.attention import can_show
from ..inference.generation import open_image
from ..inference.grounding import find_calibration
from ..inference.replies import Reply, block_titles
from . import page
from .batching import Batcher, Messages
from .conversation import Conversation, Limits, Word

if TYPE_CHECKING:
    import gradio as gr

AVERAGE = "average"
"""What is chosen for the average of all blocks."""

WELCOME = "Add an image, ask about it, and click a word to see where it looks."
CLICK = "Click a word to see where it looks."
NO_IMAGE = "There is no image in this conversation yet."

MOST_WAITING = 64
"""Questions that wait for the model; further ones are refused."""


def check_gradio() -> None:
    """
    Raises:
        ImportError: if Gradio is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; for the app: pip install 'agevlm[app]'") from error


class Session:
    """What one user sees: a conversation, the word and the image of it that are shown, and whether an answer is being written."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.word: Word | None = None
        self.image = 0
        self.writing = threading.Lock()
        self.stopped = False


class Sessions:
    """The sessions of all users: at most `most`, those used last."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, limits: Limits | None = None, *, most: int = 64
    ):
        self._new = functools.partial(
            Conversation, model, processor, limits or Limits(), find_calibration(model, model.name_or_path)
        )
        self.most = most
        self._by_name: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_name)

    def __getitem__(self, name: str) -> Session:
        """The session of this name, a new one if there is none."""
        with self._lock:
            if name not in self._by_name:
                self._by_name[name] = Session(self._new())
            self._by_name.move_to_end(name)
            while len(self._by_name) > self.most:
                self._by_name.popitem(last=False)[1].stopped = True
            return self._by_name[name]

    def end(self, name: str) -> None:
        """Forgets a session, and stops the answer that is being written in it."""
        with self._lock:
            if (session := self._by_name.pop(name, None)) is not None:
                session.stopped = True


def write(batcher: Batcher, messages: Messages, max_new_tokens: int) -> Generator[str | Reply, None, None]:
    """The pieces of a reply as they are written, and last the reply with its maps. Closing it cancels the reply."""
    pending = batcher.submit(messages, max_new_tokens=max_new_tokens, maps=True)
    try:
        yield from pending
        yield pending.result()
    finally:
        pending.cancel()


def build_app(
    batcher: Batcher,
    sessions: Sessions,
    *,
    title: str = "AGE-VLM",
    gpu: Callable[[Callable], Callable] | None = None,
) -> "gr.Blocks":
    """The app of a model; [`launch`] starts it.

    Args:
        batcher: of an AGE-VLM. Questions of several users go through it together.
        sessions: of the users, with the limits of a conversation.
        title: of the page.
        gpu: decorates the function that asks the model, a generator: `spaces.GPU` on a Space.

    Raises:
        ValueError: if the model has no cross-attention.
        ImportError: if Gradio or matplotlib is not installed.
    """
    check_gradio()
    import gradio as gr

    model = batcher.model
    if not can_show(model):
        raise ValueError(f"{type(model).__name__} has no attention maps that could be shown: choose another model.")
    page.legend()  # raises before a user needs matplotlib
    blocks = block_titles(model)

    def run_model(messages: Messages, max_new_tokens: int) -> Generator[str | Reply, None, None]:
        yield from write(batcher, messages, max_new_tokens)

    if gpu is not None:
        run_model = gpu(run_model)

    def session_of(request: gr.Request) -> Session:
        """Who calls the app without a name shares nothing with others."""
        return sessions[request.session_hash or secrets.token_hex()]

    def ask(message: dict[str, Any], block: str, grounded: bool, request: gr.Request) -> Iterator[dict]:
        """The answer as it is written, and last the conversation with it. Without an answer, the question stays in its box."""
        session = session_of(request)
        if not session.writing.acquire(blocking=False):
            yield {notice: page.say("Wait for the answer that is being written, or stop it.", "alert")}
            return
        try:
            session.stopped = False
            once = {box: gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True), notice: ""}
            for piece in answer(session, message["text"].strip(), message.get("files") or []):
                yield {writing: piece, **once}
                once = {}  # what is typed meanwhile stays
            yield {
                box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
                writing: "",
                conversation: page.show_conversation(session.conversation.turns, session.image),
                picture: gr.HTML(**show(session, block, grounded, image=True)),
            }
        except (ValueError, RuntimeError) as error:
            again = gr.MultimodalTextbox(value=message, submit_btn=True, stop_btn=False)
            yield {box: again, writing: "", notice: page.say(str(error), "alert")}
        finally:
            session.writing.release()

    def answer(session: Session, question: str, files: list[str]) -> Iterator[str]:
        """The question and the answer so far, as HTML; last, the conversation has them.

        Raises:
            ValueError: if there is no answer.
            RuntimeError: if it was stopped.
        """
        talk = session.conversation
        if not question:
            raise ValueError("The question is empty: write what you want to know.")
        images = [_open(file, talk.limits.side) for file in files]
        messages = talk.ask(question, images)
        asked, text = page.show_question(question, images, len(talk.images)), ""
        yield asked + page.show_answer(text)
        with contextlib.closing(run_model(messages, talk.limits.new_tokens)) as pieces:
            for piece in pieces:
                if session.stopped:
                    raise RuntimeError("Stopped: the question is in its box again.")
                if isinstance(piece, Reply):
                    talk.add(question, images, piece)
                    session.word, session.image = None, max(len(talk.images) - 1, 0)
                else:
                    text += piece
                    yield asked + page.show_answer(text)

    def show(session: Session, block: str, grounded: bool, image: bool = False) -> dict[str, Any]:
        """The map of the word that is chosen over the image that is, and what is grounded in it; with the `image` itself if it
        is another one. The model does not run."""
        talk = session.conversation
        if not talk.images:
            return {"value": "", "image": "", "caption": page.say(NO_IMAGE if talk.turns else WELCOME)}
        layers, captions = [], []
        try:
            if session.word is not None:
                found = talk.look(session.word, session.image)
                layer, caption = page.show_map(found, blocks.index(block) if block in blocks else None)
                layers.append(layer)
                captions.append(caption)
            if grounded:
                turn = len(talk.turns) - 1 if session.word is None else session.word.turn
                layer, caption = page.show_grounded(talk.ground(turn, session.image))
                layers.append(layer)
                captions.append(caption)
        except ValueError as error:
            captions.append(page.say(str(error)))
        shown = {"value": "".join(layers), "caption": "".join(captions) or page.say(CLICK)}
        return {**shown, "image": page.show_image(talk.images[session.image])} if image else shown

    def pick(block: str, grounded: bool, event: gr.EventData, request: gr.Request) -> gr.HTML:
        """Shows the map of the word that was clicked, or the image that was."""
        session, data = session_of(request), event._data
        image = isinstance(data, dict) and "image" in data
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # of what the page never sends
            if image:
                session.image = min(max(int(data["image"]), 0), len(session.conversation.images) - 1)
            else:
                session.word = Word(int(data["turn"]), str(data["source"]), int(data["start"]), int(data["end"]))
        return gr.HTML(**show(session, block, grounded, image=image))

    def choose(block: str, grounded: bool, request: gr.Request) -> gr.HTML:
        return gr.HTML(**show(session_of(request), block, grounded))

    def renew(block: str, request: gr.Request) -> dict:
        sessions.end(request.session_hash or "")
        nothing = gr.HTML(**show(session_of(request), block, False))
        return {box: gr.MultimodalTextbox(value=None), conversation: "", notice: "", picture: nothing}

    def stop(request: gr.Request) -> None:
        session_of(request).stopped = True

    def leave(request: gr.Request) -> None:
        sessions.end(request.session_hash or "")

    no_script: dict[str, Any] = {"js_on_load": None}
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.HTML(f"<h1>{page.escape(title)}</h1>", elem_id="title", **no_script)
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="seen"):
                shown: dict[str, Any] = {"image": "", "caption": page.say(WELCOME)}
                templates: dict[str, Any] = {"html_template": page.PICTURE, "css_template": page.PICTURE_CSS}
                picture = gr.HTML("", elem_id="picture", **shown, **templates, **no_script)
                with gr.Row(elem_id="options"):
                    block = gr.Dropdown(
                        [AVERAGE, *blocks], value=AVERAGE, label="Blocks", filterable=False, elem_id="block"
                    )
                    grounded = gr.Checkbox(label="Points and boxes", elem_id="grounded")
            with gr.Column(elem_id="said"):
                conversation = gr.HTML("", css_template=page.TURNS_CSS, js_on_load=page.PICK, elem_id="conversation")
                writing = gr.HTML("", css_template=page.TURNS_CSS, elem_id="writing", **no_script)
                notice = gr.HTML("", css_template=page.NOTICE_CSS, elem_id="notice", **no_script)
                box = gr.MultimodalTextbox(
                    label="Question",
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Ask about images, which you can drop here",
                    max_plain_text_length=1_000_000,
                    elem_id="question",
                )
                new = gr.Button("New conversation", size="sm", elem_id="new")
        # As many as the model answers at once: whoever waits for it takes no thread from those who click.
        asking: dict[str, Any] = {"concurrency_limit": batcher.max_batch_size, "api_name": "ask"}
        now: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        everything: list[Any] = [box, writing, conversation, notice, picture]
        options: list[Any] = [block, grounded]
        box.submit(ask, [box, *options], everything, show_progress="hidden", **asking)
        box.stop(stop, **now)
        conversation.pick(pick, options, picture, **now)
        for option in options:
            option.input(choose, options, picture, **now)
        new.click(renew, block, everything, **now)
        app.unload(leave)
    return app.queue(max_size=MOST_WAITING)


def _open(file: str, side: int) -> Image.Image:
    """The image of an upload, at most `side` pixels wide and high.

    Raises:
        ValueError: if it is none.
    """
    try:
        image = open_image(file)
    except ValueError:
        raise ValueError(f"{Path(file).name} is no image that can be read: choose a PNG, JPEG or WebP file.") from None
    image.thumbnail((side, side))
    return image


def check_port(host: str, port: int) -> None:
    """
    Raises:
        OSError: if nothing can listen there.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise OSError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port"
        ) from error


def launch(app: "gr.Blocks", **settings: Any) -> tuple[Any, str, str | None]:
    """Serves an app as Gradio's `launch` does, in fonts of the system: a page loads nothing from elsewhere.

    Args:
        settings: of `launch`, such as `server_name`, `server_port` and `share`.

    Raises:
        OSError: if the port is taken.
    """
    check_gradio()
    import gradio as gr

    fonts: dict[str, Any] = {
        "font": ["Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
        "font_mono": ["Consolas", "monospace"],
    }
    own = {"theme": gr.themes.Default(**fonts), "css": page.PAGE_CSS, "footer_links": [], "run_history": False}
    return app.launch(**{**own, "ssr_mode": False, "max_file_size": "30mb", **settings})
