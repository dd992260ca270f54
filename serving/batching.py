# SPDX-License-Identifier: Apache-2.0
"""One model for many: requests that arrive together go through it as one padded batch."""

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from ..inference.generation import KnownImages
from ..inference.replies import Reply, reply

Messages = Sequence[Mapping[str, Any]]


class BatcherClosedError(RuntimeError):
    """The batcher was closed before the reply was whole."""


class PendingReply:
    """A reply that is being written; [`Batcher.submit`] makes it.

    Iterating gives its text in pieces of whole characters as it is written, once, and raises what went wrong; after `cancel`
    it ends. `future` has the reply for those that wait in other ways; to cancel the future is to cancel the reply.
    """

    def __init__(
        self,
        messages: Messages,
        max_new_tokens: int,
        maps: bool,
        on_piece: Callable[[str], None] | None,
        settings: Mapping[str, Any],
    ):
        self.messages = messages
        self.max_new_tokens = max_new_tokens
        self.maps = maps
        self.settings = settings
        self.arrived = time.monotonic()
        self.written: list[int] = []
        """Tokens of the reply so far."""
        self.future: Future[Reply] = Future()
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._on_piece = on_piece
        self._said = 0  # characters
        self.future.add_done_callback(lambda _: self._pieces.put(None))

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        if not self.future.cancelled():
            self.result()

    def result(self, timeout: float | None = None) -> Reply:
        """Waits for the whole reply.

        Raises:
            ValueError: if the conversation cannot be answered: a bad image, logits that are not finite.
            CancelledError: after `cancel`.
            BatcherClosedError: if the batcher was closed before the reply was whole.
            TimeoutError: after `timeout` seconds.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Ends the reply, whose row is left out from the next token on. A reply that is whole stays."""
        self.future.cancel()

    def say(self, text: str) -> None:
        """Takes the text so far."""
        if self.future.done() or len(text) <= self._said:
            return
        piece, self._said = text[self._said :], len(text)
        self._pieces.put(piece)
        if self._on_piece is not None:
            try:
                self._on_piece(piece)
            except Exception as error:  # of a listener that is gone; its neighbors go on
                self.end(error)

    def end(self, found: Reply | BaseException) -> None:
        """Takes the whole reply, or what went wrong. Only the first counts."""
        with contextlib.suppress(InvalidStateError):  # it has ended, perhaps in this moment
            if isinstance(found, Reply):
                self.say(found.text)
                self.future.set_result(found)
            else:
                self.future.set_exception(found)


