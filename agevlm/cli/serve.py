# SPDX-License-Identifier: Apache-2.0
"""`agevlm serve` and `agevlm chat`: a model that stays loaded."""

from typing import Annotated

import typer

from ..terminal import say


def serve(
    model: Annotated[str, typer.Argument(help="Model to serve: folder or Hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.", min=0, max=65535)] = 8000,
    max_batch_size: Annotated[int, typer.Option(help="Most conversations that are answered together.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for the GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto as it was saved.")] = "auto",
) -> None:
    """Serve a model over HTTP as OpenAI does, with heat maps and grounded answers."""
    from ..serving.server import serve as run

    run(
        model,
        host=host,
        port=port,
        max_batch_size=max_batch_size,
        device=device,
        dtype=dtype,
        announce=say,
    )


def chat(
    model: Annotated[str, typer.Argument(help="Model to talk with: folder or Hub id.")],
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL to talk about; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for the GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto as it was saved.")] = "auto",
) -> None:
    """Talk with a model about images in the terminal."""
    from ..inference.generation import load_model, open_image
    from ..serving.chat import HELP
    from ..serving.chat import chat as run

    images = [open_image(source) for source in image or ()]
    vlm, processor = load_model(model, device, dtype)
    say(HELP)
    run(
        vlm,
        processor,
        read_line=lambda: input("> "),
        write=lambda text: print(text, end="", flush=True),
        images=images,
        max_new_tokens=max_new_tokens,
    )
