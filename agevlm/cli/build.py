# SPDX-License-Identifier: Apache-2.0
"""`agevlm build`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import parse_json, parse_numbers


def build(
    text: Annotated[str, typer.Option(help="Llama-architecture checkpoint: folder, Hub id, or .gguf file.")],
    vision: Annotated[
        str, typer.Option(help="Vision backbone: folder or Hub id, or with --vision-weights a timm name.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist yet.")],
    vision_weights: Annotated[
        Path | None, typer.Option(help="Weight file of the timm model named by --vision.")
    ] = None,
    vision_args: Annotated[
        str | None,
        typer.Option(help='JSON for timm.create_model, as \'{"features_only": true, "out_indices": [3]}\'.'),
    ] = None,
    image_token: Annotated[
        str | None, typer.Option(help="Special token of the tokenizer that stands for an image.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side in pixels of the square that images are fitted into.")] = 768,
    image_mean: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    image_std: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    cross_attention_layers: Annotated[
        str | None, typer.Option(help="Merged indices of the blocks, as 2,7,12,17; four spread evenly by default.")
    ] = None,
    visual_position_embedding: Annotated[
        bool, typer.Option(help="Add a fixed 2-D position signal to the visual tokens.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Assemble an AGE-VLM from a Llama and a vision backbone, and save it with its processor."""
    numbers = {
        "image_mean": parse_numbers(image_mean, "--image-mean", float),
        "image_std": parse_numbers(image_std, "--image-std", float),
    }
    layers = parse_numbers(cross_attention_layers, "--cross-attention-layers", int)
    timm_args = parse_json(vision_args, "--vision-args")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got '{dtype}'.")

    from ..build import build_checkpoint, load_timm

    vision_model: Any = vision
    if vision_weights is not None:
        vision_model = load_timm(vision, vision_weights, **timm_args)
        if dtype != "auto":
            import torch

            vision_model.to(getattr(torch, dtype))
    elif timm_args:
        raise ValueError("--vision-args goes with --vision-weights: other backbones bring their own configuration.")
    model, processor = build_checkpoint(
        text,
        vision_model,
        out,
        image_token=image_token,
        image_size=image_size,
        dtype=dtype,
        visual_position_embedding=visual_position_embedding,
        **({} if layers is None else {"cross_attention_layers": layers}),
        **numbers,
    )
    config = model.config.text_config
    added = sum(
        p.numel()
        for layer in model.model.language_model.layers
        if layer.cross_attn
        for p in layer.cross_attn.parameters()
    )
    Console().print(
        f"[green]Saved[/green] {out}: {config.num_hidden_layers} Llama layers, cross-attention before layers "
        f"{', '.join(map(str, config.cross_attention_llama_layers))} ({added / 1e6:.1f} M parameters), "
        f"image token {processor.image_token}."
    )
