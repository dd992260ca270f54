# SPDX-License-Identifier: Apache-2.0
"""From a Llama and a vision backbone to one saved AGE-VLM checkpoint with its processor."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel
from transformers.utils import logging

from .files import new_folder, resolve_package_file
from .hub import check_chat_template, load_pretrained, loading
from .modeling_agevlm.configuration_agevlm import AgeVlmConfig
from .modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, remove_pooling_head
from .parts import PART_NAMES, describe_parts, is_hub_id, locate_part
from .processing.image_processing_agevlm import AgeVlmImageProcessor
from .processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE, AgeVlmProcessor
from .provenance import describe, write_provenance

logger = logging.get_logger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Types of an assembled model; `auto` is that of the parts."""

MAX_IMAGE_SIZE = 4096
"""The longest side of images, in pixels: 16,384 visual tokens of a tower that makes a token of 32x32 pixels."""

# Tokens that tokenizers keep for images or for nothing in particular, best first.
IMAGE_TOKENS = ("<|image|>", "<image>", "<|reserved_special_token_0|>")


def load_timm(
    architecture: str, weights: str | os.PathLike | None = None, *, by_order: bool = False, **model_args: Any
) -> TimmWrapperModel:
    """A timm backbone in Transformers' wrapper, with weights from a local file.

    Args:
        architecture: a timm name, with or without its `timm/` prefix.
        weights: a `.safetensors` or PyTorch file (read with `weights_only=True`) of the whole timm model, with or without
            its classifier; `package:MODULE/FILE` is a file inside an installed package. None for random weights.
        by_order: the PyTorch file has the same tensors as the timm model in the same order, under other names.
        model_args: for `timm.create_model`, and kept in the configuration: `features_only=True, out_indices=[3]` gives
            a feature map of an earlier stage.

    Raises:
        ValueError: for an unknown architecture, or a file that does not hold its weights.
        FileNotFoundError: if the file is missing.
        ModuleNotFoundError: if the file's package is not installed.
    """
    architecture = architecture.removeprefix("timm/")
    if not timm.is_model(architecture.split(".")[0]):
        close = timm.list_models(f"*{architecture.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model '{architecture}'" + (f"; it has {', '.join(close)}." if close else "."))
    config = TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args or None)
    if weights is None:
        return TimmWrapperModel(config).eval()
    place = locate_part(os.fspath(weights), by_order=by_order)
    config._name_or_path = os.fspath(weights)
    weights = Path(resolve_package_file(weights))
    if not weights.is_file():
        raise FileNotFoundError(f"There is no weight file {weights}.")
    if by_order and weights.suffix == ".safetensors":
        raise ValueError(
            f"{weights}: the tensors of a .safetensors file have no order of their own, so names must match."
        )
    # Names and shapes are all that is needed of these two until the weights come: they cost no memory.
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        whole, model = timm.create_model(architecture), TimmWrapperModel(config)
    try:
        state_dict = timm.models.load_state_dict(str(weights), weights_only=True)
        state_dict = _match_timm_names(state_dict, whole, by_order)
    except Exception as error:  # readers raise errors of many types for damaged files
        raise ValueError(f"{weights} does not hold the weights of timm's '{architecture}': {error}") from error
    # timm's own way of loading, which knows that features-only models name their parts otherwise.
    model.timm_model = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}, num_classes=0, **model_args
    )
    model.place = place
    return model.eval()


def _match_timm_names(state_dict: Mapping[str, torch.Tensor], whole: Any, by_order: bool) -> dict[str, torch.Tensor]:
    """Checks a file's tensors against a whole timm model, and returns them under the model's names.

    Raises:
        ValueError: if tensors are missing (other than those of the classifier), unknown or of other shapes.
    """
    expected = whole.state_dict()
    classifiers = whole.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    # No visual token goes through these: timm names a model's classifier, and puts what surrounds it in `head`.
    unused = ("head.", *(f"{name}." for name in classifiers))
    needed = [name for name in expected if not name.startswith(unused)]
    if by_order:
        names = needed if len(state_dict) == len(needed) else list(expected)
        if len(state_dict) != len(names):
            raise ValueError(f"it has {len(state_dict)} tensors, and the model {len(names)}")
        state_dict = dict(zip(names, state_dict.values(), strict=True))
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(
            f"it lacks {len(missing)} tensor(s): {', '.join(missing[:5])}. If it has the same tensors in the same order under "
            "other names, pass `by_order=True` (on the command line --vision-weights-by-order)"
        )
    if unknown := sorted(state_dict.keys() - expected.keys()):
        raise ValueError(f"it has {len(unknown)} tensor(s) that the model does not have: {', '.join(unknown[:5])}")
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, and not {tuple(expected[name].shape)}")
    return dict(state_dict)


