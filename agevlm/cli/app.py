# SPDX-License-Identifier: Apache-2.0
"""`agevlm app`: a model in the browser."""

from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from ..terminal import say


def app(
    model: Annotated[str, typer.Argument(help="AGE-VLM checkpoint: folder or Hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Make a public link, through Gradio's servers.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for the GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto as it was saved.")] = "auto",
) -> None:
    """Ask a model in the browser, and click any word to see where it looks."""
    from ..serving.app import check_gradio, check_port

    check_gradio()
    check_port(host, port)  # before the model is loaded

    from ..inference.generation import load_model
    from ..serving.app import Sessions, build_app, launch
    from ..serving.batching import Batcher
    from ..serving.conversation import Limits

    vlm, processor = load_model(model, device, dtype)
    with Batcher(vlm, processor) as batcher:
        sessions = Sessions(vlm, processor, Limits(new_tokens=max_new_tokens))
        page = build_app(batcher, sessions, title=Path(model).name)
        settings = {"server_name": host, "server_port": port, "share": share}
        _, *places = launch(page, **settings, prevent_thread_lock=True, quiet=True)
        say(f"The app is at {' and '.join(filter(None, places))} (Ctrl-C ends it).")
        try:
            Event().wait()
        finally:
            page.close(verbose=False)
