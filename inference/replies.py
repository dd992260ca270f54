# SPDX-License-Identifier: Apache-2.0
"""Replies to conversations, several as one batch, with the attention of every token in the pass that read or wrote it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import (
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ..attention.coverage import image_token_id, tile_grid
from ..attention.grid import ImageGrid, image_grid
from ..attention.maps import attention_maps, find_model, text_layers
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel
from ..processing.image_processing_agevlm import to_rgb
from ..processing.processing_agevlm import AgeVlmProcessor
from .generation import (
    GREEDY,
    KEEP_INVALID,
    Batch,
    FiniteLogits,
    KnownImages,
    check_finite,
    read_batch,
    render_chat,
)


@dataclass(frozen=True)
class TokenMaps:
    """Where each token of a text attends, read at its own position.

    `blocks` are the names of the blocks, `text` is the prompt and the answer, `ids` its tokens, `offsets` `(tokens, 2)` the first character of each token in it and the one after
    its last, `maps` `(blocks, tokens, image tokens of all images)`, float32 or a smaller type to keep, `grids` the cells over each image, `grid` what
    [`~agevlm.attention.token_coverage`] needs to know of the model. A block is one of an AGE-VLM's, or a layer of another model, or a head of it. The attention of a token sums to 1 over all images that it sees and what else it
    attends to: an AGE-VLM's sink, or the tokens of the text. That of a token that sees no image is 0.
    """

    text: str
    ids: list[int]
    offsets: torch.Tensor
    maps: torch.Tensor
    grids: list[ImageGrid]
    blocks: list[str]
    grid: tuple[int, int] | None = None

    def on_image(self, maps: torch.Tensor, image: int) -> torch.Tensor:
        """Maps `(..., image tokens of all images)` as `(..., rows, columns)` of the cells over one image."""
        counts = [len(grid.shares) for grid in self.grids]
        start = sum(counts[:image])
        return self.grids[image].show(maps[..., start : start + counts[image]])

    def of_span(self, start: int, end: int, *, predicting: bool = False) -> torch.Tensor:
        """The map of characters `start` to `end` of `text`: the mean over their tokens, `(blocks, image tokens of all images)`.

        Args:
            predicting: read one token earlier, while the model chooses the token.

        Raises:
            ValueError: if there is no token between them.
        """
        tokens = self.tokens(start, end)
        if not tokens:
            raise ValueError(f"characters {start} to {end} of {self.text!r} have no token: choose words")
        return self.maps[:, [max(token - predicting, 0) for token in tokens]].float().mean(1)

    def tokens(self, start: int, end: int) -> list[int]:
        """Numbers of the tokens that share a character with the span."""
        queries = AgeVlmProcessor.get_map_queries(self.offsets[None], [[(start, end)]], text=[self.text])
        return queries[0, 0].nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Reply:
    """What a model has written to one conversation.

    `prompt` is the conversation as the chat template writes it, `images` those of the conversation in order, RGB, `text` the
    answer without special tokens, `tokens` the ids that were generated, `finish_reason` "stop" or "length", or "cut" where a
    stopping criterion of the caller has ended it. `maps` covers `prompt + text`; None where they were not asked for.
    """

    prompt: str
    images: list[Image.Image]
    text: str
    tokens: list[int]
    finish_reason: str
    maps: TokenMaps | None = None


def inner_model(model: torch.nn.Module) -> AgeVlmModel:
    """The AGE-VLM without its head, inside whatever wraps it, as PEFT does."""
    (inner,) = (module for module in model.modules() if isinstance(module, AgeVlmModel))
    return inner


def is_agevlm(model: torch.nn.Module) -> bool:
    """Whether a model is an AGE-VLM, alone or inside PEFT."""
    return isinstance(find_model(model), AgeVlmForConditionalGeneration)


def cross_attention_layers(config: PreTrainedConfig) -> list[int]:
    """The Llama layers before which a model of this configuration has cross-attention; none in models of other kinds."""
    return getattr(config.get_text_config(), "cross_attention_llama_layers", [])


def map_layers(model: torch.nn.Module) -> list[int]:
    """The layers of the text model whose maps a reply has: of an AGE-VLM those before which it has cross-attention."""
    inner = find_model(model)
    return cross_attention_layers(inner.config) if is_agevlm(inner) else list(text_layers(inner))


def block_titles(model: torch.nn.Module, heads_of: int | None = None) -> list[str]:
    """A name for each block of a model's maps: of an AGE-VLM by the Llama layer that it stands before, of others by their layer; or for each
    head of the layer `heads_of`."""
    if heads_of is not None:
        heads = find_model(model).config.get_text_config().num_attention_heads
        return [f"layer {heads_of}, head {head}" for head in range(heads)]
    where = "before layer" if is_agevlm(model) else "layer"
    return [f"{where} {layer}" for layer in map_layers(model)]


@contextlib.contextmanager
def record_maps(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the maps of all tokens that an AGE-VLM reads in the block: one `(blocks, batch, tokens, visual tokens)` for
    each of its forward passes."""
    inner = inner_model(model)
    maps: list[torch.Tensor] = []

    def ask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        each = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        return args, {**kwargs, "map_queries": each.expand(ids.shape[0], -1, -1)}

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        maps.append(output.cross_attention_maps)

    with inner.register_forward_pre_hook(ask, with_kwargs=True), inner.register_forward_hook(keep):
        yield maps