def _check_llama(config: PreTrainedConfig) -> None:
    if config.model_type != "llama":
        raise ValueError(
            f"The text model is a '{config.model_type}', but AGE-VLM puts its blocks before Llama layers. Use a "
            "checkpoint of the Llama architecture (model_type 'llama'), such as Llama-3.2-1B or SmolLM2."
        )


def _split_gguf(path: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes in place of a path: the folder and `gguf_file` of a `.gguf` file; others unchanged.

    Raises:
        FileNotFoundError: if there is no such `.gguf` file.
    """
    if not path.endswith(".gguf"):
        return path, {}
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}.")
    folder, name = os.path.split(path)
    return folder or os.curdir, {"gguf_file": name}


def load_llama(name: str, dtype: torch.dtype | str = "auto", revision: str | None = None) -> PreTrainedModel:
    """The text model of an AGE-VLM, by its name as [`from_parts`] takes it.

    Raises:
        ValueError: if it is not a Llama, or a file is damaged.
        OSError: if files are missing.
    """
    path, kwargs = _split_gguf(resolve_package_file(name))
    if revision is not None:
        kwargs["revision"] = revision
    # Before the weights: a wrong architecture should not cost a download of them.
    with loading(path, revision) as place:
        config = AutoConfig.from_pretrained(place, **kwargs)
    _check_llama(config)
    if "gguf_file" in kwargs:
        # By default Transformers keeps GGUF weights packed, in float32 kernels that are slow to train through.
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    return load_pretrained(AutoModelForCausalLM, path, dtype=dtype, **kwargs)


def load_vision(name: str, dtype: torch.dtype | str = "auto", revision: str | None = None) -> PreTrainedModel:
    """The vision model of an AGE-VLM, by its name as [`from_parts`] takes it, without its pooling head.

    Raises:
        ValueError: if a file is damaged.
        OSError: if files are missing.
    """
    kwargs = {} if revision is None else {"revision": revision}
    return load_pretrained(AutoModel, name, prepare=remove_pooling_head, dtype=dtype, **kwargs)


def from_parts(
    text_model: str | PreTrainedModel,
    vision_model: str | PreTrainedModel,
    *,
    dtype: torch.dtype | str = "auto",
    **config_kwargs: Any,
) -> AgeVlmForConditionalGeneration:
    """Assembles an AGE-VLM from a Llama and a vision backbone, with fresh adapter and cross-attention.

    The model takes over the parts' weights; it does not copy them. It leaves out the vision backbone's pooling head, which
    no visual token goes through. Its gates are zero, so it gives exactly the
    Llama's logits, for text and for images.

    Args:
        text_model: a Llama-architecture causal LM, or its path or Hub id; a file that ends in `.gguf` is dequantized, and
            may be inside an installed package (`package:MODULE/FILE`).
        vision_model: a timm wrapper, ConvNext, ConvNextV2 or DINOv3-ConvNeXt model, or its path or Hub id.
        dtype: of the parts that are loaded here; the fresh modules take the text model's.
        config_kwargs: fields of [`AgeVlmConfig`] (`image_token_id`, `visual_position_embedding`, ...), and
            `cross_attention_layers` and `cross_attention_sink` of [`AgeVlmTextConfig`].

    Raises:
        ValueError: if the text model is not a Llama, or a field of the configuration is invalid.
        OSError: if a part's files are missing.
    """
    # `load_timm` knows the place of a model's weights, and Transformers the name of its own.
    names = [part if isinstance(part, str) else part.name_or_path for part in (text_model, vision_model)]
    if isinstance(text_model, str):
        text_model = load_llama(text_model, dtype)
    _check_llama(text_model.config)
    if isinstance(vision_model, str):
        vision_model = load_vision(vision_model, dtype)
    places = [
        getattr(part, "place", None) or locate_part(name)
        for part, name in zip((text_model, vision_model), names, strict=True)
    ]

    text_config = {k: v for k, v in text_model.config.to_dict().items() if k not in ("model_type", "architectures")}
    for name in ("cross_attention_layers", "cross_attention_sink"):
        if name in config_kwargs:
            text_config[name] = config_kwargs.pop(name)
    try:
        config = AgeVlmConfig(
            text_config=text_config,
            vision_config=vision_model.config,
            tie_word_embeddings=text_model.config.tie_word_embeddings,
            **config_kwargs,
        )
    except StrictDataclassError as error:  # the reason is the error that it wraps
        raise ValueError(str(error.__cause__ or error)) from error
    config.dtype = text_model.dtype
    for part in (config.text_config, config.vision_config):
        if not is_hub_id(part._name_or_path):
            part._name_or_path = ""  # it would be published with the model
    with torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_init_weights():
        model = AgeVlmForConditionalGeneration(config)

    language_model = model.model.language_model
    loaded = language_model.load_state_dict(text_model.model.state_dict(), strict=False, assign=True)
    unloaded = [key for key in loaded.missing_keys if "cross_attn." not in key] + loaded.unexpected_keys
    if unloaded:
        raise ValueError(f"The text model does not match its own Llama configuration at {unloaded}.")
    language_model.rotary_emb = text_model.model.rotary_emb  # its buffers are in no state dict
    remove_pooling_head(vision_model)
    model.model.vision_tower = vision_model
    model.lm_head.weight = text_model.lm_head.weight
    for fresh in fresh_modules(model).values():
        fresh.to_empty(device=text_model.device).to(text_model.dtype)
        for module in fresh.modules():
            model._init_weights(module)
    model.tie_weights()
    config.parts = describe_parts(model, dict(zip(PART_NAMES, places, strict=True)))
    model.generation_config = copy.deepcopy(text_model.generation_config)
    model.generation_config.suppress_tokens = [
        *(text_model.generation_config.suppress_tokens or []),
        config.image_token_id,
    ]
    return model.eval()


def fresh_modules(model: AgeVlmForConditionalGeneration) -> dict[str, nn.Module]:
    """What neither part brings, by name: the adapter and the gated blocks."""
    blocks = model.model.language_model.cross_attn
    return {
        "model.multi_modal_projector": model.model.multi_modal_projector,
        **{f"model.language_model.cross_attn.{layer}": block for layer, block in blocks.items()},
    }


def find_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str | None = None) -> str:
    """The token that stands for an image: `image_token`, else one that the tokenizer reserves.

    Raises:
        ValueError: if it is no added token of the tokenizer or has another role in texts, listing those that are free.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    own = getattr(tokenizer, "image_token", None)
    roles = {str(token): role for role, token in tokenizer.special_tokens_map.items() if role != "image_token"}
    for token in [image_token] if image_token else [own, *IMAGE_TOKENS]:
        if token in added and token not in roles:
            return token
    free = sorted(added - roles.keys())
    wanted = "none of them is known to be for images"
    if image_token:
        wanted = f"'{image_token}' is " + (f"its {roles[image_token]}" if image_token in roles else "not one of them")
    raise ValueError(
        f"One of the tokenizer's special tokens must stand for an image, and {wanted}. Name one that texts never use "
        f"with `image_token` (on the command line --image-token): {', '.join(free) or 'this tokenizer has none to spare'}."
    )


def _image_statistics(vision_model: str | PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the vision model was trained with; CLIP's where unknown."""
    if isinstance(vision_model, str):
        with loading(vision_model) as place:
            config = AutoConfig.from_pretrained(place)
    else:
        config = vision_model.config
    if (pretrained_cfg := getattr(config, "pretrained_cfg", None)) and "mean" in pretrained_cfg:
        return pretrained_cfg["mean"], pretrained_cfg["std"]
    if isinstance(vision_model, str):
        try:
            processor = AutoImageProcessor.from_pretrained(vision_model)
            return processor.image_mean, processor.image_std
        except (OSError, ValueError, AttributeError):
            logger.warning(f"{vision_model} has no image processor: its images are normalized as CLIP's.")
    return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def _check_chat_template(processor: AgeVlmProcessor) -> None:
    """Refuses a template that fails, or loses a text or an image, before it is saved."""
    rendered = check_chat_template(processor, "the new model")
    if rendered.count(processor.image_token) != 1 or "What is this?" not in rendered:
        raise ValueError(
            "The chat template loses a message's text or image. Use a template for texts, which writes "
            f"message['content'] as a string; it made '{rendered}' of an image and the question 'What is this?'."
        )


def _check_image_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """
    Raises:
        ValueError: if they are not three numbers each, for colors from 0 to 1.
    """
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(values) != 3 or len(numbers) != 3:
            raise ValueError(f"{name} must be three finite numbers, one a color channel, got {list(values)}.")
    if min(mean) < 0 or max(mean) > 1:
        raise ValueError(f"image_mean must be from 0 to 1, as colors are, got {list(mean)}.")
    if min(std) < 0.001 or max(std) > 1:
        raise ValueError(f"image_std must be from 0.001 to 1, as colors are from 0 to 1, got {list(std)}.")


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: AgeVlmForConditionalGeneration) -> None:
    """
    Raises:
        ValueError: if texts or their padding have tokens beyond the embedding; an added token that no text uses may be there.
    """
    used = (tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) | {
        token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token is not None
    }
    rows = model.get_input_embeddings().num_embeddings
    if beyond := sorted(token for token in used if tokenizer.convert_tokens_to_ids(token) >= rows):
        raise ValueError(
            f"The tokenizer has {len(beyond)} token(s) beyond the {rows} of the text model's embedding, such as '{beyond[0]}': "
            "it is of another model. Choose a text model with its own tokenizer."
        )


@torch.no_grad()
def _check_vision(model: AgeVlmForConditionalGeneration, image_size: int) -> None:
    """Runs one blank image through the vision model, so that one that gives no visual tokens is refused before it is saved."""
    blank = torch.zeros(1, 3, image_size, image_size, device=model.device)
    try:
        features = model.get_image_features(pixel_values=blank, return_dict=True)
    except Exception as error:  # vision models raise errors of many types
        raise ValueError(
            f"The vision model (a '{model.config.vision_config.model_type}') gives no grid of visual tokens for an image of "
            f"{image_size}x{image_size} pixels: {error} Choose another image_size, or another vision backbone."
        ) from error
    if features.pooler_output.shape[1] < 2:
        raise ValueError(
            f"image_size {image_size} is too small for this vision model: an image has a single visual token then, and no place to "
            "look at. Choose a greater one."
        )


def build_checkpoint(
    text_model: str,
    vision_model: str | PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    image_token: str | None = None,
    image_size: int = 768,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | str = "auto",
    **config_kwargs: Any,
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Assembles an AGE-VLM with its processor and saves both in one folder that every Auto class loads.

    Args:
        text_model: path or Hub id of a Llama-architecture checkpoint, or path of a `.gguf` file, which may be inside an
            installed package (`package:MODULE/FILE`).
        vision_model: path or Hub id of a vision backbone, or the model itself ([`load_timm`]).
        output_dir: a folder that does not exist yet, or is empty; it appears complete or not at all.
        image_token: the special token that stands for an image; see [`find_image_token`].
        image_size: side in pixels of the square that images are fitted into: at least two visual tokens, at most
            `MAX_IMAGE_SIZE`.
        image_mean, image_std: by channel, of colors from 0 to 1; the vision model's own by default, else CLIP's.
        chat_template: a Jinja template for texts, which gets image support
            ([`~agevlm.processing.processing_agevlm.add_image_support`]); by default the
            tokenizer's own.
        dtype: of the parts loaded here.
        config_kwargs: as for [`from_parts`].

    Raises:
        FileExistsError: if `output_dir` holds something already.
        ValueError: if the text model is not a Llama, no token can stand for an image, the chat template, `image_mean`,
            `image_std` or `image_size` is invalid, or the vision model gives no grid of tokens for an image of that size.
        OSError: if a part's files are missing.
    """
    _check_image_statistics(
        OPENAI_CLIP_MEAN if image_mean is None else image_mean, OPENAI_CLIP_STD if image_std is None else image_std
    )
    if not isinstance(image_size, int) or not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size must be a whole number of pixels from 1 to {MAX_IMAGE_SIZE}, got {image_size}.")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    with new_folder(output_dir) as partial:  # first, so that nothing is loaded in vain
        tokenizer_path, gguf = _split_gguf(resolve_package_file(text_model))
        # Padding on the left, because generation continues from the right end. As an argument, because that is saved also
        # where the tokenizer's own files do not name a side.
        with loading(tokenizer_path) as place:
            tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", **gguf)
        image_token = find_image_token(tokenizer, image_token)
        mean, std = _image_statistics(vision_model)
        mean, std = mean if image_mean is None else image_mean, std if image_std is None else image_std
        _check_image_statistics(mean, std)
        image_processor = AgeVlmImageProcessor(
            size={"height": image_size, "width": image_size}, image_mean=mean, image_std=std
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        processor = AgeVlmProcessor(image_processor, tokenizer, image_token=image_token)
        _check_chat_template(processor)

        model = from_parts(
            text_model, vision_model, dtype=dtype, image_token_id=processor.image_token_id, **config_kwargs
        )
        _check_vocabulary(tokenizer, model)
        _check_vision(model, image_size)
        if damaged := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
            raise ValueError(f"{damaged[0]} has values that are not finite: the part that it comes from is damaged.")
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        parts = {"text": _describe_part(text_model), "vision": _describe_part(vision_model)}
        write_provenance(partial, {"parts": parts, "untrained": True, "stages": []})
    return model, processor


def _describe_part(part: str | PreTrainedModel) -> dict[str, Any]:
    """What cards say of a part ([`describe`]), and of a timm model its architecture."""
    if isinstance(part, str):
        return describe(part)
    place = part.name_or_path
    found = describe(place) if place else {"name": type(part).__name__}
    if "id" not in found and (architecture := getattr(part.config, "architecture", None)) is not None:
        found["name"] = f"timm's {architecture}" + (f", weights {found['name']}" if place else "")
    return found
