# SPDX-License-Identifier: Apache-2.0
"""Where a phrase attends: its cross-attention maps, on the image."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..attention.maps import attention_maps, find_model
from ..files import new_folder
from ..plots import draw_heatmaps
from ..processing.image_processing_agevlm import to_rgb
from .generation import ask_about, render_chat
from .replies import Reply, cross_attention_layers, is_agevlm, map_layers, read_reply, reply

# More rows of heat maps than this are too many for one figure.
_ROWS_DRAWN = 12


_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def find_words(text: str) -> list[tuple[int, int]]:
    """Characters `(start, end)` of each word of a text, in order."""
    return [match.span() for match in _WORD.finditer(text)]


def find_phrase(text: str, phrase: str) -> tuple[int, int]:
    """Characters `(start, end)` of the last place in `text` that reads `phrase`, whatever its case.

    Raises:
        ValueError: if `text` does not contain it.
    """
    # Not by lower case, which has another length for some letters.
    places = [match.start() for match in re.finditer(f"(?={re.escape(phrase)})", text, re.IGNORECASE)]
    if not places or not phrase:
        raise ValueError(f"The phrase '{phrase}' does not occur in the text '{text}': choose words of it.")
    return places[-1], places[-1] + len(phrase)


def find_question(processor: ProcessorMixin, prompt: str, question: str) -> int:
    """The first character of a question in the prompt of a reply: of the last turn's, or of the last place that reads so.

    What the chat template writes behind the last turn may read so too: "assistant".

    Raises:
        ValueError: if the prompt does not contain it.
    """
    mark = "\ue000"  # no text has it: a character of private use
    turn = {"role": "user", "content": [{"type": "text", "text": mark}]}
    behind = render_chat(processor, [turn], add_generation_prompt=True).rpartition(mark)[2]
    if prompt.endswith(question + behind):
        return len(prompt) - len(behind) - len(question)
    return find_phrase(prompt, question)[0]


@dataclass(frozen=True)
class Phrase:
    """Words of a question or of its answer (`source`), from character `start` to `end` of it."""

    text: str
    source: str
    start: int
    end: int


def choose_phrases(question: str, answer: str, wanted: Sequence[str | Phrase] | None = None) -> list[Phrase]:
    """Where phrases stand: in the answer or, if they do not, in the question, at the last place there ([`find_phrase`]).

    By default these are all words of the answer, each as often as it occurs. A [`Phrase`] stands where it says.

    Raises:
        ValueError: if a phrase occurs in neither, or the answer has no words.
    """
    if wanted is None:
        words = [Phrase(answer[start:end], "answer", start, end) for start, end in find_words(answer)]
        if not words:
            raise ValueError(f"The answer '{answer}' has no words: name words of the question as phrases.")
        return words
    phrases = []
    for text in wanted:
        if isinstance(text, Phrase):
            phrases.append(text)
            continue
        for source, whole in (("answer", answer), ("question", question)):
            try:
                start, end = find_phrase(whole, text)
            except ValueError:
                continue
            phrases.append(Phrase(whole[start:end], source, start, end))
            break
        else:
            raise ValueError(
                f"The phrase '{text}' occurs neither in the question '{question}' nor in the answer '{answer}': "
                "choose words of them."
            )
    return phrases


@dataclass
class Attention:
    """Where phrases of a question and its answer attend in an image; [`attend`] makes it.

    `maps` is float32 `(blocks, phrases, rows, columns)`, `cell` the width and height in pixels of the image that one
    of its cells covers; cells at the right and at the bottom may reach beyond the image. A block is one of an AGE-VLM's, or a layer of
    another model. `sink`, float32 `(blocks, phrases)`, is the attention that is on no image: `rest` says where it is, on the "sink" or
    "elsewhere", on tokens of the text or class tokens; None in a model that has nothing else to attend to. `tokens` are those that make up each phrase, as text.
    """

    image: Image.Image
    question: str
    answer: str
    phrases: list[Phrase]
    tokens: list[list[str]]
    blocks: list[str]
    maps: np.ndarray
    cell: tuple[float, float]
    sink: np.ndarray | None = None
    rest: str = "sink"

    def strongest(self, attention: np.ndarray) -> dict[str, Any]:
        """The strongest cell of a map `(rows, columns)`: where it is in the map, how much of the attention it holds, and
        its `box` `[left, top, right, bottom]` in pixels of the image."""
        row, column = (int(i) for i in np.unravel_index(attention.argmax(), attention.shape))
        width, height = self.cell
        right = min((column + 1) * width, self.image.width)
        bottom = min((row + 1) * height, self.image.height)
        box = [round(float(side), 2) for side in (column * width, row * height, right, bottom)]
        return {"row": row, "column": column, "attention": float(attention[row, column]), "box": box}

    def to_dict(self) -> dict[str, Any]:
        """All but the image, for JSON: of each phrase the map of every block, and last their average; with the attention on the
        sink, if there is one."""
        phrases = []
        for number, (phrase, tokens) in enumerate(zip(self.phrases, self.tokens, strict=True)):
            maps = _with_average(self.maps[:, number])
            sinks: list[dict[str, float]] = [{}] * (len(self.blocks) + 1)
            if self.sink is not None:
                sinks = [{self.rest: round(float(share), 8)} for share in _with_average(self.sink[:, number])]
            phrases.append(
                {
                    "phrase": phrase.text,
                    "in": phrase.source,
                    "start": phrase.start,
                    "end": phrase.end,
                    "tokens": tokens,
                    "maps": [
                        {
                            "block": block,
                            **sink,
                            "strongest": self.strongest(attention),
                            "map": attention.astype(float).round(8).tolist(),
                        }
                        for block, attention, sink in zip([*self.blocks, "average"], maps, sinks, strict=True)
                    ],
                }
            )
        return {
            "question": self.question,
            "answer": self.answer,
            "image_size": {"width": self.image.width, "height": self.image.height},
            "grid": {"rows": self.maps.shape[2], "columns": self.maps.shape[3]},
            "cell": {"width": self.cell[0], "height": self.cell[1]},
            "phrases": phrases,
        }

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: a row for each phrase, a column for each block and one for the average. Of more than 12 phrases,
        only the first are drawn."""
        shown, sink = self.maps[:, :_ROWS_DRAWN], self.sink
        caption = f"{self.question}\n{self.answer.strip()}"
        if len(self.phrases) > _ROWS_DRAWN:
            caption += f"\n(the first {_ROWS_DRAWN} of {len(self.phrases)} phrases; attention.json has all)"
        draw_heatmaps(
            self.image,
            _with_average(shown).swapaxes(0, 1),
            [*self.blocks, "average"],
            path,
            caption,
            labels=[f"{phrase.text} ({phrase.source})" for phrase in self.phrases[:_ROWS_DRAWN]],
            cell=self.cell,
            sink=None if sink is None else _with_average(sink[:, :_ROWS_DRAWN]).swapaxes(0, 1),
            rest=self.rest,
        )

    def save(self, folder: str | Path, **settings: Any) -> None:
        """Writes `attention.png` ([`draw`]) and `attention.json` (`settings` and [`to_dict`]) to a new folder, which
        appears when both are written.

        Raises:
            FileExistsError: if `folder` exists and is not an empty folder.
            ImportError: if matplotlib is not installed.
        """
        with new_folder(folder) as partial:
            self.draw(partial / "attention.png")
            text = json.dumps({**settings, **self.to_dict()}, ensure_ascii=False)
            (partial / "attention.json").write_text(text + "\n", encoding="utf-8")


