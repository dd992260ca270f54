# SPDX-License-Identifier: Apache-2.0
"""The server, asked by the client of OpenAI over a real connection."""

import base64
import concurrent.futures
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
from command_line import run
from documents import ROOT, blocks
from evaluation_cases import age_vlm, picture
from PIL import Image

from agevlm.inference.attention import attend
from agevlm.inference.grounding import find_calibration, ground
from agevlm.inference.replies import reply
from agevlm.processing import image_processing_agevlm
from agevlm.serving import server

pytestmark = pytest.mark.slow

NAME = "./tiny-age-vlm"
QUESTION = "Is there a dog on the sofa?"


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def ask(text: str = QUESTION, *urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def expected(batcher, processor, number: int | None = 0, text: str = QUESTION, **settings):
    images = [] if number is None else [{"type": "image", "image": picture(number)}]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    return reply(batcher.model, processor, [messages], **settings)[0]


@pytest.fixture
def client(age_vlm_server):
    with openai.OpenAI(base_url=age_vlm_server[0] + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def web(age_vlm_server):
    with httpx.Client(base_url=age_vlm_server[0], timeout=60) as web:
        yield web


def test_a_chat_with_an_image_and_without(client, age_vlm_server):
    _, batcher, processor = age_vlm_server
    (model,) = client.models.list().data
    for number in (0, None):
        messages = ask(QUESTION, *([] if number is None else [data_uri(png(number))]))
        found = client.chat.completions.create(model=model.id, messages=messages, max_tokens=7)
        alone = expected(batcher, processor, number, max_new_tokens=7)
        assert found.choices[0].message.content == alone.text
        assert found.choices[0].finish_reason == "length"
        count = len(
            processor(text=alone.prompt, images=alone.images or None, add_special_tokens=False)["input_ids"][0]
        )
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (count, 7)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert client.chat.completions.create(model=model.id, messages=system, max_tokens=2).usage.completion_tokens == 2


def test_streaming(client, age_vlm_server):
    _, batcher, processor = age_vlm_server
    messages = ask(QUESTION, data_uri(png(1)))
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, stream=True)
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == expected(batcher, processor, 1, max_new_tokens=30).text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 30


def test_sampling_and_stop_strings(client, age_vlm_server):
    _, batcher, processor = age_vlm_server
    settings = {"model": NAME, "messages": ask(QUESTION, data_uri(png(0))), "max_tokens": 12}

    def said(**more):
        return client.chat.completions.create(**settings, **more).choices[0].message.content

    greedy = expected(batcher, processor, 0, max_new_tokens=12).text
    assert said(temperature=0) == said(temperature=1e-45) == said() == greedy
    assert len({said(temperature=5.0) for _ in range(3)} | {greedy}) > 2
    assert said(stop="ss") == greedy[: greedy.index("ss") + 2]
    assert (
        said(frequency_penalty=4.0) == expected(batcher, processor, 0, max_new_tokens=12, repetition_penalty=5.0).text
    )
    assert said(logit_bias={"65": 100}) == processor.decode([65] * 12)  # an integer, as clients send it


def test_clients_who_ask_together_are_one_batch(client, age_vlm_server):
    _, batcher, processor = age_vlm_server
    sizes = []
    hook = batcher.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def one(number):
        messages = ask("Dog?" * (number + 1), data_uri(png(number)))
        return client.chat.completions.create(model=NAME, messages=messages, max_tokens=6)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, range(6)))
    hook.remove()
    assert max(sizes) > 1
    assert len(sizes) < 6 * 6
    for number, got in enumerate(found):
        alone = expected(batcher, processor, number, "Dog?" * (number + 1), max_new_tokens=6)
        assert got.choices[0].message.content == alone.text


def test_an_image_is_encoded_once_a_conversation(client, age_vlm_server):
    _, batcher, _ = age_vlm_server
    calls = []
    hook = batcher.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    messages = []
    for text in ("Dog?", "Is it red?", "And the cat?"):
        messages += ask(text, *([data_uri(png(11))] if not messages else []))
        found = client.chat.completions.create(model=NAME, messages=messages, max_tokens=3)
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
    hook.remove()
    assert len(calls) == 1


