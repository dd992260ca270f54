# SPDX-License-Identifier: Apache-2.0
"""`agevlm serve`: Transformers' own server for one model, whose requests go through a [`Batcher`].

The routes, their checks and the form of the answers are Transformers'. Ours are how a conversation is read, which fetches images
from public addresses only, how it is answered, and the routes for heat maps and grounded answers.
"""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from openai.types.completion_usage import CompletionUsage
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:
    raise ImportError(f"the server needs `pip install 'agevlm[serve]'` ({error})") from error

from ..inference.attention import can_show, show_reply
from ..inference.generation import count_tokens, load_model, render_chat
from ..inference.grounding import find_calibration, ground_reply
from ..inference.replies import Reply, conversation_images
from ..processing.image_processing_agevlm import load_image, to_rgb
from .batching import Batcher, BatcherClosedError, PendingReply

MAX_BODY = 32 * 2**20
"""Bytes of the longest request."""

MAX_IMAGES = 16
"""Images of the longest conversation."""

MAX_WAITING_BATCHES = 4
"""Batches of conversations that wait for the model, and as many that are being read; further ones are refused."""

RETRY_AFTER = 5
"""Seconds after which a client that was refused may ask again."""

FETCHING = 16
"""Conversations whose images are fetched from URLs at the same time."""

MAX_PIXELS = 2 * 10**8
"""Pixels of all its images, which small files can have: as many as 16 photographs of 12 megapixels."""

# Those of Transformers' server that load or unload models, or fetch URLs by themselves, are left out.
_ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
# What a request may say of how its reply is written.
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p")
_SETTINGS = ("repetition_penalty", "sequence_bias", "stop_strings")
# What a request for maps may say besides.
_LOOKS = ("phrases", "image", "format")
# Wider than OpenAI's. Far beyond, probabilities are not finite: to sample from them is an error, after which a GPU does nothing more.
# A penalty is Transformers' `repetition_penalty` less 1, which must be above 0.
_RANGES = {"temperature": (0, 100), "top_p": (0, 1), "frequency_penalty": (-0.99, 100)}
_MAX_BIAS = 100
# Lower temperatures could not be told from greedy decoding, and overflow in the end.
_LOWEST_TEMPERATURE = 0.01


# --- conversations ---


def read_messages(messages: Any, max_images: int = MAX_IMAGES) -> list[dict[str, Any]]:
    """Messages of OpenAI's chat completions, for a chat template, with the images themselves.

    Args:
        messages: each with a `role`, and a `content` that is a text or a list of parts: `{"type": "text", "text": …}`, and
            `{"type": "image_url", "image_url": {"url": …}}` with a data URI or a URL of a public address.

    Raises:
        ValueError: if they have another form, or an image may not be fetched or is none; names the message.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    found: list[dict[str, Any]] = []
    images = pixels = 0
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place} must be an object with a role and a content")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f"{place}.content must be a text or a list of parts")
        content = []
        for index, part in enumerate(parts):
            content.append(_read_part(part, f"{place}.content[{index}]"))
            if (image := content[-1].get("image")) is not None:  # before the next one takes memory
                images, pixels = images + 1, pixels + image.width * image.height
            if images > max_images or pixels > MAX_PIXELS:
                raise ValueError(
                    f"{place}.content[{index}]: this server answers about {max_images} images of {MAX_PIXELS // 10**6} megapixels "
                    "together at most: send fewer or smaller ones"
                )
        found.append({"role": message["role"], "content": content})
    return found


def _read_part(part: Any, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "input_image"):
        url = _image_url(part)
        if not isinstance(url, str) or not url.startswith(("data:image/", "http://", "https://")):
            raise ValueError(f"{place}: the URL of an image must begin with data:image/, http:// or https://")
        try:
            return {"type": "image", "image": to_rgb(load_image(url, urls="public"))}
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    raise ValueError(f"{place} must be a part of the type text or image_url with its content")


def _image_url(part: Mapping[str, Any]) -> Any:
    url = part.get("image_url")
    return url.get("url") if isinstance(url, Mapping) else url


def _fetches(messages: Any) -> bool:
    """Whether images of messages, which may have any form yet, are to be fetched."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and str(_image_url(part)).startswith("http") for part in parts)