class Batcher:
    """Owns a model and its processor: one thread, in which conversations are answered together.

    Requests that arrive within `max_wait` seconds and have equal settings of `generate` are one batch, whose rows may differ in
    their lengths, images and longest replies. Greedy replies are those of one conversation alone. An image of an AGE-VLM is
    encoded once, and its features are kept for the next turns.

    While others wait, a batch pauses after `turn` tokens, or sooner the more they are: after `turn` times its part of all
    requests. Its unfinished rows queue behind those that wait, so that a long reply does not hold up short ones; rows that go
    on are read again together with the newcomers. An error of one request is raised to that one: its neighbors are then answered singly.

    Args:
        max_batch_size: most conversations in one pass, which bounds the memory.
        max_wait: seconds that a first request waits for others.
        turn: most tokens that a batch writes before others get their turn.
        known_images: images whose features are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        max_batch_size: int = 16,
        max_wait: float = 0.01,
        turn: int = 32,
        known_images: int = 64,
    ):
        if max_batch_size < 1 or turn < 1:
            raise ValueError(f"max_batch_size and turn must be at least 1, got {max_batch_size} and {turn}")
        # A tokenizer that two threads use at once fails, so this thread has its own.
        self.model, self.processor = model, copy.deepcopy(processor)
        self.max_batch_size, self.max_wait, self.turn = max_batch_size, max_wait, turn
        self._known = KnownImages(known_images)
        self._waiting: list[PendingReply] = []
        self._changed = threading.Condition()
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="agevlm-batcher", daemon=True)

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 128,
        maps: bool = False,
        on_piece: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> PendingReply:
        """Asks for the reply to a conversation; returns at once.

        Args:
            messages: as for [`reply`], images as PIL images.
            max_new_tokens: longest reply, in tokens.
            maps: also collect where every token attends (AGE-VLM only).
            on_piece: called in the model's thread with each piece of text.
            settings: of `generate`; greedy decoding by default.

        Raises:
            BatcherClosedError: if the batcher is closed.
            ValueError: if the reply may have no token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        pending = PendingReply(messages, max_new_tokens, maps, on_piece, settings)
        with self._changed:
            if self.closed:
                raise BatcherClosedError("the batcher is closed")
            if self._thread.ident is None:  # in the process that asks, into which threads are not forked
                self._thread.start()
            self._waiting.append(pending)
            self._changed.notify()
        return pending

    def close(self) -> None:
        """Ends the thread after the token that is being written. Requests that wait or are in flight end with a BatcherClosedError."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(not pending.future.done() for pending in self._waiting)

    def _run(self) -> None:
        reason: BaseException = BatcherClosedError("the batcher was closed before the reply was whole")
        try:
            self.model.eval()
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as error:  # nobody must wait for a thread that is gone
            reason = error
            raise
        finally:
            with self._changed:
                self.closed = True
                for pending in self._waiting:
                    pending.end(reason)

    def _next_batch(self) -> list[PendingReply]:
        """Waits for requests; returns the first and those that can be answered with it, none once closed."""

        def fitting() -> list[PendingReply]:
            self._waiting = [pending for pending in self._waiting if not pending.future.done()]
            alike = [
                p for p in self._waiting if (p.maps, p.settings) == (self._waiting[0].maps, self._waiting[0].settings)
            ]
            return alike[: self.max_batch_size]

        with self._changed:
            while not self.closed:
                batch = fitting()
                left = batch[0].arrived + self.max_wait - time.monotonic() if batch else None
                if left is not None and (left <= 0 or len(batch) == self.max_batch_size):
                    self._waiting = [pending for pending in self._waiting if pending not in batch]
                    return batch
                self._changed.wait(left)
        return []

    def _answer(self, batch: list[PendingReply]) -> None:
        try:
            found = reply(
                self.model,
                self.processor,
                [pending.messages for pending in batch],
                max_new_tokens=[pending.max_new_tokens for pending in batch],
                maps=batch[0].maps,
                begun=[list(pending.written) for pending in batch],
                known=self._known,
                streamer=_RowStreamer(self.processor, batch),
                stopping_criteria=StoppingCriteriaList([_Pauses(self, batch)]),
                **batch[0].settings,
            )
        except Exception as error:
            if len(batch) == 1:
                batch[0].end(error)
                return
            for pending in batch:
                # A row that was whole writes its last token once more.
                pending.written = pending.written[:-1]
                if not pending.future.done():
                    self._answer([pending])
            return
        unfinished = []
        for pending, one in zip(batch, found, strict=True):
            if one.finish_reason == "cut":
                pending.written = one.tokens
                unfinished.append(pending)
            else:
                pending.end(one)
        with self._changed:
            self._waiting += unfinished


class _RowStreamer(BaseStreamer):
    """Hands each row of a batch its text as it is written."""

    def __init__(self, processor: ProcessorMixin, batch: list[PendingReply]):
        self.tokenizer, self.batch = processor.tokenizer, batch

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 2:  # the prompts, which come first
            return
        for pending, token in zip(self.batch, value.tolist(), strict=True):
            if token < 0 or pending.future.done():
                continue
            pending.written.append(token)
            text = self.tokenizer.decode(pending.written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not text.endswith("\ufffd"):  # else the rest of the character is to come
                pending.say(text)

    def end(self) -> None:
        pass


class _Pauses(StoppingCriteria):
    """Ends the rows that were canceled, and all rows when others have waited for a turn or the batcher closes."""

    def __init__(self, batcher: Batcher, batch: list[PendingReply]):
        self.batcher, self.batch, self.steps = batcher, batch, 0

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        self.steps += 1
        waiting, rows = self.batcher.waiting, len(self.batch)
        turn_ends = waiting > 0 and self.steps * (rows + waiting) >= self.batcher.turn * rows
        pause = self.batcher.closed or turn_ends
        return torch.tensor([pause or pending.future.done() for pending in self.batch], device=input_ids.device)