def test_a_client_that_hangs_up_frees_its_row(client, web, age_vlm_server):
    _, batcher, _ = age_vlm_server
    ended = []
    submit = batcher.submit

    def watch(*args, **settings):
        pending = submit(*args, **settings)
        pending.future.add_done_callback(lambda future: ended.append(future.cancelled()))
        return pending

    batcher.submit = watch
    try:
        stream = client.chat.completions.create(
            model=NAME, messages=ask(QUESTION, data_uri(png(0))), max_tokens=200, stream=True
        )
        next(iter(stream))
        stream.close()
        body = {"model": NAME, "messages": ask(), "max_tokens": 200}
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/chat/completions", json=body, timeout=0.12)
        deadline = time.monotonic() + 10
        while len(ended) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        del batcher.submit
    assert ended == [True, True]


PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "[::1]",
    "0.0.0.0",
    "localhost",
    "[::ffff:10.0.0.1]",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_a_url_of_a_private_address_is_refused(host, client):
    with pytest.raises(openai.BadRequestError, match="not a public one"):
        client.chat.completions.create(model=NAME, messages=ask(QUESTION, f"http://{host}:1/a.png"))


def test_images_at_urls(client, age_vlm_server, monkeypatch):
    from web_server import serve

    _, batcher, processor = age_vlm_server
    with serve({"/a.png": png(2), "/text": b"no image", "/to": "http://10.1.2.3/b.png"}) as (port, _):
        real = image_processing_agevlm._is_public
        monkeypatch.setattr(
            image_processing_agevlm, "_is_public", lambda address: address == "127.0.0.1" or real(address)
        )
        address = f"http://127.0.0.1:{port}"
        settings = {"model": NAME, "max_tokens": 4}
        found = client.chat.completions.create(messages=ask(QUESTION, address + "/a.png"), **settings)
        assert found.choices[0].message.content == expected(batcher, processor, 2, max_new_tokens=4).text
        for path, reason in {
            "/text": "no image format",
            "/to": "10.1.2.3, which is not a public",
            "/gone": "404",
        }.items():
            with pytest.raises(openai.BadRequestError, match=reason):
                client.chat.completions.create(messages=ask(QUESTION, address + path), **settings)