def _check_settings(body: dict[str, Any]) -> dict[str, Any]:
    """The body, with numbers that a model can sample with.

    Raises:
        ValueError: if there are others.
    """
    for name, (low, high) in _RANGES.items():
        if body.get(name) is not None and not low <= float(body[name]) <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {body[name]!r}")
    bias = {token: float(value) for token, value in (body.get("logit_bias") or {}).items()}
    if not all(abs(value) <= _MAX_BIAS for value in bias.values()):
        raise ValueError(f"the values of logit_bias must be from -{_MAX_BIAS} to {_MAX_BIAS}")
    stop = body.get("stop") or None
    if stop is not None and not all(
        isinstance(text, str) and text for text in ([stop] if isinstance(stop, str) else stop)
    ):
        raise ValueError("stop must be a text or a list of texts")
    if body.get("generation_config") is not None:
        raise ValueError("generation_config is not read here: use OpenAI's settings")
    return {**body, "logit_bias": bias or None, "stop": stop}


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last text of the last turn of the user."""
    texts = [
        part["text"].strip()
        for message in messages
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text" and part["text"].strip()
    ]
    if not texts:
        raise ValueError("the conversation has no question: end it with a text of the user")
    return texts[-1]


# --- answers ---


@dataclass(frozen=True)
class _Conversation:
    """What a request asks: messages with their images, the tokens of their prompt, and how the reply is generated."""

    messages: list[dict[str, Any]]
    tokens: int
    config: GenerationConfig

    def usage(self, written: int) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self.tokens, completion_tokens=written, total_tokens=self.tokens + written
        )


class _BusyError(RuntimeError):
    """More requests wait than the server keeps."""

    def __init__(self) -> None:
        super().__init__(f"too many requests wait already: ask again in {RETRY_AFTER} seconds")


class _Readers:
    """Threads that read conversations; `most` are read or wait for it."""

    def __init__(self, threads: int, most: int):
        self._threads, self._most, self._count = ThreadPoolExecutor(threads), most, 0

    async def read(self, function: Callable[..., "_Conversation"], *args: Any) -> "_Conversation":
        """
        Raises:
            _BusyError: if too many wait.
        """
        if self._count >= self._most:
            raise _BusyError
        self._count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        finally:
            self._count -= 1


class _Chat(ChatCompletionHandler):
    """Transformers' handler of chat completions, whose replies a batcher writes.

    Raises:
        ValueError: if the model's calibration is damaged.
    """

    def __init__(self, manager: ModelManager, batcher: Batcher, name: str):
        super().__init__(manager, GenerationState())
        self.batcher, self.name = batcher, name
        self.most_waiting = MAX_WAITING_BATCHES * batcher.max_batch_size
        # Those that wait for other servers have threads of their own, so that the others need not wait for them.
        self._fetchers, self._readers = _Readers(FETCHING, self.most_waiting), _Readers(4, self.most_waiting)
        self._shows = can_show(batcher.model)
        self._calibration = find_calibration(batcher.model, name)

    async def handle_request(self, body: dict, request_id: str) -> Response:
        self._validate_request(body)
        if body.get("tools"):
            raise HTTPException(400, "this server has no tools")
        _, model, processor = self._resolve_model(body)
        with _as_response():
            conversation = await self.read_soon(body, model, processor)
            if body.get("stream"):
                return StreamingResponse(self._stream(request_id, conversation), media_type="text/event-stream")
            found = await asyncio.wrap_future(self.submit(conversation).future)
        usage = conversation.usage(len(found.tokens))
        return JSONResponse(
            self._build_completion(request_id, found.text, self.name, finish_reason=found.finish_reason, usage=usage)
        )

    async def _stream(self, request_id: str, conversation: "_Conversation") -> AsyncIterator[str]:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            pending = self.submit(conversation, on_piece=put)
            pending.future.add_done_callback(lambda _: put(None))
            yield self._build_chunk_sse(request_id, role="assistant", model=self.name)
            try:
                while (piece := await pieces.get()) is not None:
                    yield self._build_chunk_sse(request_id, content=piece, model=self.name)
            finally:
                pending.cancel()  # of a client that has hung up
            found = pending.result()
        except Exception as error:  # the status has been sent already
            yield self.chunk_to_sse(json.dumps(_error(400 if isinstance(error, ValueError) else 500, str(error))))
            return
        usage = conversation.usage(len(found.tokens))
        yield self._build_chunk_sse(request_id, finish_reason=found.finish_reason, model=self.name, usage=usage)
        yield self.chunk_to_sse("[DONE]")

    def submit(
        self, conversation: "_Conversation", maps: bool = False, on_piece: Callable[[str], None] | None = None
    ) -> PendingReply:
        config = conversation.config
        names = (*_SAMPLING, *_SETTINGS) if config.do_sample else _SETTINGS
        return self.batcher.submit(
            conversation.messages,
            max_new_tokens=config.max_new_tokens,
            maps=maps,
            on_piece=on_piece,
            **{name: getattr(config, name) for name in names if getattr(config, name) is not None},
        )

    async def read_soon(self, body: dict, model: PreTrainedModel, processor: ProcessorMixin) -> "_Conversation":
        """As [`read`], in a thread.

        Raises:
            _BusyError: if too many requests wait to be read, or for the model.
            ValueError: if the request is wrong.
        """
        self._check_room()
        readers = self._fetchers if _fetches(body.get("messages")) else self._readers
        conversation = await readers.read(self.read, body, model, processor)
        self._check_room()
        return conversation

    def _check_room(self) -> None:
        if self.batcher.waiting >= self.most_waiting:
            raise _BusyError

    def read(self, body: dict, model: PreTrainedModel, processor: ProcessorMixin) -> "_Conversation":
        """
        Raises:
            ValueError: if the request is wrong.
        """
        messages = read_messages(body.get("messages"))
        try:
            prompt = render_chat(processor, messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which can fail in any way
            raise ValueError(f"the model's chat template does not take this conversation: {error}") from error
        count = count_tokens(processor, prompt, conversation_images(messages))
        try:
            config = self._build_generation_config(_check_settings(body), model.generation_config)
        except Exception as error:  # whatever a value of another type leads to
            raise ValueError(f"a setting of the request cannot be read: {error}") from error
        if body.get("temperature") is not None or body.get("top_p") is not None:
            config.do_sample = config.temperature is None or config.temperature >= _LOWEST_TEMPERATURE
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if config.max_new_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {config.max_new_tokens}")
        if places is not None:
            if count >= places:
                raise ValueError(
                    f"the conversation has {count} tokens, and the model reads and writes {places} at most"
                )
            config.max_new_tokens = min(config.max_new_tokens, places - count)
        return _Conversation(messages, count, config)

    async def look(self, body: dict, request: Request, show: Callable[..., Any]) -> Response:
        """The reply to a conversation, and where it looks: `show(model, processor, reply, question, phrases, image=)`."""
        self._validate_request({name: value for name, value in body.items() if name not in _LOOKS})
        _, model, processor = self._resolve_model(body)
        as_png = body.get("format", "png" if "image/png" in request.headers.get("accept", "") else "json")
        with _as_response():
            if as_png not in ("json", "png"):
                raise ValueError(f"the format must be json or png, got {as_png!r}")
            if not self._shows:
                raise ValueError(
                    f"{self.name} is a {type(model).__name__}, which has no attention maps that could be shown"
                )
            conversation = await self.read_soon(body, model, processor)
            images, question = len(conversation_images(conversation.messages)), _question(conversation.messages)
            image, phrases = body.get("image", images - 1), body.get("phrases")
            if not isinstance(image, int) or not 0 <= image < images:
                raise ValueError(f"the conversation has {images} images: image must be the number of one, from 0")
            if phrases is not None and not (
                isinstance(phrases, list) and phrases and all(isinstance(phrase, str) for phrase in phrases)
            ):
                raise ValueError("phrases must be a list of texts")
            found = await asyncio.wrap_future(self.submit(conversation, maps=True).future)
            shown = await asyncio.to_thread(show, model, processor, found, question, phrases, image=image)
            if as_png == "json":
                return JSONResponse(shown.to_dict())
            return Response(await asyncio.to_thread(_draw, shown), media_type="image/png")

    def ground(self, model: Any, processor: Any, found: Reply, question: str, phrases: Any, image: int) -> Any:
        return ground_reply(model, processor, found, question, phrases, image=image, calibration=self._calibration)


@contextlib.contextmanager
def _as_response() -> Iterator[None]:
    """Makes of errors in the block the response that says what was wrong."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    except _BusyError as error:
        raise HTTPException(503, str(error), {"Retry-After": f"{RETRY_AFTER}"}) from error
    except BatcherClosedError as error:
        raise HTTPException(503, str(error)) from error