def conversation_images(messages: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The images of a conversation, in order, RGB."""
    return [
        to_rgb(part["image"])
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    maps: bool = False,
    heads_of: int | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    known: KnownImages | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    stop_strings: str | list[str] | None = None,
    names: Sequence[str] | None = None,
    **settings: Any,
) -> list[Reply]:
    """Replies to conversations, all as one padded batch.

    Args:
        conversations: messages in the form of Transformers' chat templates, images as `{"type": "image", "image": PIL.Image}`.
        max_new_tokens: longest reply, in tokens, or that of each conversation.
        maps: also collect where every token attends: those of an AGE-VLM from the passes that wrote the replies, those of other models
            from one more pass that reads them.
        heads_of: a layer whose heads' maps are collected in place of the layers'.
        begun: first tokens of each reply, fewer than its longest, which the model goes on from.
        known: images that need not be read again ([`read_batch`]).
        streamer: gets the prompts' ids `(batch, seq)`, then those of each step `(batch,)`, -1 for replies that are whole.
        stopping_criteria: as for `generate`.
        stop_strings: texts that end a reply, which has them.
        names: what each conversation is, for the message; by default its last text.
        settings: of `generate`; greedy decoding by default.

    Raises:
        ValueError: if a logit is not finite, an image has no image token or the reverse, or the model has no maps, or none
            of single heads.
    """
    prompts = [render_chat(processor, messages, add_generation_prompt=True) for messages in conversations]
    images = [conversation_images(messages) for messages in conversations]
    batch = read_batch(model, processor, prompts, images if any(images) else None, known, offsets=maps)
    own = is_agevlm(model)
    if own and heads_of is not None:
        raise ValueError("An AGE-VLM's blocks average over their heads: leave `heads_of` out.")
    longest = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    begun = [[]] * len(prompts) if begun is None else begun
    inputs = _append(batch.inputs, begun, processor.tokenizer.pad_token_id)
    width = inputs["input_ids"].shape[1]
    left = [most - len(first) for most, first in zip(longest, begun, strict=True)]
    finite = FiniteLogits()
    stops = StopStringCriteria(processor.tokenizer, stop_strings) if stop_strings else None
    ends = _Ends(width, torch.tensor(left, device=model.device), _end_tokens(model, processor), finite, stops)
    recording: Any = record_maps(model) if maps and own else contextlib.nullcontext([])
    with recording as recorded:
        out = model.generate(
            **inputs,
            **{**GREEDY, **settings},
            **KEEP_INVALID,
            max_new_tokens=max(left),
            pad_token_id=processor.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([finite]),
            streamer=None if streamer is None else _OpenRows(streamer, ends),
            stopping_criteria=StoppingCriteriaList([ends, *(stopping_criteria or ())]),
            return_dict_in_generate=True,
        )
        asked = names or [f"the question {_last_text(messages)!r}" for messages in conversations]
        check_finite(model, finite.rows, asked)
        if maps and own:
            _read_last_token(model, inputs["attention_mask"], out)
    lengths, stopped = ends.lengths.tolist(), ends.stopped.tolist()
    read = None  # (blocks, batch, tokens, image tokens)
    if maps:
        written = out.sequences[:, width:]
        read = (
            torch.cat(recorded, dim=2)
            if own
            else _read_maps(model, processor, batch.inputs, begun, written, any(images), heads_of)
        )
    found = []
    for row, prompt in enumerate(prompts):
        tokens = [*begun[row], *out.sequences[row, width:][: lengths[row]].tolist()]
        token_maps = None
        if read is None:
            text = _decode(processor.tokenizer, tokens)
        else:
            text, offsets = decode_with_offsets(processor.tokenizer, tokens)
            first = width - int(inputs["attention_mask"][row].sum())
            token_maps = _token_maps(
                model, processor, batch, row, read[:, row, first:], prompt + text, tokens, offsets, heads_of
            )
        reason = "stop" if stopped[row] else "length" if len(tokens) == longest[row] else "cut"
        found.append(Reply(prompt, images[row], text, tokens, reason, token_maps))
    return found


class _Ends(StoppingCriteria):
    """Ends the rows that are as long as they may be, have written an end token or a stop string, or have had logits that are not
    finite.

    `lengths` `(batch,)` are the new tokens of each row up to there, `stopped` which have written an end token or a stop string.
    """

    def __init__(
        self,
        width: int,
        left: torch.Tensor,
        end_tokens: Sequence[int],
        finite: FiniteLogits,
        stops: StopStringCriteria | None,
    ):
        self.width, self.finite, self.stops = width, finite, stops
        self.end_tokens = left.new_tensor(end_tokens)
        self.lengths, self.stopped = left, torch.zeros_like(left, dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        written = input_ids.shape[1] - self.width
        stops = torch.isin(input_ids[:, -1], self.end_tokens)
        if self.stops is not None:
            stops = stops | self.stops(input_ids, scores)
        stops = stops & (written <= self.lengths) & ~self.stopped
        self.lengths, self.stopped = torch.where(stops, written, self.lengths), self.stopped | stops
        ended: Any = written >= self.lengths
        return ended if self.finite.rows is None else ended | ~self.finite.rows


class _OpenRows(BaseStreamer):
    """Hands on the tokens of rows that were not whole before, and -1 for the others, where `generate` may write anything."""

    def __init__(self, streamer: BaseStreamer, ends: _Ends):
        self.streamer, self.ends, self.written = streamer, ends, -1

    def put(self, value: torch.Tensor) -> None:
        self.written += 1
        self.streamer.put(value if value.ndim == 2 else value.masked_fill(self.written > self.ends.lengths.cpu(), -1))

    def end(self) -> None:
        self.streamer.end()


def _append(inputs: Mapping[str, Any], begun: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Inputs of a model with the first tokens of each reply behind its prompt, padded on the left again."""
    if not any(begun):
        return dict(inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    sizes = [int(row.sum()) + len(first) for row, first in zip(mask, begun, strict=True)]
    found = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
            continue
        padded = value.new_full((len(sizes), max(sizes)), pad if name == "input_ids" else 0)
        for row, (size, first) in enumerate(zip(sizes, begun, strict=True)):
            rest = {"input_ids": first, "attention_mask": [1] * len(first)}.get(name, [0] * len(first))
            padded[row, max(sizes) - size :] = torch.cat([value[row][mask[row]], value.new_tensor(rest)])
        found[name] = padded
    return found


@torch.no_grad()
def read_reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    messages: Sequence[Mapping[str, Any]],
    answer: str,
    *,
    heads_of: int | None = None,
) -> Reply:
    """The reply of a model that has written `answer`, with the maps of one forward pass that reads it.

    Raises:
        ValueError: if the model's outputs are not finite, or it has no maps.
    """
    prompt = render_chat(processor, messages, add_generation_prompt=True)
    images = conversation_images(messages)
    batch = read_batch(model, processor, [prompt], [images] if images else None, offsets=True)
    encoded = processor.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    tokens = encoded["input_ids"]
    written = torch.tensor([tokens], dtype=torch.long, device=model.device)
    read = _read_maps(
        model,
        processor,
        batch.inputs,
        [[]],
        written,
        bool(images),
        heads_of,
        asked=f"the question {_last_text(messages)!r}",
    )
    offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.long).reshape(-1, 2)
    maps = _token_maps(model, processor, batch, 0, read[:, 0], prompt + answer, tokens, offsets, heads_of)
    return Reply(prompt, images, answer, tokens, "stop", maps)


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content).strip()


