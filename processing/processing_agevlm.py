# SPDX-License-Identifier: Apache-2.0
"""Processor of AGE-VLM: images and text to model inputs, chat templates with images, phrases to token masks."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput

from .image_processing_agevlm import flatten_images

# A language model's template expects strings for contents. This prologue makes them of lists of parts and leaves
# everything else of the messages alone. Its last newline is removed by Jinja's `trim_blocks` (on in Transformers) and
# leaves the language model's template at the beginning of a line, where `lstrip_blocks` works as it did without it.
_FLATTEN_CONTENTS = """\
{#- Contents that are lists of text and image parts become strings; the language model's own template follows. -#}
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
"""Text-only chat template for language models that have none; [`add_image_support`] adds the images."""


def add_image_support(chat_template: str, image_token: str) -> str:
    """Makes a text-only chat template accept message contents that are lists of text and image parts.

    Texts are joined as they are and every image part becomes one `image_token`; the language model's template then runs
    unchanged on string contents, so that text-only conversations render as before. Applying it twice changes nothing.

    It is meant for templates of language models: one that only works on lists of parts would no longer get any.
    """
    prologue = _FLATTEN_CONTENTS.replace("IMAGE_TOKEN", repr(image_token))
    return chat_template if chat_template.startswith(prologue) else prologue + chat_template


class AgeVlmProcessor(ProcessorMixin):
    """Combines an image processor and a language model's tokenizer.

    One image token per image stands in the text and is never expanded: the language model sees images through
    cross-attention, not as tokens.

    Args:
        image_processor ([`AgeVlmImageProcessor`]):
            Image processor.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the language model; a fast one, where offsets are asked for.
        image_token (`str`, *optional*, defaults to `tokenizer.image_token`):
            An existing special token of the tokenizer, so that no embedding has to be added; a reserved one of
            Llama 3.2's, say.
        chat_template (`str`, *optional*):
            Jinja template of conversations. By default the tokenizer's, if it has one, with [`add_image_support`].

    Raises:
        ValueError: if `image_token` is not an added token of the tokenizer, or has another role already.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        image_token: str | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        image_token = getattr(tokenizer, "image_token", None) if image_token is None else image_token
        self.image_token_id = _get_image_token_id(tokenizer, image_token)
        self.image_token = str(image_token)
        if chat_template is None:
            template = tokenizer.chat_template
            named = template if isinstance(template, dict) else {"default": template} if template else {}
            supported = {name: add_image_support(text, self.image_token) for name, text in named.items()}
            self.chat_template = supported if isinstance(template, dict) else supported.get("default")

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prepares model inputs.

        Args:
            images:
                One image, a list with all images of the batch in the order of their tokens, or one list per text. See
                [`AgeVlmImageProcessor`] for what counts as an image. May be left out.
            text (`str` or `list[str]`, *optional*):
                One text or a batch, with one image token per image. Without it, only the images are processed.
            kwargs:
                Options of the tokenizer and the image processor, flat or as `text_kwargs` and `images_kwargs`;
                `return_offsets_mapping=True` adds what [`~AgeVlmProcessor.get_map_queries`] needs.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` `(batch, seq)` of the text; `pixel_values`
            `(num_images, 3, height, width)` of all images of the batch in order and, if images are padded,
            `pixel_attention_mask` `(num_images, height, width)`; on request `offset_mapping` `(batch, seq, 2)`.

        Raises:
            ValueError: if a text is empty, if image tokens and images do not match, or if truncation would remove an
                image token; and for invalid images.
        """
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):  # type: ignore[override]
        images, text, *_ = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        # A batch of texts only may come with an empty list of images per text.
        return (images if images is not None and flatten_images(images) else None), text, None, None

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:  # type: ignore[override]
        if images is None and text is None:
            raise ValueError("Pass `text`, `images` or both.")
        if text is None:
            return
        if not text:
            raise ValueError("`text` is an empty list: pass at least one string.")
        for index, sample in enumerate(text):
            if not isinstance(sample, str):
                raise ValueError(f"`text` must be a string or a list of strings, got {type(sample)} at {index}.")
            if not sample:
                raise ValueError(f"Text {index} of {len(text)} is empty: leave it out or write something into it.")

        num_tokens = [sample.count(self.image_token) for sample in text]
        rule = f"The number of {self.image_token} tokens in the prompts should be the same as the number of images"
        mend = f"Write one {self.image_token} per image."
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
                    raise ValueError(f"{rule}: text {index} has {tokens}, but comes with {found} images. {mend}")
        elif sum(num_tokens) != (found := len(flatten_images(images))):
            raise ValueError(
                f"{rule}: the texts have {num_tokens}, {sum(num_tokens)} in all, but there are {found} images. {mend}"
            )

    def _process_images(self, images: ImageInput, **kwargs) -> tuple[BatchFeature, list[str]]:
        features = self.image_processor(images, **kwargs)
        num_images = len(features["pixel_values"])
        return features, [self.replace_image_token(features, index) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands for an image in the text: its token, as it is."""
        return self.image_token

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs) -> MultiModalData:
        # Asked for by inference engines.
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

        A token belongs to a phrase if their characters overlap, so that a token which includes the space before a
        word (`" dog"`) belongs to a phrase that begins with the word. Special tokens with empty offsets belong to none.

        Args:
            offset_mapping (`(batch, seq, 2)`):
                Characters from and to of each token, as the processor returns it with `return_offsets_mapping=True`.
            spans:
                Per text, the phrases as `(start, end)` in characters of that text, the end excluded and without spaces
                at the ends.
            attention_mask (`(batch, seq)`, *optional*):
                Tokens it masks belong to no phrase.
            text (*optional*):
                The texts; if given, spans are checked to lie within.

        Returns:
            `torch.Tensor`: bool `(batch, max_phrases, seq)`. Rows are all False for phrases without any token, as
            truncation leaves them, and for texts that have less than the most phrases.

        Raises:
            ValueError: if a span is negative, reversed, empty or outside its text, or the numbers of texts differ.
        """
        offsets = torch.as_tensor(offset_mapping)
        if len(spans) != len(offsets) or (text is not None and len(text) != len(offsets)):
            raise ValueError(f"Expected spans and text for {len(offsets)} texts, as in `offset_mapping`.")
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

    @property
    def unused_input_names(self) -> list[str]:
        """Generic tokenizers return them, the model has no use for them."""
        return ["token_type_ids"]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary; the same before saving as after loading."""
        output = super().to_dict()
        if self._auto_class is not None:
            # Set by saving, dropped by loading.
            output["auto_map"] = {
                self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            }
        return output


def _get_image_token_id(tokenizer: PreTrainedTokenizerBase, image_token: str | None) -> int:
    mend = "Pass `image_token`: an existing special token of the tokenizer, such as a reserved one."
    if not image_token:
        raise ValueError(f"The tokenizer has no image token. {mend}")
    ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    if str(image_token) not in ids:
        raise ValueError(f"The image token {image_token!r} is not an added token of the tokenizer. {mend}")
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    if role := next((role for role in roles if getattr(tokenizer, role, None) == str(image_token)), None):
        raise ValueError(f"The image token {image_token!r} is the tokenizer's {role} already. {mend}")
    return ids[str(image_token)]


# Saved processors carry this file, for use where `agevlm` is not installed.
AgeVlmProcessor.register_for_auto_class()


__all__ = ["DEFAULT_CHAT_TEMPLATE", "AgeVlmProcessor", "add_image_support"]