BAD = {
    "file": ({"messages": ask(QUESTION, "file:///etc/passwd")}, 400, "must begin with data:image/"),
    "path": ({"messages": ask(QUESTION, "/etc/passwd")}, 400, "must begin with data:image/"),
    "no image": (
        {"messages": ask(QUESTION, data_uri(b"no image"))},
        400,
        "messages\\[0\\].content\\[0\\].*no image format",
    ),
    "truncated": ({"messages": ask(QUESTION, data_uri(png(0)[:-200]))}, 400, "Cannot read image"),
    "no base64": ({"messages": ask(QUESTION, "data:image/png;base64,???")}, 400, "base64"),
    "no messages": ({}, 400, "at least one message"),
    "no role": ({"messages": [{"content": "a"}]}, 400, "messages\\[0\\] must be"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, 400, "text or a list"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "content\\[0\\] must be"),
    "images": (
        {"messages": ask(QUESTION, *[data_uri(png(0))] * 17)},
        400,
        "content\\[16\\]: this server answers about 16",
    ),
    "template": ({"messages": [{"role": "judge", "content": "a"}]}, (200, 400), ""),
    "other model": ({"messages": ask(), "model": "other"}, 400, "pinned to './tiny-age-vlm'"),
    "no number": ({"messages": ask(), "max_tokens": "many"}, 400, "setting"),
    "no token": ({"messages": ask(), "max_tokens": 0}, 400, "at least 1"),
    "hot": ({"messages": ask(), "temperature": 1e30}, 400, "temperature must be from 0 to 100"),
    "a temperature that is none": ({"messages": ask(), "temperature": float("nan")}, 400, "temperature must be"),
    "top_p": ({"messages": ask(), "top_p": 2}, 400, "top_p must be from 0 to 1"),
    "penalty": ({"messages": ask(), "frequency_penalty": -1}, 400, "frequency_penalty must be from -0.99 to 100"),
    "bias": ({"messages": ask(), "logit_bias": {"5": float("inf")}}, 400, "logit_bias must be from -100"),
    "stop": ({"messages": ask(), "stop": [1]}, 400, "stop must be a text"),
    "other settings": ({"messages": ask(), "generation_config": "{}"}, 400, "generation_config is not read"),
    "no object": ([], 422, "must be an object in JSON"),
    "tools": ({"messages": ask(), "tools": [{}]}, 400, "no tools"),
    "unknown field": ({"messages": ask(), "color": 1}, 422, "color"),
    "long": ({"messages": ask("a b " * 400)}, 400, "256 at most"),
    "large": ({"messages": ask("a" * 300_000)}, 413, "larger than 200000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_refused_with_a_reason(name, web):
    body, status, reason = BAD[name]
    for stream in (False, True):
        request = {"model": NAME, "stream": stream, **body} if isinstance(body, dict) else body
        content = json.dumps(request)  # with numbers that JSON does not have
        found = web.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert found.status_code in (status if isinstance(status, tuple) else (status,)), found.text
        assert not reason or re.search(reason, found.json()["error"]["message"]), found.text


def test_images_together_have_a_largest_size(monkeypatch):
    parts = ask(QUESTION, *[data_uri(png(0))] * 2)
    pixels = picture(0).width * picture(0).height
    monkeypatch.setattr(server, "MAX_PIXELS", 2 * pixels)
    assert len(server.read_messages(parts)[0]["content"]) == 3
    monkeypatch.setattr(server, "MAX_PIXELS", 2 * pixels - 1)
    with pytest.raises(ValueError, match=r"messages\[0\].content\[1\]: this server .* send fewer or smaller"):
        server.read_messages(parts)


def test_a_body_without_a_length_is_limited_too(web):
    def pieces():
        for _ in range(30):
            yield b"a" * 10_000

    found = web.post("/v1/chat/completions", content=pieces())
    assert found.status_code == 413


def test_what_goes_wrong_in_a_stream_is_said_there(client, age_vlm_server, monkeypatch):
    _, batcher, _ = age_vlm_server
    features = batcher.model.get_image_features

    def poison(*args):
        found = features(*args)
        found.pooler_output[:] = torch.nan
        return found

    monkeypatch.setattr(batcher.model, "get_image_features", poison)
    messages = ask('A "quoted" dog?', data_uri(png(9)))
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model=NAME, messages=messages, stream=True, max_tokens=3))
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=NAME, messages=ask(), temperature=-1.0)
    with pytest.raises(openai.BadRequestError, match="not finite"):
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=3)


def test_heat_maps(web, age_vlm_server):
    _, batcher, processor = age_vlm_server
    body = {"messages": ask(QUESTION, data_uri(png(0))), "max_tokens": 5, "phrases": ["dog", "the sofa"]}
    found = web.post("/v1/attention", json=body)
    shown = attend(batcher.model, processor, picture(0), QUESTION, phrases=["dog", "the sofa"], max_new_tokens=5)
    assert found.json() == json.loads(json.dumps(shown.to_dict()))
    image = web.post("/v1/attention", json=body, headers={"Accept": "image/png"})
    assert image.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).width > 300


def test_grounded_answers(web, age_vlm_server):
    _, batcher, processor = age_vlm_server
    body = {"messages": ask(QUESTION, data_uri(png(0)), data_uri(png(1))), "max_tokens": 5, "image": 0}
    two = web.post("/v1/ground", json=body).json()
    assert two["image_size"] == {"width": picture(0).width, "height": picture(0).height}
    body = {"messages": ask(QUESTION, data_uri(png(0))), "max_tokens": 5}
    calibration = find_calibration(batcher.model, NAME)
    shown = ground(batcher.model, processor, picture(0), QUESTION, max_new_tokens=5, calibration=calibration)
    found = web.post("/v1/ground", json=body).json()
    assert found == json.loads(json.dumps(shown.to_dict()))
    assert [phrase["text"] for phrase in found["phrases"]][:2] == ["dog", "sofa"]
    image = web.post("/v1/ground", json={**body, "format": "png"})
    assert Image.open(io.BytesIO(image.content)).format == "PNG"