def _end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Ids that end a reply: the model's, and padding, which `generate` writes behind them."""
    ids = model.generation_config.eos_token_id
    found = [*(ids if isinstance(ids, list) else [ids]), processor.tokenizer.pad_token_id]
    return [token for token in found if token is not None]


def _read_last_token(model: PreTrainedModel, prompt_mask: torch.Tensor, out: Any) -> None:
    """Reads the tokens of the last step too, which `generate` has chosen and not read."""
    mask = torch.ones_like(out.sequences)
    mask[:, : prompt_mask.shape[1]] = prompt_mask
    model(
        input_ids=out.sequences[:, -1:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1)[:, -1:],
        cache=out.cache,
        use_cache=True,
    )


def _read_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    begun: Sequence[Sequence[int]],
    written: torch.Tensor,
    shows_images: bool,
    heads_of: int | None,
    asked: str = "a question",
) -> torch.Tensor:
    """The maps `(blocks, batch, tokens, image tokens)` of layers, or of one layer's heads, in one pass that reads prompts, the first tokens
    of their replies and those that were written, `(batch, tokens)`. Those of tokens of images are 0."""
    read = _append(inputs, begun, processor.tokenizer.pad_token_id)
    more = written.shape[1]
    length = read["input_ids"].shape[1]
    for name, value in read.items():
        if name == "input_ids" or not isinstance(value, torch.Tensor) or value.shape[:2] != read["input_ids"].shape:
            continue
        # Replies are attended to, see what the last token of the prompt sees, and are no image.
        behind = value[:, -1:].expand(-1, more, *value.shape[2:])
        if value.ndim == 2 and name != "attention_mask":
            # What follows a prompt of PaliGemma is marked, because its tokens do not see each other.
            behind = torch.full_like(behind, model.config.model_type == "paligemma")
        read[name] = torch.cat([value, behind], 1)
    read["input_ids"] = torch.cat([read["input_ids"], written], 1)
    ids = read["input_ids"]
    texts = read["attention_mask"].bool()
    if not isinstance(processor, AgeVlmProcessor):  # of which an image has one token, and others have hundreds
        texts = texts & (ids != image_token_id(processor))
    if not shows_images:
        return torch.zeros(len(block_titles(model, heads_of)), *ids.shape, 0)
    rows = torch.eye(length + more, dtype=torch.bool, device=ids.device) & texts[:, None]
    kept = texts.any(0).nonzero()[:, 0]
    layers, by_head = (None, False) if heads_of is None else ([heads_of], True)
    with attention_maps(model, rows[:, kept], layers=layers, over="all", per_head=by_head) as found:
        outputs = model.base_model(**read, use_cache=False)
    check_finite(model, outputs.last_hidden_state.isfinite(), [asked] * len(ids))
    maps = found.maps if heads_of is None else found.maps[0].transpose(0, 1)
    whole = maps.new_zeros(*maps.shape[:2], length + more, maps.shape[-1])
    whole[:, :, kept] = maps
    return whole


