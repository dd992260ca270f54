# SPDX-License-Identifier: Apache-2.0
"""A conversation of the app: its images, its turns, and where each of their words looks, in bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..inference.attention import Attention, Phrase, find_question, show_reply
from ..inference.generation import render_chat
from ..inference.grounding import Calibration, Grounded, ground_reply
from ..inference.replies import Reply, TokenMaps


@dataclass(frozen=True)
class Limits:
    """What a conversation may hold, which bounds its memory.

    `tokens` of prompt and answer, and never more than the model was made for; `new_tokens` of an answer; `images`, and the longest
    `side` of one in pixels: larger ones are made smaller.
    """

    tokens: int = 2048
    new_tokens: int = 128
    images: int = 8
    side: int = 1536


@dataclass(frozen=True)
class Word:
    """Words of a conversation: of the question or the answer (`source`) of a turn, from character `start` to `end` of it."""

    turn: int
    source: str
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the reply. `reply` has all images up to it, and the maps of this turn's tokens alone, as
    float16."""

    question: str
    images: list[Image.Image]
    reply: Reply


class Conversation:
    """Turns of one user with a model.

    Args:
        calibration: of the model's grounding ([`~agevlm.inference.grounding.find_calibration`]).
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, limits: Limits, calibration: Calibration):
        self.model, self.processor, self.limits, self.calibration = model, processor, limits, calibration
        self.turns: list[Turn] = []

    @property
    def images(self) -> list[Image.Image]:
        """All images, in order."""
        return [image for turn in self.turns for image in turn.images]

    def ask(self, question: str, images: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
        """The messages of the conversation and one more question, about new images or those before.

        Raises:
            ValueError: if that is more than the limits allow.
        """
        if len(self.images) + len(images) > self.limits.images:
            raise ValueError(f"A conversation has room for {self.limits.images} images: start a new one.")
        messages = []
        for turn in self.turns:
            messages += [_message("user", turn.question, turn.images), _message("assistant", turn.reply.text)]
        messages.append(_message("user", question, images))
        prompt = render_chat(self.processor, messages, add_generation_prompt=True)
        tokens = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + self.limits.new_tokens
        most = min(self.limits.tokens, self.model.config.get_text_config().max_position_embeddings)
        if tokens > most:
            fix = (
                "The conversation is too long: start a new one"
                if self.turns
                else "The question is too long: shorten it"
            )
            raise ValueError(f"{fix} ({tokens} tokens with those of an answer, of at most {most}).")
        return messages

    def add(self, question: str, images: Sequence[Image.Image], reply: Reply) -> None:
        """Takes the reply to what [`ask`] has made of the same question and images."""
        assert reply.maps is not None
        # A token sees nothing behind it, so the maps of earlier turns are as they were.
        maps = _from_character(reply.maps, find_question(self.processor, reply.prompt, question))
        kept = replace(reply, images=[*self.images, *images], maps=maps)
        self.turns.append(Turn(question, list(images), kept))

    def look(self, word: Word, image: int) -> Attention | None:
        """Where a word looks in an image, from the pass that answered; None if the word comes before the image.

        Raises:
            ValueError: if the conversation has no such word or image.
        """
        if not (0 <= word.turn < len(self.turns) and 0 <= image < len(self.images)):
            raise ValueError("This word is of a conversation that has ended.")
        turn = self.turns[word.turn]
        text = turn.question if word.source == "question" else turn.reply.text
        if word.source not in ("question", "answer") or not 0 <= word.start < word.end <= len(text):
            raise ValueError("This word is of a conversation that has ended.")
        if image >= len(turn.reply.images):
            return None
        phrase = Phrase(text[word.start : word.end], word.source, word.start, word.end)
        return show_reply(self.model, self.processor, turn.reply, turn.question, [phrase], image=image)

    def ground(self, turn: int, image: int) -> Grounded:
        """What the question and the answer of a turn name in an image, from the pass that answered.

        Raises:
            ValueError: if the conversation has no such turn, or the image comes after it.
        """
        if not 0 <= turn < len(self.turns):
            raise ValueError("This turn is of a conversation that has ended.")
        one = self.turns[turn]
        return ground_reply(
            self.model, self.processor, one.reply, one.question, image=image, calibration=self.calibration
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its images and maps."""
        pixels = sum(3 * image.width * image.height for image in self.images)
        return pixels + sum(turn.reply.maps.maps.nbytes for turn in self.turns if turn.reply.maps is not None)


def _message(role: str, text: str, images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _from_character(maps: TokenMaps, start: int) -> TokenMaps:
    """The maps of the tokens from a character on, as float16."""
    first = maps.tokens(start, len(maps.text))[0]
    return replace(maps, ids=maps.ids[first:], offsets=maps.offsets[first:], maps=maps.maps[:, first:].half())
