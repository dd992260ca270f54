# SPDX-License-Identifier: Apache-2.0
"""`agevlm export`."""

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import say_saved


def export(
    model: Annotated[str, typer.Argument(help="AGE-VLM checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the graphs; must not exist yet.")],
    format: Annotated[str, typer.Option(help="onnx, or torch for programs of torch.export.")] = "onnx",
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or auto, as the checkpoint was saved.")
    ] = "float32",
    maps: Annotated[
        bool, typer.Option(help="The decoder also takes phrases and returns their attention maps.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; the newest that the exporter knows by default.")] = None,
) -> None:
    """Write a model as graphs for ONNX Runtime or PyTorch, which run without Transformers."""
    from ..files import check_new_folder
    from ..inference.export import check_format, export_model
    from ..inference.generation import load_model

    check_new_folder(out)
    check_format(format, opset)
    vlm, processor = load_model(model, device="cpu", dtype=dtype)
    export_model(vlm, processor, out, format, maps=maps, opset=opset)
    say_saved(out, f"image encoder and decoder for {format}, with graphs.json, which says how they are called.")