LOOKS = {
    "no image": ({"messages": ask()}, "0 images"),
    "no such image": ({"messages": ask(QUESTION, data_uri(png(0))), "image": 1}, "1 images"),
    "format": ({"messages": ask(QUESTION, data_uri(png(0))), "format": "gif"}, "json or png"),
    "phrase": ({"messages": ask(QUESTION, data_uri(png(0))), "phrases": ["zebra"], "max_tokens": 2}, "zebra"),
    "phrases": ({"messages": ask(QUESTION, data_uri(png(0))), "phrases": "dog"}, "list of texts"),
    "no question": ({"messages": ask("", data_uri(png(0)))}, "no question"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_wrong_request_for_maps_is_refused_with_a_reason(name, web):
    body, reason = LOOKS[name]
    for route in ("/v1/attention", "/v1/ground"):
        found = web.post(route, json=body)
        assert (found.status_code, reason in found.text) == (400, True), found.text


def test_a_field_of_another_name_is_refused_and_not_passed_over(web):
    body = {"messages": ask(QUESTION, data_uri(png(0))), "max_tokens": 2}
    for route in ("/v1/chat/completions", "/v1/attention", "/v1/ground"):
        found = web.post(route, json={**body, "phrase": ["dog"]})
        assert (found.status_code, "'phrase'" in found.text) == (422, True), found.text


def test_a_blank_text_behind_the_question_is_no_question(web):
    (message,) = ask(QUESTION, data_uri(png(0)))
    message["content"].append({"type": "text", "text": " "})
    found = web.post("/v1/ground", json={"messages": [message], "max_tokens": 2}).json()
    assert found["question"] == QUESTION


def test_routes_that_load_models_or_fetch_by_themselves_are_left_out(web):
    for path in (
        "/load_model",
        "/reset",
        "/v1/responses",
        "/v1/completions",
        "/v1/systemone",
        "/v1/audio/transcriptions",
    ):
        assert web.post(path, json={}).status_code == 404
    assert web.get("/health").json() == {"status": "ok"}


def check_busy(found):
    assert (found.status_code, found.headers["Retry-After"]) == (503, "5")
    error = found.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", 503)
    assert "ask again in 5 seconds" in error["message"]


def test_more_requests_than_may_wait_for_the_model_are_refused(web, age_vlm_server, monkeypatch):
    _, batcher, _ = age_vlm_server
    monkeypatch.setattr(type(batcher), "waiting", server.MAX_WAITING_BATCHES * batcher.max_batch_size)
    body = {"messages": ask(QUESTION, data_uri(png(0))), "max_tokens": 2}
    for route, more in (
        ("chat/completions", {}),
        ("chat/completions", {"stream": True}),
        ("attention", {}),
        ("ground", {}),
    ):
        check_busy(web.post(f"/v1/{route}", json={**body, **more}))
    assert web.get("/health").status_code == 200


def test_slow_addresses_hold_up_no_request_without_one_and_too_many_are_refused(web, age_vlm_server, monkeypatch):
    url, batcher, _ = age_vlm_server
    arrives = threading.Event()

    def slow(address, urls):
        if address.startswith("http"):
            arrives.wait(60)
        return image_processing_agevlm.load_image(address, urls=urls)

    monkeypatch.setattr(server, "load_image", slow)
    most = server.MAX_WAITING_BATCHES * batcher.max_batch_size
    body = {"messages": ask(QUESTION, "http://10.0.0.1/a.png"), "max_tokens": 2}
    with (
        httpx.Client(timeout=60, limits=httpx.Limits()) as many,
        concurrent.futures.ThreadPoolExecutor(most + 3) as pool,
    ):
        try:
            asked = [pool.submit(many.post, url + "/v1/chat/completions", json=body) for _ in range(most + 3)]
            ended = concurrent.futures.as_completed(asked, 30)
            refused = [next(ended).result() for _ in range(3)]
            found = web.post("/v1/chat/completions", json={**body, "messages": ask(QUESTION, data_uri(png(0)))})
            assert found.status_code == 200
            assert sum(one.done() for one in asked) == 3
        finally:
            arrives.set()
    for one in refused:
        check_busy(one)
    assert [one.result().status_code for one in asked].count(400) == most


def test_a_damaged_calibration_is_said_at_the_start(monkeypatch, capsys, tmp_path):
    for part in age_vlm():
        part.save_pretrained(tmp_path)
    (tmp_path / "grounding.json").write_text("{}")
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_, **__: pytest.fail("it serves"))
    for words in (("serve", tmp_path, "--port", 0), ("app", tmp_path, "--port", free_port())):
        code, printed = run(monkeypatch, capsys, *words)
        assert code == 2, printed
        assert printed.count("agevlm: error:") == 1
        assert "grounding.json is damaged" in printed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_other_models_chat_and_have_maps(llava_server):
    url, batcher, processor = llava_server
    messages = ask(QUESTION, data_uri(png(0)))
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        found = client.chat.completions.create(model="./tiny-llava", messages=messages, max_tokens=5)
    alone = expected(batcher, processor, max_new_tokens=5)
    assert found.choices[0].message.content == alone.text
    inputs = processor(text=alone.prompt, images=alone.images, return_tensors="pt")
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
    looked = httpx.post(url + "/v1/attention", json={"messages": messages, "phrases": ["dog"], "max_tokens": 5}).json()
    (phrase,) = looked["phrases"]
    assert [one["block"] for one in phrase["maps"]][-1] == "average"
    assert all(sum(map(sum, one["map"])) + one["elsewhere"] == pytest.approx(1, abs=1e-4) for one in phrase["maps"])
    grounded = httpx.post(url + "/v1/ground", json={"messages": messages, "max_tokens": 5}).json()
    assert "only an AGE-VLM can be calibrated" in grounded["reason"]


def test_a_server_without_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "agevlm.serving.server")
    code, printed = run(monkeypatch, capsys, "serve", tmp_path)
    assert (code, "pip install 'agevlm[serve]'" in printed) == (2, True), printed


