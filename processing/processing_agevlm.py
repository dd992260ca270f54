# Copyright 2026 The AGE-VLM contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor class for AGE-VLM: images and text to model inputs, chat templates with images, phrases to token masks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput, TruncationStrategy
from transformers.utils import auto_docstring

from .image_processing_agevlm import flatten_images

# The template of a language model expects contents that are strings. This prologue converts contents that are lists of
# parts, and changes nothing else in the messages. `trim_blocks` of Jinja, which is on in Transformers, removes its last
# newline. The template of the language model still begins on a new line, so that `lstrip_blocks` works as before.
_FLATTEN_CONTENTS = """\
{#- Contents that are lists of text and image parts become strings. The template of the language model follows. -#}
{%- set agevlm = namespace(messages=[], content='') -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is defined and content is iterable and content is not string and content is not mapping -%}
    {%- set agevlm.content = '' -%}
    {%- for part in content -%}
      {%- if part['type'] == 'text' -%}
        {%- set agevlm.content = agevlm.content + part['text'] -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set agevlm.content = agevlm.content + IMAGE_TOKEN -%}
      {%- else -%}
        {{- raise_exception('Parts of a message must have the type text or image, got ' ~ part['type'] ~ '.') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set agevlm.messages = agevlm.messages + [dict(message, content=agevlm.content)] -%}
  {%- else -%}
    {%- set agevlm.messages = agevlm.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = agevlm.messages %}
"""