def _with_average(blocks: np.ndarray) -> np.ndarray:
    """Values of all blocks `(blocks, ...)`, and last their mean."""
    return np.concatenate([blocks, blocks.mean(0, keepdims=True)])


@torch.no_grad()
def attend(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    answer: str | None = None,
    phrases: Sequence[str | Phrase] | None = None,
    *,
    predicting: bool = False,
    heads_of: int | None = None,
    max_new_tokens: int = 64,
) -> Attention:
    """Where phrases of a question about an image, and of its answer, attend.

    A phrase's map is the mean over its tokens, in question and answer alike, each read at its own
    position: the token is the query. This is the attention of a model that has read the token, and it is what guidance
    trains. The attention while the model chooses a token is read one position earlier (`predicting`).

    Args:
        image: before any resizing.
        answer: by default, the model's own (greedy decoding); maps are then of the very tokens that were generated.
        phrases: words of the answer or the question; all words of the answer by default (see [`choose_phrases`]).
        predicting: read phrases of the answer at the tokens before theirs, which predict them.
        heads_of: a layer whose heads are shown in place of the layers; not of an AGE-VLM.
        max_new_tokens: longest answer of the model, in tokens.

    Raises:
        ValueError: if the model has no maps, a phrase does not occur or has no token, there are no phrases, or
            the model's outputs are not finite.
    """
    found = ask_or_read(model, processor, image, question, answer, max_new_tokens, heads_of)
    return show_reply(model, processor, found, question, phrases, predicting=predicting)