def _error(status: int, message: str) -> dict[str, Any]:
    """An error in the form of OpenAI's, which its clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def _draw(shown: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shown.png"
        shown.draw(file)
        return file.read_bytes()


# --- the application ---


class _Guard:
    """Refuses bodies that are too large, and ends the work for a client that has hung up."""

    def __init__(self, app: ASGIApp, max_body: int):
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size <= self.max_body:
                body += message.get("body", b"")
            elif (
                not more or size > 4 * self.max_body
            ):  # what is sent a little too long is read, so that the client sees why
                refusal = JSONResponse(_error(413, f"the request is larger than {self.max_body} bytes"), 413)
                await refusal(scope, receive, send)
                return
        gone, first = asyncio.Event(), True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app(scope, replay, send))
        hung_up = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                gone.set()
                work.cancel()
            await asyncio.gather(work, return_exceptions=hung_up.done())
        finally:
            work.cancel()
            hung_up.cancel()


def build_app(batcher: Batcher, processor: ProcessorMixin, name: str, *, max_body: int = MAX_BODY) -> FastAPI:
    """The server's application.

    Args:
        processor: of the model, for other threads than the batcher's.
        name: what the server calls its model; for grounded answers, the folder or Hub id that has its calibration.
        max_body: longest request, in bytes.

    Raises:
        ValueError: if the model's calibration is damaged.
    """
    manager = ModelManager()
    manager.force_model = name
    manager.loaded_models[manager.process_model_name(name)] = TimedModel(batcher.model, -1, processor)
    chat = _Chat(manager, batcher, name)
    nothing: Any = None  # their routes are left out
    app = build_server(manager, chat, nothing, nothing, nothing, nothing, chat.generation_state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]

    @app.exception_handler(StarletteHTTPException)  # of which FastAPI's is one
    async def refuse(request: Request, error: StarletteHTTPException) -> Response:
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_error(422, f"the body must be an object in JSON: {error.errors()[0]['msg']}"), 422)

    @app.post("/v1/attention")
    async def attention(request: Request, body: dict) -> Response:
        return await chat.look(body, request, show_reply)

    @app.post("/v1/ground")
    async def ground(request: Request, body: dict) -> Response:
        return await chat.look(body, request, chat.ground)

    app.add_middleware(_Guard, max_body=max_body)
    return app


def serve(
    name: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    max_batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    announce: Callable[[str], None] = print,
) -> None:
    """Serves a model until it is interrupted.

    Args:
        name: folder or Hub id.
        port: 0 for any that is free.
        announce: gets the address.

    Raises:
        ValueError: as [`load_model`], or if the model's calibration is damaged.
        OSError: as [`load_model`], or if the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        model, processor = load_model(name, device, dtype)
        with Batcher(model, processor, max_batch_size=max_batch_size) as batcher:
            # Requests that are in flight have a moment to end.
            config = uvicorn.Config(
                build_app(batcher, processor, name), log_level="warning", timeout_graceful_shutdown=5
            )
            announce(f"http://{host}:{listener.getsockname()[1]}/v1 serves {name}")
            uvicorn.Server(config).run(sockets=[listener])