def _token_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Batch,
    row: int,
    maps: torch.Tensor,
    text: str,
    answer: Sequence[int],
    answer_offsets: torch.Tensor,
    heads_of: int | None,
) -> TokenMaps:
    """The maps of one row of a batch. `maps` `(blocks, tokens, image tokens)` are those of its tokens, without padding."""
    assert batch.offsets is not None
    real = batch.inputs["attention_mask"][row].bool().cpu()
    offsets = torch.cat([batch.offsets[row][real], answer_offsets + len(batch.prompts[row])])
    own = is_agevlm(model)
    images = batch.images[row]
    grid = (batch.grid if images else None) if own else tile_grid(find_model(model))
    grids = [image_grid(processor, (image.height, image.width), grid) for image in images]
    maps = maps[:, : len(offsets), : sum(len(each.shares) for each in grids)]
    ids = [*batch.inputs["input_ids"][row].cpu()[real].tolist(), *answer]
    return TokenMaps(text, ids, offsets, maps.float().cpu(), grids, block_titles(model, heads_of), grid)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_with_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, torch.Tensor]:
    """The text of generated tokens, without special ones, and the characters `(start, end)` of each, `(len(ids), 2)`.

    Tokenizing the text again would not always give the tokens that were generated. A token that is a part of a character
    has that character. A special token has none: its `start` is its `end`.
    """
    text = ""
    offsets: list[tuple[int, int]] = []
    for number in range(1, len(ids) + 1):
        longer = _decode(tokenizer, ids[:number])
        if longer.endswith("\ufffd") and number < len(ids):
            continue  # the rest of the character is to come
        offsets += [(len(text), len(longer))] * (number - len(offsets))
        text = longer
    return text, torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)
