# SPDX-License-Identifier: Apache-2.0
"""`agevlm chat`: a conversation about images in the terminal."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ..inference.generation import open_image
from .batching import Batcher

HELP = """\
/image FILE   show an image: a file or a URL, before your next question; several are possible
/clear        begin a new conversation
/help         show this
/quit         end; so does Ctrl-D. Ctrl-C ends an answer"""


def chat(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    read_line: Callable[[], str],
    write: Callable[[str], None],
    images: list[Any] | None = None,
    max_new_tokens: int = 512,
) -> None:
    """Talks with a model until the input ends.

    Args:
        read_line: gives the next line, and raises EOFError at the end.
        write: gets what is to be shown, with its line breaks.
        images: RGB, shown before the first question.
        max_new_tokens: longest answer, in tokens.
    """
    messages: list[dict[str, Any]] = []
    shown = list(images or [])
    with Batcher(model, processor, max_wait=0) as batcher:
        while True:
            try:
                line = read_line().strip()
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/clear":
                messages, shown = [], []
                write("A new conversation.\n")
            elif command == "/image":
                try:
                    shown.append(open_image(rest.strip()))
                    width, height = shown[-1].size
                    write(f"An image of {width}x{height} pixels: ask about it.\n")
                except ValueError as error:
                    write(f"{error}\n")
            elif command.startswith("/"):
                write(("" if command == "/help" else f"There is no {command}.\n") + HELP + "\n")
            elif line:
                pictures = [{"type": "image", "image": image} for image in shown]
                asked = {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}
                answer = _answer(batcher, [*messages, asked], write, max_new_tokens)
                if answer is not None:
                    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
                    messages, shown = [*messages, asked, said], []


def _answer(
    batcher: Batcher, messages: list[dict[str, Any]], write: Callable[[str], None], max_new_tokens: int
) -> str | None:
    """Shows the answer as it is written. Returns it, or what there was of it at Ctrl-C; None if there is none."""
    pending = batcher.submit(messages, max_new_tokens=max_new_tokens)
    answer = ""
    try:
        for piece in pending:
            answer += piece
            write(piece)
    except KeyboardInterrupt:
        pending.cancel()
    except ValueError as error:
        write(f"{error}\n")
        return None
    write("\n")
    return answer or None