DEFAULT_CHAT_TEMPLATE = (
    r"{{ bos_token or '' }}{% for message in messages %}{{ message['role'] + ':\n' }}"
    r"{% if message['role'] == 'assistant' %}"
    r"{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}"
    r"{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""Text-only chat template for a language model without a template. [`add_image_support`] adds the images."""


@auto_docstring(
    custom_intro="""
    A conversation as its chat template writes it, which remembers the special tokens that were typed into it.

    [`AgeVlmProcessor`] reads those as text. Only the whole string knows them: any part of it is an ordinary string.
    """
)
class RenderedChat(str):
    plain_characters: frozenset[int]

    def __new__(cls, text: str, plain_characters: Collection[int] = ()):
        self = super().__new__(cls, text)
        self.plain_characters = frozenset(plain_characters)
        return self

    @property
    def without_typed_tokens(self) -> str:
        """The text, of the same length, without special tokens other than those of the chat template."""
        return hide_characters(self, self.plain_characters)


def hide_characters(text: str, places: Collection[int]) -> str:
    """`text` with a star, which templates neither trim nor escape, at some places."""
    return "".join("*" if i in places else c for i, c in enumerate(text)) if places else text


def add_image_support(chat_template: str, image_token: str) -> str:
    """Makes a text-only chat template accept message contents that are lists of text and image parts.

    Texts are joined without separators, and each image part becomes one `image_token`. Then the template runs unchanged
    on contents that are strings, so that a text-only conversation gives the same text as before. A second call changes
    nothing.

    Use it for the templates of language models. A template that accepts lists of parts only would receive strings.
    """
    prologue = _FLATTEN_CONTENTS.replace("IMAGE_TOKEN", repr(image_token))
    return chat_template if chat_template.startswith(prologue) else prologue + chat_template


@auto_docstring(
    custom_intro="""
    Combines an image processor and the tokenizer of a language model.

    The text has one image token per image, which is never expanded: the language model reads images through
    cross-attention rather than as tokens.
    """
)
class AgeVlmProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor,
        tokenizer,
        image_token: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        sanitize_chats: bool = True,
    ):
        r"""
        image_token (`str`, *optional*, defaults to `tokenizer.image_token`):
            An existing special token of the tokenizer, such as a reserved token of Llama 3.2, so that no embedding is
            added.
        chat_template (`str` or `dict[str, str]`, *optional*):
            Jinja template of conversations, or several by name. By default the template of the tokenizer, if any, with
            [`add_image_support`].
        sanitize_chats (`bool`, *optional*, defaults to `True`):
            Whether special tokens and image tokens that someone types into a conversation are read as the text that they are.
            With `False` they become special tokens, as those that the chat template writes. It is the default of
            `sanitize_control_tokens` of [`~AgeVlmProcessor.apply_chat_template`].

        Raises:
            ValueError: if `image_token` is not an added token of the tokenizer, or already has another role.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        image_token = getattr(tokenizer, "image_token", None) if image_token is None else image_token
        self.image_token_id = _get_image_token_id(tokenizer, image_token)
        self.image_token = str(image_token)
        self.sanitize_chats = sanitize_chats
        if chat_template is None:
            template = tokenizer.chat_template
            named = template if isinstance(template, dict) else {"default": template} if template else {}
            supported = {name: add_image_support(text, self.image_token) for name, text in named.items()}
            self.chat_template = supported if isinstance(template, dict) else supported.get("default")

    @auto_docstring
    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        plain_characters: Sequence[Collection[int]] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        images (`ImageInput`, *optional*):
            One image, a list of all images of the batch in the order of their tokens, or one list per text. See
            [`AgeVlmImageProcessor`] for the accepted types.
        text (`str` or `list[str]`, *optional*):
            One text or a batch of texts, with one image token per image. Without text, only the images are processed.
        plain_characters (`list` of collections of `int`, *optional*):
            Per text, the places of characters that are read as text even where they spell a special token. By default those
            that a [`RenderedChat`] knows, and none in other strings.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` `(batch, seq)` of the text; `pixel_values`
            `(num_images, 3, height, width)` of all images of the batch in order; with padding, `image_sizes`
            `(num_images, 2)`, the height and the width of each image without its padding; with
            `return_offsets_mapping=True`, `offset_mapping` `(batch, seq, 2)`, which
            [`~AgeVlmProcessor.get_map_queries`] needs.

        Raises:
            ValueError: if a text is empty, if image tokens and images do not match, if truncation would remove an image
                token, or if an image is invalid.
        """
        chats = [text] if isinstance(text, str) else list(text or ())
        if plain_characters is not None:
            chats = [RenderedChat(chat, places) for chat, places in zip(chats, plain_characters, strict=True)]
        if not any(getattr(chat, "plain_characters", None) for chat in chats):
            return super().__call__(images=images, text=text, **kwargs)
        shown = [getattr(chat, "without_typed_tokens", chat) for chat in chats]
        images, *_ = self.prepare_inputs_layout(images=images)
        self.validate_inputs(images=images, text=shown)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        data = self.tokenize(chats, **merged["text_kwargs"])
        self._check_special_mm_tokens(shown, data, modalities=["image"])
        if images is not None:
            data.update(self.image_processor(images, **merged["images_kwargs"]))
        return data

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):  # type: ignore[override]
        if isinstance(images, (list, tuple)):  # TRL passes None for a text without images
            images = [[] if item is None else item for item in images]
        images, text, *_ = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        # A text-only batch may have an empty list of images per text.
        return (images if images is not None and flatten_images(images) else None), text, None, None

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:  # type: ignore[override]
        if images is None and text is None:
            raise ValueError("Pass `text`, `images` or both.")
        if text is None:
            return
        if not text:
            raise ValueError("`text` is an empty list. Pass at least one string.")
        for index, sample in enumerate(text):
            if not isinstance(sample, str):
                raise ValueError(f"`text` must be a string or a list of strings, got {type(sample)} at {index}.")
            if not sample:
                raise ValueError(f"Text {index} of {len(text)} is empty. Remove it, or pass a text that is not empty.")

        num_tokens = [sample.count(self.image_token) for sample in text]
        rule = f"The number of {self.image_token} tokens in the prompts should be the same as the number of images"
        fix = f"Write one {self.image_token} per image."
        if images is None:
            if any(num_tokens):
                index = next(i for i, count in enumerate(num_tokens) if count)
                raise ValueError(f"{rule}: text {index} has {num_tokens[index]}, but there are no images. Pass them.")
        elif isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images):
            num_images = [len(flatten_images(item)) for item in images]
            if len(num_images) != len(text):
                raise ValueError(
                    f"{rule} of each: got {len(num_images)} lists of images for {len(text)} texts. Pass one list per "
                    "text, an empty one for a text without images."
                )
            for index, (tokens, found) in enumerate(zip(num_tokens, num_images, strict=True)):
                if tokens != found:
                    raise ValueError(f"{rule}: text {index} has {tokens}, but {found} images. {fix}")
        elif sum(num_tokens) != (found := len(flatten_images(images))):
            raise ValueError(
                f"{rule}: the texts have {num_tokens}, {sum(num_tokens)} in all, but there are {found} images. {fix}"
            )

    def _process_images(self, images: ImageInput, **kwargs) -> tuple[BatchFeature, list[str]]:
        features = self.image_processor(images, **kwargs)
        num_images = len(features["pixel_values"])
        return features, [self.replace_image_token(features, index) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text of an image: the image token, without expansion."""
        return self.image_token

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs) -> MultiModalData:
        # Inference engines call this method.
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(num_image_tokens=[1] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    # Without this override a special token that someone types into a conversation becomes a real one. Transformers' own
    # `sanitize_control_tokens` gives no offsets and no masks of the assistant's turns, and misses tokens that are typed in
    # another form than the tokenizer normalizes them to, or in two parts. This can go when it has them.
    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict[str, str]] | None = None,
        *,
        tokenize: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool | None = None,
        **kwargs,
    ) -> Any:
        """Renders a conversation, or a list of conversations, and makes model inputs of it with `tokenize=True`.

        It takes the arguments of Transformers' method of the same name, with these differences. `sanitize_control_tokens` is about
        messages, tools and documents; other variables of the template are the program's own. It defaults to
        `sanitize_chats` of the processor with `tokenize=True`, and to False otherwise: the result is then an ordinary
        string, in which a typed special token looks like any other. With `tokenize=False` and `sanitize_control_tokens=True` it
        is a [`RenderedChat`], to be passed on as `text`.

        Raises:
            ValueError: if there is a typed special token, and the chat template changes the text around it.
        """
        if sanitize_control_tokens is None:
            sanitize_control_tokens = tokenize and self.sanitize_chats
        apply = super().apply_chat_template

        def render(values: dict[str, Any], **settings) -> Any:
            return apply(**values, chat_template=chat_template, **kwargs, **settings)

        inputs = {"tools": tools, "documents": documents}
        settings = {"tokenize": tokenize, "processor_kwargs": processor_kwargs}
        if not sanitize_control_tokens:
            return render({"conversation": conversation, **inputs}, **settings)
        chats, is_batched = self._normalize_conversations(conversation)
        typed = [self.find_typed_tokens({"conversation": chat, **inputs}, render) for chat in chats]
        if tokenize:
            settings["processor_kwargs"] = {**(processor_kwargs or {}), "plain_characters": typed}
            return render({"conversation": conversation, **inputs}, **settings)
        texts = [RenderedChat(*both) for both in zip(render({"conversation": chats, **inputs}), typed, strict=True)]
        return texts if is_batched else texts[0]

    def find_typed_tokens(self, inputs: Any, render: Callable[[Any], str]) -> frozenset[int]:
        """The places of the special tokens that were typed into a conversation, in the text that the chat template makes of it.

        The template runs twice, on the inputs as they are and with all special tokens in them hidden. Where the two texts
        differ, someone has typed a special token.

        Args:
            inputs: all that the template reads: messages, or a dictionary of messages, tools and the like.
            render: runs the template on `inputs`.

        Raises:
            ValueError: if there is a typed special token, and the template changes the text around it.
        """
        hidden = self._hide_special_tokens(inputs)
        if hidden is inputs:
            return frozenset()
        text, other = render(inputs), render(hidden)
        if len(text) != len(other):
            raise ValueError(
                "A text of the conversation contains a special token of the tokenizer, and the chat template changes that text, "
                "so it cannot be read as plain text. Remove the token, or set `processor.sanitize_chats = False`."
            )
        return frozenset(i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b)

    def _hide_special_tokens(self, value: Any) -> Any:
        """Hides the special tokens in all strings of a nested value; returns `value` itself if there are none."""
        if isinstance(value, str):
            return self._hide_in_texts([value])[0]
        if isinstance(value, Mapping):
            if value.get("type") in ("image", "image_url"):  # it may have a long string of base64
                return value
            hidden: Any = {name: self._hide_special_tokens(item) for name, item in value.items()}
            return hidden if any(hidden[name] is not item for name, item in value.items()) else value
        if isinstance(value, (list, tuple)):
            hidden = []
            for is_text, items in groupby(value, _is_text_part):
                if is_text:  # the texts of adjacent parts are joined, so that a token may be in two of them
                    parts = list(items)
                    texts = self._hide_in_texts([part["text"] for part in parts])
                    pairs = zip(parts, texts, strict=True)
                    hidden += [part if text is part["text"] else {**part, "text": text} for part, text in pairs]
                else:
                    hidden += [self._hide_special_tokens(item) for item in items]
            return hidden if any(a is not b for a, b in zip(hidden, value, strict=True)) else value
        return value

    def _hide_in_texts(self, texts: list[str]) -> list[str]:
        joined, special = "".join(texts), self._special_ids()
        found = self.tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True)
        places = {
            place
            for token_id, span in zip(found["input_ids"], found["offset_mapping"], strict=True)
            if token_id in special
            for place in range(*span)
            if not joined[place].isspace()  # white space beside a token may belong to it, and the template may trim it
        }
        if not places:
            return texts
        hidden, ends = hide_characters(joined, places), accumulate(map(len, texts))
        return [hidden[end - len(text) : end] for text, end in zip(texts, ends, strict=True)]

    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {token_id for token_id, token in added if token.special} | {self.image_token_id}

    def tokenize(
        self,
        text: Sequence[str],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **kwargs,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and, if asked for, `offset_mapping` of texts, by the arguments of tokenizers.

        What a [`RenderedChat`] marks as typed becomes no special token. All other tokens are those of `self.tokenizer`.
        """
        special = self._special_ids()
        padding, truncate, max_length, _ = self.tokenizer._get_padding_truncation_strategies(
            padding=padding, truncation=truncation, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of
        )
        encoded = self.tokenizer(list(text), add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids, offsets = [], []
        for chat, chat_ids, chat_offsets in zip(text, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            plain: frozenset[int] = getattr(chat, "plain_characters", frozenset())
            tokens: list[tuple[int, tuple[int, int]]] = []
            for token_id, (start, end) in zip(chat_ids, chat_offsets, strict=True):
                if token_id in special and not plain.isdisjoint(range(start, end)):
                    tokens += self._encode_as_text(chat[start:end], start)
                else:
                    tokens.append((token_id, (start, end)))
            if truncate != TruncationStrategy.DO_NOT_TRUNCATE:
                tokens = tokens[:max_length] if self.tokenizer.truncation_side == "right" else tokens[-max_length:]
            ids.append([token_id for token_id, _ in tokens])
            offsets.append([span for _, span in tokens])
        padded = self.tokenizer.pad(
            {"input_ids": ids}, padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask=True
        )
        data = {name: padded[name] for name in ("input_ids", "attention_mask")}
        if return_offsets_mapping:
            right = (padding_side or self.tokenizer.padding_side) == "right"
            fills = [[(0, 0)] * (len(row) - len(spans)) for row, spans in zip(data["input_ids"], offsets, strict=True)]
            data["offset_mapping"] = [
                spans + fill if right else fill + spans for spans, fill in zip(offsets, fills, strict=True)
            ]
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode_as_text(self, text: str, place: int) -> list[tuple[int, tuple[int, int]]]:
        """The tokens of the characters of a special token, none of which is special, with their offsets from `place` on.

        Raises:
            ValueError: if the tokenizer has no tokens for them.
        """
        tokens: list[tuple[int, tuple[int, int]]] = []
        for prefix in ("\n", ""):  # after a new line SentencePiece adds no space
            encoded = self.tokenizer(
                prefix + text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            spans = [(start - len(prefix), end - len(prefix)) for start, end in encoded["offset_mapping"]]
            tokens = [(i, span) for i, span in zip(encoded["input_ids"], spans, strict=True) if span[1] > 0]
            if tokens and all(start >= 0 for _, (start, _) in tokens):
                break
        if not self._special_ids().isdisjoint(
            token_id for token_id, _ in tokens
        ):  # an image token need not be special
            if len(text) == 1:
                raise ValueError(f"The tokenizer has no token for the text {text!r} other than a special one.")
            return self._encode_as_text(text[:1], place) + self._encode_as_text(text[1:], place + 1)
        return [(token_id, (start + place, end + place)) for token_id, (start, end) in tokens]

    @staticmethod
    def get_map_queries(
        offset_mapping: torch.Tensor,
        spans: Sequence[Sequence[tuple[int, int]]],
        attention_mask: torch.Tensor | None = None,
        text: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Finds the tokens of phrases, for the model input `map_queries`.

        A token belongs to a phrase if they share a character. A token with a leading space (`" dog"`) therefore belongs to
        a phrase that begins with the word. Special tokens, whose offsets are empty, belong to no phrase.

        Args:
            offset_mapping (`(batch, seq, 2)`):
                First character of each token and the one after its last, as the processor returns them with
                `return_offsets_mapping=True`.
            spans:
                Per text, the phrases as `(start, end)` in characters of that text, without the end and without spaces at
                both ends.
            attention_mask (`(batch, seq)`, *optional*):
                Masked tokens belong to no phrase.
            text (*optional*):
                The texts. If passed, each span is checked against the length of its text.

        Returns:
            `torch.Tensor`: bool `(batch, max_phrases, seq)`. A row is all False for a phrase whose tokens were truncated,
            and for padding of a text with fewer phrases than others.

        Raises:
            ValueError: if a span is negative, reversed, empty or outside its text, or if the numbers of texts differ.
        """
        offsets = torch.as_tensor(offset_mapping)
        if len(spans) != len(offsets) or (text is not None and len(text) != len(offsets)):
            raise ValueError(f"`offset_mapping` has {len(offsets)} texts. Pass spans and text for as many.")
        start, end = offsets.unbind(-1)
        queries = torch.zeros(
            len(offsets),
            max((len(row) for row in spans), default=0),
            offsets.shape[1],
            dtype=torch.bool,
            device=offsets.device,
        )
        for i, row in enumerate(spans):
            for j, (first, last) in enumerate(row):
                if not 0 <= first < last or (text is not None and last > len(text[i])):
                    raise ValueError(
                        f"Span ({first}, {last}) of phrase {j} in text {i} must be 0 <= start < end"
                        + (f" <= {len(text[i])}, the length of the text." if text is not None else ".")
                    )
                queries[i, j] = (start[i] < last) & (end[i] > first) & (start[i] < end[i])
        if attention_mask is not None:
            queries &= torch.as_tensor(attention_mask, device=offsets.device).bool()[:, None]
        return queries

    # Without this override settings that are set on a tokenizer are lost on disk, such as the side of padding: it saves those that
    # it was made with. It can go when Transformers saves the others too.
    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        for name in ("padding_side", "truncation_side", "split_special_tokens"):
            self.tokenizer.init_kwargs[name] = getattr(self.tokenizer, name)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of generic tokenizers that the model does not accept."""
        return ["token_type_ids"]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. It is the same before saving and after loading."""
        output = super().to_dict()
        if self._auto_class is not None:
            # Saving sets it, and loading drops it.
            output["auto_map"] = {
                self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            }
        return output


def _is_text_part(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text" and isinstance(value.get("text"), str)


def _get_image_token_id(tokenizer: PreTrainedTokenizerBase, image_token: str | None) -> int:
    fix = "Pass `image_token`: an existing special token of the tokenizer, such as a reserved one."
    if not image_token:
        raise ValueError(f"The tokenizer has no image token. {fix}")
    ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    if str(image_token) not in ids:
        raise ValueError(f"The image token {image_token!r} is not an added token of the tokenizer. {fix}")
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    if role := next((role for role in roles if getattr(tokenizer, role, None) == str(image_token)), None):
        raise ValueError(f"The image token {image_token!r} is already the {role} of the tokenizer. {fix}")
    return ids[str(image_token)]


# A saved processor contains this file, so that it loads without `agevlm`.
AgeVlmProcessor.register_for_auto_class()


__all__ = ["DEFAULT_CHAT_TEMPLATE", "AgeVlmProcessor", "RenderedChat", "add_image_support"]