def test_a_port_that_is_taken(monkeypatch, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, printed = run(monkeypatch, capsys, "serve", tmp_path, "--host", "127.0.0.1", "--port", port)
    assert code == 2
    assert "in use" in printed


def test_the_client_of_the_page(age_vlm_server, tmp_path, monkeypatch, capsys):
    url, batcher, processor = age_vlm_server
    (tmp_path / "demo_output").mkdir()
    (tmp_path / "demo_output" / "example.png").write_bytes(png(0))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "serving.md", "py")
    code = code.replace("http://localhost:8000", url).replace('model="demo_output/checkpoint"', f"model={NAME!r}")
    exec(compile(code, "docs/serving.md", "exec"), {})
    text = expected(batcher, processor, 0, "Is there a dog in the image?", max_new_tokens=64).text
    assert capsys.readouterr().out == text


@pytest.mark.minutes
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    model, processor = age_vlm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-m", "agevlm", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            address, _, rest = process.stdout.readline().partition(" ")
            assert rest.strip() == f"serves {tmp_path}"
            with openai.OpenAI(base_url=address, api_key="none") as client:
                messages = ask(QUESTION, data_uri(png(0)))
                found = client.chat.completions.create(model=str(tmp_path), messages=messages, max_tokens=4)
                assert 0 < found.usage.completion_tokens <= 4
                client.chat.completions.create(model=str(tmp_path), messages=messages, max_tokens=150, stream=True)
                process.send_signal(number)
                _, printed = process.communicate(timeout=30)
        assert process.returncode in (0, 128 + number), printed
        assert "Traceback" not in printed
