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

from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput
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
    ):
        r"""
        image_token (`str`, *optional*, defaults to `tokenizer.image_token`):
            An existing special token of the tokenizer, such as a reserved token of Llama 3.2, so that no embedding is
            added.
        chat_template (`str` or `dict[str, str]`, *optional*):
            Jinja template of conversations, or several by name. By default the template of the tokenizer, if any, with
            [`add_image_support`].

        Raises:
            ValueError: if `image_token` is not an added token of the tokenizer, or already has another role.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        image_token = getattr(tokenizer, "image_token", None) if image_token is None else image_token
        self.image_token_id = _get_image_token_id(tokenizer, image_token)
        self.image_token = str(image_token)
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
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        images (`ImageInput`, *optional*):
            One image, a list of all images of the batch in the order of their tokens, or one list per text. See
            [`AgeVlmImageProcessor`] for the accepted types.
        text (`str` or `list[str]`, *optional*):
            One text or a batch of texts, with one image token per image. Without text, only the images are processed.

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
        return super().__call__(images=images, text=text, **kwargs)

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


__all__ = ["DEFAULT_CHAT_TEMPLATE", "AgeVlmProcessor", "add_image_support"]
