# SPDX-License-Identifier: Apache-2.0
"""`load_image`: what is wrong with a source, what is fetched and how far, and properties of any image and any bytes."""

import base64
import io
import socket
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from row_cases import encoded, png_header
from web_server import serve

from agevlm.processing import image_processing_agevlm as module
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessorPil, load_image, to_rgb

# --- mistakes ---


def test_each_mistake_is_named_with_its_path(tmp_path):
    whole = encoded(kind="JPEG")
    files = {
        "empty.png": (b"", "it is empty"),
        "text.png": (b"Hello, I am a text.", "it begins with b'Hello, I am '"),
        "page.pdf": (b"%PDF-1.7\n1 0 obj", "it begins with b'%PDF-1.7"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "huge.png": (png_header(9600, 10_000), "exceed the limit of 89478485"),
        "bomb.png": (png_header(100_000, 100_000), "decompression bomb"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "PostScript"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^Cannot read image '.*" + name) as error:
            load_image(tmp_path / name)
        assert message in str(error.value)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png': it is a folder"):
        load_image(tmp_path / "folder.png")
    for missing in ("nope.png", "nope", "no/such/folder/image", "", "a\0b.png", "ftp://host/image.png", "x" * 300):
        with pytest.raises(ValueError, match="there is no such file"):
            load_image(missing)


def test_a_command_names_a_missing_image(monkeypatch, capsys, tmp_path):
    from command_line import check_refused

    check_refused(
        monkeypatch, capsys, tmp_path, "'nope.png': there is no such file", "ask", "What?", "--model", tmp_path,
        "--image", "nope.png",
    )  # fmt: skip


def test_base64_is_still_read():
    text = base64.b64encode(encoded()).decode()
    for source in (text, f"data:image/png;base64,{text}", "\n".join([text[:50], text[50:]])):
        assert load_image(source).size == (40, 30)
    with pytest.raises(ValueError, match="base64 encoding is damaged"):
        load_image(f"data:image/png;base64,{text[:-5]}@")


# --- downloads ---


@pytest.fixture
def public(monkeypatch):
    """A name service that knows `public.example`, on this machine; 127.0.0.1 counts as a public address."""
    find, is_public = socket.getaddrinfo, module._is_public

    def look_up(host, port, *args, **kwargs):
        if host == "private.example":
            host = "127.0.0.2"
        return find("127.0.0.1" if host == "public.example" else host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(module, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # which public downloads must not use
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_urls_of_a_person_and_of_data(public):
    pages = {"/a.png": encoded(), "/moved": "/a.png"}
    with serve(pages) as (port, asked):
        for url in (f"http://127.0.0.1:{port}/a.png", f"http://127.0.0.1:{port}/moved"):
            with pytest.raises(ValueError, match=r"are not fetched.*--allow-urls"):
                load_image(url, urls="none")
        assert not asked
        assert load_image(f"http://127.0.0.1:{port}/moved").size == (40, 30)
        assert load_image(f"http://public.example:{port}/moved", urls="public").size == (40, 30)
        assert asked[-1] == ("/a.png", f"public.example:{port}")  # the name, though the address was asked
        with pytest.raises(ValueError, match=r"no\.png.*404"):
            load_image(f"http://public.example:{port}/no.png", urls="public")


def test_addresses_that_are_not_public_are_never_reached(monkeypatch):
    with serve({"/a.png": encoded()}) as (port, asked):
        hosts = ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
        hosts += ["10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "[fe80::1]", "[fc00::1]", "100.64.0.1"]
        hosts += ["[2002:7f00:1::]", "[64:ff9b::7f00:1]", "224.0.0.1", "168.63.129.16"]
        for host in hosts:
            with pytest.raises(ValueError, match="not a public one of the Internet"):
                load_image(f"http://{host}:{port}/a.png", urls="public")
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, **__: [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", ("10.0.0.1", 80))],
        )
        with pytest.raises(ValueError, match=r"two\.example has the address 10\.0\.0\.1"):
            load_image("http://two.example/a.png", urls="public")
        assert not asked


def test_redirects_are_checked_at_each_hop(public):
    pages = {"/out": "/next", "/round": "/round", "/file": "file:///etc/hostname"}
    with serve(pages) as (port, asked):
        pages["/next"] = f"http://private.example:{port}/secret.png"
        with pytest.raises(ValueError, match=r"private\.example has the address 127\.0\.0\.2"):
            load_image(f"http://public.example:{port}/out", urls="public")
        assert [path for path, _ in asked] == ["/out", "/next"]
        for page in ("/round", "/file"):
            with pytest.raises(ValueError, match="Cannot read image"):
                load_image(f"http://public.example:{port}{page}", urls="public")


@pytest.mark.parametrize("urls", ["all", "public"])
def test_downloads_have_limits(public, monkeypatch, urls):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))

    def slow_headers(handler):
        for byte in b"HTTP/1.1 200 OK\r\n" * 9:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.1)

    def slow_body(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(99):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    monkeypatch.setattr(module, "MAX_DOWNLOAD_BYTES", 1 << 20)
    host = "127.0.0.1" if urls == "all" else "public.example"
    with serve({"/endless": endless, "/headers": slow_headers, "/body": slow_body}) as (port, _):
        with pytest.raises(ValueError, match="larger than 1048576 bytes"):
            load_image(f"http://{host}:{port}/endless", urls=urls)
        monkeypatch.setattr(module, "MAX_DOWNLOAD_SECONDS", 0.5)
        for page in ("headers", "body"):
            start = time.monotonic()
            with pytest.raises(ValueError, match=r"did not arrive within 0\.5 seconds"):
                load_image(f"http://{host}:{port}/{page}", urls=urls)
            assert time.monotonic() - start < 5


# --- properties ---

MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "La",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
]


@given(st.sampled_from(MODES), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_any_image_becomes_rgb_or_a_value_error(mode, width, height, seed):
    image = Image.new(mode, (width, height))
    data = np.random.default_rng(seed).bytes(len(image.tobytes()))
    if data:
        image.frombytes(data)
    try:
        rgb = to_rgb(image)
        pixels = AgeVlmImageProcessorPil(size={"height": 8, "width": 8})(image, return_tensors="pt").pixel_values
    except ValueError:
        return
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.isfinite(pixels).all()


def image_or_none(source):
    try:
        return load_image(source, urls="none")
    except ValueError as error:
        if not str(error).startswith("Cannot read image"):
            raise
        return None


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA"]
FILES = {kind: encoded(20, 10, kind) for kind in FORMATS}


@given(st.sampled_from(FORMATS), st.data())
def test_damaged_files_become_rgb_or_a_value_error(kind, data):
    damaged = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    image = image_or_none(damaged)
    if image is None:
        return
    try:
        assert to_rgb(image).mode == "RGB"
    except ValueError:
        assert image.mode not in ("L", "RGB")


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_and_any_text_become_an_image_or_a_value_error(source):
    image = image_or_none(source)
    assert image is None or isinstance(image, Image.Image)


def test_an_8_bit_file_and_its_bytes_are_one_image():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(buffer.getvalue())), pixels)
