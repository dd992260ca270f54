# SPDX-License-Identifier: Apache-2.0
import contextlib
import threading

import pytest
from evaluation_cases import age_vlm, llava


@contextlib.contextmanager
def running(model, processor, name, **settings):
    """A server in a thread; yields its address and its batcher."""
    import socket

    import uvicorn

    from agevlm.serving import Batcher
    from agevlm.serving.server import build_app

    with Batcher(model, processor, max_wait=0.1) as batcher, socket.create_server(("127.0.0.1", 0)) as listener:
        app = build_app(batcher, processor, name, **settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", batcher
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def age_vlm_server():
    model, processor = age_vlm()
    model.generation_config.eos_token_id = None
    with running(model, processor, "./tiny-age-vlm", max_body=200_000) as (url, batcher):
        yield url, batcher, processor


@pytest.fixture(scope="session")
def llava_server():
    model, processor = llava()
    with running(model, processor, "./tiny-llava") as (url, batcher):
        yield url, batcher, processor
