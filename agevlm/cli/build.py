# SPDX-License-Identifier: Apache-2.0
"""`agevlm build`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import say_saved
from .options import parse_json, parse_numbers


def build(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist yet.")],
    text: Annotated[
        str | None,
        typer.Option(help="Llama-architecture checkpoint: folder, Hub id, .gguf file, or package:MODULE/FILE.gguf."),
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision backbone: folder or Hub id, or with --vision-weights a timm name.")
    ] = None,
    delta: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a delta, to make a whole checkpoint of; --text and --vision name the parts that it "
            "does not find itself, a timm model by its weight file."
        ),
    ] = None,
    vision_weights: Annotated[
        str | None, typer.Option(help="Weight file of the timm model named by --vision, or package:MODULE/FILE.")
    ] = None,
    vision_weights_by_order: Annotated[
        bool, typer.Option(help="The weight file has the timm model's tensors in the same order under other names.")
    ] = False,
    vision_args: Annotated[
        str | None,
        typer.Option(help='JSON for timm.create_model, as \'{"features_only": true, "out_indices": [3]}\'.'),
    ] = None,
    image_token: Annotated[
        str | None, typer.Option(help="Special token of the tokenizer that represents an image.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(help="Side in pixels of the square that images are fitted into, at most 4096.")
    ] = 768,
    image_mean: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    image_std: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, or package:MODULE/FILE; the tokenizer's own template by default.")
    ] = None,
    cross_attention_layers: Annotated[
        str | None, typer.Option(help="Merged indices of the blocks, as 2,7,12,17; four spread evenly by default.")
    ] = None,
    visual_position_embedding: Annotated[
        bool, typer.Option(help="Add a fixed 2-D position signal to the visual tokens.")
    ] = False,
    cross_attention_sink: Annotated[
        bool, typer.Option(help="Give each block a learned key with value zero, where attention can go.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the adapter's and the cross-attention's untrained weights.")] = 0,
) -> None:
    """Assemble an AGE-VLM from a Llama and a vision backbone, or from a delta and its parts, and save it with its processor."""
    numbers = {
        "image_mean": parse_numbers(image_mean, "--image-mean", float),
        "image_std": parse_numbers(image_std, "--image-std", float),
    }
    layers = parse_numbers(cross_attention_layers, "--cross-attention-layers", int)
    timm_args = parse_json(vision_args, "--vision-args")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got '{dtype}'.")

    if delta is not None:
        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
        if others := [name for name in given if name not in ("delta", "text", "vision", "out", "dtype")]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ValueError(f"{options} goes with an assembly of parts: a delta has its own settings.")
        from ..deltas import write_whole
        from ..hub_cards.model import write_model_card

        write_whole(delta, out, text, vision, dtype=dtype)
        write_model_card(out)
        say_saved(out, f"The parts and what {delta} has trained.")
        return
    if text is None or vision is None:
        raise ValueError("Name the parts with --text and --vision, or a delta with --delta.")

    import torch

    from ..build import build_checkpoint, fresh_modules, load_timm
    from ..files import resolve_package_file
    from ..hub_cards.model import write_model_card

    vision_model: Any = vision
    if vision_weights is not None:
        vision_model = load_timm(vision, vision_weights, by_order=vision_weights_by_order, **timm_args)
        if dtype != "auto":
            vision_model.to(getattr(torch, dtype))
    elif timm_args or vision_weights_by_order:
        raise ValueError(
            "--vision-args and --vision-weights-by-order go with --vision-weights: other backbones bring their own configuration."
        )
    torch.manual_seed(seed)
    model, processor = build_checkpoint(
        text,
        vision_model,
        out,
        image_token=image_token,
        image_size=image_size,
        chat_template=None if chat_template is None else Path(resolve_package_file(chat_template)).read_text("utf-8"),
        dtype=dtype,
        visual_position_embedding=visual_position_embedding,
        cross_attention_sink=cross_attention_sink,
        **({} if layers is None else {"cross_attention_layers": layers}),
        **numbers,
    )
    write_model_card(out)
    config = model.config.text_config
    fresh = sum(p.numel() for module in fresh_modules(model).values() for p in module.parameters())
    say_saved(
        out,
        f"{config.num_hidden_layers} Llama layers, cross-attention before layers "
        f"{', '.join(map(str, config.cross_attention_llama_layers))} ({fresh / 1e6:.1f} M parameters with the adapter), "
        f"image token {processor.image_token}.",
    )