def ask_or_read(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    answer: str | None,
    max_new_tokens: int,
    heads_of: int | None = None,
) -> Reply:
    """A reply to a question about an image, with maps: the model's own, or that of a model that has written `answer`.

    Raises:
        ValueError: if the model has no maps, or its outputs are not finite.
    """
    messages = ask_about(question, to_rgb(image))
    if answer is not None:
        return read_reply(model, processor, messages, answer, heads_of=heads_of)
    (found,) = reply(model, processor, [messages], max_new_tokens=max_new_tokens, maps=True, heads_of=heads_of)
    return found


def show_reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    found: Reply,
    question: str,
    phrases: Sequence[str | Phrase] | None = None,
    *,
    image: int = 0,
    predicting: bool = False,
) -> Attention:
    """Where phrases attend in one image of a conversation, from the maps of the pass that wrote the reply.

    Args:
        found: a reply with maps.
        question: text of the conversation's last turn, or of another; its last place in the prompt is taken.
        phrases: words of the reply or the question; all words of the reply by default (see [`choose_phrases`]).
        image: number of the image in the conversation.
        predicting: read phrases of the reply at the tokens before theirs, which predict them.

    Raises:
        ValueError: if a phrase does not occur or has no token, or there are no phrases.
    """
    assert found.maps is not None
    chosen = choose_phrases(question, found.text, phrases)
    starts = {"question": find_question(processor, found.prompt, question), "answer": len(found.prompt)}
    maps, tokens = [], []
    for phrase in chosen:
        start, end = (starts[phrase.source] + place for place in (phrase.start, phrase.end))
        numbers = found.maps.tokens(start, end)
        if not numbers:
            raise ValueError(f"The phrase '{phrase.text}' of the {phrase.source} has no token: choose words.")
        tokens.append([processor.tokenizer.decode(found.maps.ids[number]) for number in numbers])
        maps.append(found.maps.of_span(start, end, predicting=predicting and phrase.source == "answer"))
    stacked = torch.stack(maps, dim=1)  # (blocks, phrases, image tokens of all images)
    # What is not on an image is on the sink, or on the text.
    rest = None
    if has_rest(model):
        rest = (1 - stacked.sum(-1)).clamp(min=0).numpy()
    grid = found.maps.grids[image]
    return Attention(
        image=found.images[image],
        question=question,
        answer=found.text,
        phrases=chosen,
        tokens=tokens,
        blocks=found.maps.blocks,
        maps=found.maps.on_image(stacked, image).numpy(),
        cell=grid.cell,
        sink=rest,
        rest="sink" if is_agevlm(model) else "elsewhere",
    )


def can_show(model: PreTrainedModel) -> bool:
    """Whether a model has maps: an AGE-VLM with cross-attention, or another whose attention [`attention_maps`] can read."""
    try:
        with attention_maps(model, torch.zeros(1, 0, 0, dtype=torch.bool)):
            return bool(map_layers(model))
    except ValueError:
        return False


def has_rest(model: PreTrainedModel) -> bool:
    """Whether attention can be on something else than places of images: an AGE-VLM's sink; in other models the text, or class tokens."""
    return not is_agevlm(model) or bool(find_model(model).config.get_text_config().cross_attention_sink)


def check_cross_attention(config: PreTrainedConfig, name: str) -> None:
    """
    Raises:
        ValueError: if a model of this configuration has no cross-attention that could be shown; calls it `name`.
    """
    if not cross_attention_layers(config):
        raise ValueError(
            f"{name} is a model of the type {config.model_type} and has no cross-attention maps to show: "
            "choose an AGE-VLM, such as `agevlm build` makes."
        )
