# SPDX-License-Identifier: Apache-2.0
"""Prompts in, texts out: loading of models, rendering of questions, batches, and generation.

The model is any decoder-only image-text-to-text model of Transformers whose processor has a chat template: an AGE-VLM, a
LLaVA. It is always asked through its own processor.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from ..attention.phrases import adds_special_tokens, encode_with_offsets
from ..deltas import load_checkpoint
from ..hub import load_processor
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from ..processing.image_processing_agevlm import load_image, to_rgb
from ..processing.processing_agevlm import AgeVlmProcessor

# Greedy decoding, whatever the checkpoint's own generation settings are.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
# Transformers would hide the outputs of diverged models.
KEEP_INVALID = {"remove_invalid_values": False}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_image(source: str | os.PathLike) -> Image.Image:
    """The image of a file, a URL or a base64 string: upright, RGB.

    Raises:
        ValueError: if it cannot be read.
    """
    return to_rgb(load_image(source))


def render_question(processor: ProcessorMixin, text: str) -> str:
    """The prompt that asks `text` about one image, as the processor's chat template writes it."""
    return render_chat(processor, ask_about(text), add_generation_prompt=True)


def ask_about(text: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    """A conversation of one question about one image, for a chat template; with the image itself if it is given."""
    part = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def render_chat(processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    """A conversation as the processor's chat template writes it. An AGE-VLM reads special tokens in its messages as text."""
    if isinstance(processor, AgeVlmProcessor):
        kwargs["sanitize_control_tokens"] = processor.sanitize_chats
    return processor.apply_chat_template(list(messages), tokenize=False, **kwargs)


def load_model(
    name: str | os.PathLike, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an image-text-to-text model and its processor.

    Args:
        name: folder or Hub id.
        device: `cpu`, `cuda` or `auto`, the GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16` or `auto`, as it was saved.

    Raises:
        ValueError: for another device or dtype, a GPU that is not there, a model of another kind, or a processor that
            has no chat template.
        OSError: if there is no such model.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"the device must be auto, cpu or cuda, got '{device}'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use for the device cuda; choose cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    processor = load_processor(name)
    check_processor(processor, str(name))
    model = load_checkpoint(AutoModelForImageTextToText, name, dtype=dtype)
    return model.to(device).eval(), processor


def check_processor(processor: Any, name: str) -> None:
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{name} has no processor of images and text: it is not an image-text-to-text model")
    if processor.chat_template is None:
        raise ValueError(
            f"the processor of {name} has no chat template, which says how the model is asked: set "
            "processor.chat_template to the template of the model's training and save it, or choose a checkpoint that has one"
        )


# --- a batch ---


@dataclass(frozen=True)
class Batch:
    """Texts, each about one image, several or none, as a model reads them.

    `inputs` are the model's, on its device and padded on the left. `offsets` `(B, S, 2)` are the characters of each token in
    its prompt, where they were asked for; of an AGE-VLM always.
    """

    prompts: list[str]
    images: list[list[Image.Image]]
    inputs: BatchFeature
    offsets: torch.Tensor | None = None

    @property
    def features(self) -> AgeVlmImageFeatures:
        """The image features of an AGE-VLM, a row for each prompt."""
        return self.inputs["mm_encoder_outputs"]["image"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an AGE-VLM's visual tokens."""
        assert self.features.grid is not None
        return self.features.grid


class KnownImages(OrderedDict[bytes, AgeVlmImageFeatures]):
    """Features `(1, ...)` of the images that an AGE-VLM has read last, by the digest of their pixels.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int = 64):
        super().__init__()
        self.size = size

    def forget(self, used: Iterable[bytes]) -> None:
        """Keeps no more than `size`: those that were used just now, then those before them."""
        for key in used:
            self.move_to_end(key)
        while len(self) > self.size:
            self.popitem(last=False)


def read_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
    known: KnownImages | None = None,
    *,
    offsets: bool = False,
) -> Batch:
    """Makes inputs of rendered prompts, by the model's own processor.

    Several prompts about one image go through the vision tower of an AGE-VLM once.

    Args:
        prompts: as the chat template has rendered them, images included.
        images: the image or the images of each prompt; None if no prompt has one.
        known: images that an AGE-VLM need not read again; gets the new ones.
        offsets: also find the characters of the tokens; those of an AGE-VLM are found anyway.

    Raises:
        ValueError: if the model has no embedding of a token, or the characters of its tokens are not known.
    """
    prompts = list(prompts)
    settings: dict[str, Any] = {
        "padding": True,
        "padding_side": "left",
        "add_special_tokens": adds_special_tokens(processor, prompts[0]),
        "return_tensors": "pt",
    }
    if images is None:
        wanted = {"return_offsets_mapping": True} if offsets or isinstance(processor, AgeVlmProcessor) else {}
        inputs = processor(text=prompts, **settings, **wanted)
        _check_tokens(model, processor, inputs)
        return Batch(prompts, [[] for _ in prompts], inputs.to(model.device), inputs.pop("offset_mapping", None))
    nested = [[image] if isinstance(image, Image.Image) else list(image) for image in images]
    if not isinstance(model, AgeVlmForConditionalGeneration):
        if offsets:
            inputs = encode_with_offsets(processor, prompts, nested, **settings)
        else:
            inputs = processor(images=nested, text=prompts, **settings)
        found = inputs.pop("offset_mapping", None)
        return Batch(prompts, nested, inputs.to(model.device), found)
    inputs = processor(images=nested, text=prompts, return_offsets_mapping=True, **settings)
    _check_tokens(model, processor, inputs)
    characters = inputs.pop("offset_mapping")
    features = _features(model, inputs.pop("pixel_values"), inputs.pop("image_sizes", None), known)
    inputs = inputs.to(model.device)
    inputs["mm_encoder_outputs"] = {"image": features}
    return Batch(prompts, nested, inputs, characters)


def count_tokens(processor: ProcessorMixin, prompt: str, images: Sequence[Image.Image]) -> int:
    """How many tokens a model reads for a rendered prompt and its images."""
    if isinstance(processor, AgeVlmProcessor):  # one for each image, whatever is in it
        return len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    special = adds_special_tokens(processor, prompt)
    inputs = processor(images=[list(images)] if images else None, text=[prompt], add_special_tokens=special)
    return len(inputs["input_ids"][0])


def _check_tokens(model: PreTrainedModel, processor: ProcessorMixin, inputs: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: if an AGE-VLM has no embedding of a token. Other models may replace such tokens.
    """
    if not isinstance(model, AgeVlmForConditionalGeneration):
        return
    embedding: Any = model.get_input_embeddings()
    rows, most = embedding.num_embeddings, int(inputs["input_ids"].max())
    if most >= rows:
        raise ValueError(
            f"the tokenizer writes {processor.tokenizer.convert_ids_to_tokens(most)!r}, which the model's embedding of {rows} "
            "tokens lacks: correct the special tokens in tokenizer_config.json, or take the tokenizer of the model"
        )


@torch.no_grad()
def _features(
    model: AgeVlmForConditionalGeneration,
    pixels: torch.Tensor,
    sizes: torch.Tensor | None,
    known: KnownImages | None = None,
) -> AgeVlmImageFeatures:
    """Features `(N, ...)` of `(N, 3, H, W)` pixels and their sizes without padding. Each different image is computed once, and
    those in `known` are not."""
    known = KnownImages(0) if known is None else known
    parts = [pixels] if sizes is None else [pixels, sizes]
    keys = [
        hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in image)).digest()
        for image in zip(*parts, strict=True)
    ]
    new = {key: number for number, key in enumerate(keys) if key not in known}
    if new:
        different = [part[list(new.values())].to(model.device) for part in parts]
        # Channels last is several times faster for depthwise convolutions on CPUs.
        different[0] = different[0].contiguous(memory_format=torch.channels_last)
        found = model.get_image_features(*different)
        visible = found.visual_attention_mask
        for row, key in enumerate(new):
            known[key] = AgeVlmImageFeatures(
                last_hidden_state=found.last_hidden_state[row].clone()[None],  # a view would keep the whole batch
                pooler_output=found.pooler_output[row].clone()[None],
                visual_attention_mask=None if visible is None else visible[row][None],
                grid=found.grid,
            )
    rows = [known[key] for key in keys]
    known.forget(keys)
    masks: list[Any] = [row.visual_attention_mask for row in rows]
    return AgeVlmImageFeatures(
        last_hidden_state=torch.cat([row.last_hidden_state for row in rows]),
        pooler_output=torch.cat([row.pooler_output for row in rows]),
        visual_attention_mask=None if masks[0] is None else torch.cat(masks),
        grid=rows[0].grid,
    )


class FiniteLogits(LogitsProcessor):
    """Remembers which rows of a generation had only finite logits, as bool `(rows,)` in `rows`. It changes none.

    The flag stays on the model's device, so that no step waits for the GPU. Logits that another processor has set to minus
    infinity do not count.
    """

    rows: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite = scores.amax(-1).isfinite()  # NaN is the largest
        self.rows = finite if self.rows is None else self.rows & finite
        return scores


def check_finite(model: PreTrainedModel, finite: torch.Tensor | None, asked: Sequence[str]) -> None:
    """
    Args:
        finite: bool `(len(asked), ...)`, whether the model's outputs for each are finite numbers.
        asked: what was asked, for the message.

    Raises:
        ValueError: if some are not; names the model, what was asked, and the first damaged weight if there is one.
    """
    if finite is None or finite.all():
        return
    place = asked[int((~finite.reshape(len(asked), -1).all(-1)).nonzero()[0])]
    name = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if name is None:
        reason = (
            f"Its weights are finite, and too large for {model.dtype}: choose a wider dtype or another checkpoint."
        )
    else:
        reason = f"Its weights have diverged, {name} is not finite: choose an earlier checkpoint."
    raise ValueError(
        f"{model.name_or_path or type(model).__name__} computes numbers that are not finite (NaN or infinity) for {place}, "
        f"so nothing that it says can be scored or shown. {reason}"
    )
