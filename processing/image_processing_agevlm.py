# Copyright 2026 The AGE-VLM contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Image processor classes for AGE-VLM, with torchvision and with PIL.

Both backends are in one file, so that a checkpoint that was saved with one of them contains the code of both.
"""

import base64
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from io import BytesIO
from typing import Any, Literal

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import auto_docstring, logging

logger = logging.get_logger(__name__)


def flatten_images(images: Any) -> list[Any]:
    """All images of `images` in order, as a flat list.

    `images` is one image, a list of images that may be nested to any depth, or an array of several images (4 dimensions).
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


# Limits of a download. The largest images that `PIL.Image.MAX_IMAGE_PIXELS` lets through are seldom larger as files.
MAX_DOWNLOAD_BYTES = 100 * 2**20
MAX_DOWNLOAD_SECONDS = 30


def load_image(
    source: str | os.PathLike | bytes, *, urls: Literal["all", "public", "none"] = "all"
) -> PIL.Image.Image:
    """Reads an image file, its bytes, a URL or a base64 string into an upright PIL image without changing its mode.

    `load_image` of Transformers drops the alpha channel, while its image processors composite PIL images on white. Without
    a change of mode, a file and the PIL image that is opened from it give the same pixels.

    Args:
        source: what to read. Downloads end with an error after `MAX_DOWNLOAD_SECONDS` or `MAX_DOWNLOAD_BYTES`.
        urls: which URLs may be fetched. `all` is for those that a person names. `public` is for those that data name: only from
            public addresses of the Internet, also after each redirect, and past any proxy. `none` fetches nothing.

    Raises:
        ValueError: if the source is not found, may not be fetched, is no image, is truncated, or has too many pixels.
    """
    source = os.fspath(source)
    try:
        file = BytesIO(source) if isinstance(source, bytes) else _find_image(source, urls)
        with PIL.Image.open(file) as image:
            if image.format == "EPS":
                raise ValueError("it is a program in PostScript, which would have to be run. Convert it to PNG.")
            return decode_image(image).copy()  # what is read stays when the file is closed
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"Cannot read image {_shorten(source)}: {error} {_BOMB_FIX}") from error
    except PIL.UnidentifiedImageError as error:
        start = file.getvalue()[:12] if isinstance(file, BytesIO) else _first_bytes(file)
        found = f"it begins with {start!r}" if start else "it is empty"
        if isinstance(file, BytesIO) and isinstance(source, str) and ":" not in source:
            found = f"there is no such file, and read as base64 {found}"
        raise ValueError(
            f"Cannot read image {_shorten(source)}: {found}, which is no image format that Pillow reads. Pass an intact image "
            "such as a PNG or JPEG file."
        ) from error
    except Exception as error:  # decoders raise many types of errors for damaged data
        raise ValueError(f"Cannot read image {_shorten(source)}: {error or type(error).__name__}") from error


def _find_image(source: str, urls: str) -> str | BytesIO:
    """The path of an image file, or the bytes that a URL or a base64 string stands for."""
    if source.startswith(("http://", "https://")):
        return BytesIO(_download(source, urls))
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise ValueError("it is a folder. Pass the path of an image file.")
    if os.path.exists(source):
        raise ValueError("it is not a regular file.")
    is_data_url = source.startswith("data:image/")
    data = "".join(source.split(",", 1)[1].split()) if is_data_url and "," in source else "".join(source.split())
    # The shortest images have more characters than names without a dot usually have.
    if is_data_url or len(data) > 40:
        try:
            return BytesIO(base64.b64decode(data, validate=True))
        except ValueError as error:
            if is_data_url:
                raise ValueError(f"its base64 encoding is damaged ({error}).") from error
    raise ValueError(
        "there is no such file. Pass the path of an image file, a URL that begins with http:// or https://, or a base64 "
        "encoded image."
    )


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)


def _download(url: str, urls: str) -> bytes:
    """What a URL holds, within the limits of size and time.

    Raises:
        ValueError: if it may not be fetched, or exceeds a limit.
    """
    if urls == "none":
        raise ValueError(
            "images at URLs in data are not fetched. Download them, or allow it with `--allow-urls` or `allow_urls=True`."
        )
    deadline = time.monotonic() + MAX_DOWNLOAD_SECONDS
    outcome: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            with _request_public(url) if urls == "public" else _request(url) as response:
                data = bytearray()
                while time.monotonic() < deadline:
                    piece = response.read1(1 << 16)
                    data += piece
                    if len(data) > MAX_DOWNLOAD_BYTES:
                        raise ValueError(f"it is larger than {MAX_DOWNLOAD_BYTES} bytes. Download it by other means.")
                    if not piece:
                        outcome.append(bytes(data))
                        return
        except Exception as error:
            outcome.append(error)

    # In a thread, because a server that sends its headers byte by byte reaches no time limit of a socket.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(MAX_DOWNLOAD_SECONDS)
    if not outcome:
        raise ValueError(f"it did not arrive within {MAX_DOWNLOAD_SECONDS} seconds. Download it by other means.")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


_HEADERS = {"User-Agent": "agevlm", "Accept-Encoding": "identity"}


def _request(url: str) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=_HEADERS)
    return urllib.request.urlopen(request, timeout=MAX_DOWNLOAD_SECONDS)


def _request_public(url: str) -> http.client.HTTPResponse:
    """Asks public addresses only, also after a redirect. It uses no proxy, which would look names up by itself.

    A name is looked up once, so that the address that is checked is the one that is connected to.
    """
    for _ in range(6):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r:.200} does not begin with http:// or https:// and the name of a host.")
        secure = parts.scheme == "https"
        host, port = parts.hostname, parts.port or (443 if secure else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for *_, address in sorted(found)]  # IPv4 first, which reaches more hosts
        if private := [address for address in addresses if not _is_public(address)]:
            raise ValueError(f"{host} has the address {private[0]}, which is not a public one of the Internet.")
        connected = socket.create_connection((addresses[0], port), timeout=MAX_DOWNLOAD_SECONDS)
        if secure:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
        connection.sock = connected
        connection.request(
            "GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), headers=_HEADERS
        )
        response = connection.getresponse()
        if response.status == 200:
            return response
        location = response.headers["Location"] if response.status in (301, 302, 303, 307, 308) else None
        connection.close()
        if location is None:
            raise ValueError(f"the server answers {response.status} {response.reason}.")
        url = urllib.parse.urljoin(url, location)
    raise ValueError("it is redirected too often.")


# Of Azure, which answers its virtual machines there.
_METADATA = ipaddress.ip_address("168.63.129.16")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour or ip.teredo):
        return False  # those that hold an IPv4 address (mapped, 6to4, Teredo, NAT64) may lead anywhere
    return ip.is_global and not ip.is_multicast and ip != _METADATA


_BOMB_FIX = "Shrink the image or, if you trust its source, raise `PIL.Image.MAX_IMAGE_PIXELS`."


def _shorten(source: str | bytes, length: int = 120) -> str:
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return repr(source if len(source) <= length else source[:length] + "...")


def decode_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """A PIL image with its pixels, turned as its EXIF orientation says, as `load_image` and `datasets` turn files.

    PIL opens files lazily, so that errors in the data appear here.

    Raises:
        ValueError: if the image has too many pixels, or its data is damaged.
    """
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if isinstance(image, PIL.ImageFile.ImageFile) and limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"its {image.width}x{image.height} pixels exceed the limit of {limit} against decompression bombs. "
            + _BOMB_FIX
        )
    try:
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        name = getattr(image, "filename", None)
        raise ValueError(
            f"the image file{f' {_shorten(str(name))}' if name else ''} cannot be decoded ({error}). Replace the file, "
            "or set `PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True` to read truncated files as far as they go."
        ) from error
    return image


def to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales 16-bit gray images to 8 bits, with alpha where a gray value is transparent. PIL would clip them to white.

    Raises:
        ValueError: if the mode of the image has no defined range of values.
    """
    if image.mode == "F":
        raise ValueError('PIL mode "F" has no defined range of values. Convert the image to mode "L" or "RGB" first.')
    if not image.mode.startswith("I"):
        return image
    pixels = np.array(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f'PIL mode "{image.mode}" is read as 16-bit gray, but its values are from {pixels.min()} to {pixels.max()}. '
            'Convert the image to mode "L" or "RGB" first.'
        )
    gray = PIL.Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if (hidden := image.info.get("transparency")) is None:
        return gray
    alpha = PIL.Image.fromarray(np.where(pixels == hidden, 0, 255).astype(np.uint8))
    return PIL.Image.merge("LA", (gray, alpha))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A copy of the image in RGB as the image processors read it: upright, on white where it is transparent, 16-bit gray scaled.

    Raises:
        ValueError: if the image cannot be decoded, or its mode has no defined range of values.
    """
    return PIL.Image.fromarray(convert_to_rgb(to_8_bits(decode_image(image)), return_numpy=True))


class AgeVlmImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""
    return_image_sizes (`bool`, *optional*, defaults to `self.return_image_sizes`):
        Whether padded images come with their `image_sizes`.
    """

    return_image_sizes: bool | None


@auto_docstring(
    custom_intro="""
    Base of the image processors of both backends.

    With `do_pad` (the default) an image keeps its aspect ratio. It is resized, up or down, to the largest size that
    fits into `size` (a height and a width in pixels) and padded on the right and at the bottom. The image is at the top
    left, so that pixel (y, x) of the original is at (y * h' / h, x * w' / w) with (h', w') from
    [`~AgeVlmImageProcessorMixin.get_resized_size`]. The padding is zero after normalization. This is the mean color, which
    makes no strong border. Without `do_pad` the image is stretched to `size`.

    Accepted inputs are PIL images, NumPy arrays and PyTorch tensors (`(h, w)`, `(h, w, c)` or `(c, h, w)` with 1, 3 or 4
    channels; `uint8`, floating point in [0, 255], or floating point in [0, 1] with `do_rescale=False`), file paths, URLs
    and base64 strings, alone or in lists that may be nested to any depth. Transparent images are composited on white.
    Files and PIL images are turned upright by their EXIF orientation.

    `preprocess` and `__call__` return a [`~transformers.BatchFeature`] with

    - `pixel_values`, float `(num_images, 3, height, width)`: all images of the batch in order;
    - `image_sizes`, int64 `(num_images, 2)`, with `do_pad` only: the height and the width in pixels of each resized image,
      without its padding. With `return_image_sizes=False` there is none, and the model attends to padding too.

    They raise a `ValueError` for an invalid image. The message has the index of the image and how to fix it.
    """
)
class AgeVlmImageProcessorMixin(BaseImageProcessor):
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 768, "width": 768}
    default_to_square = True
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    return_image_sizes = True
    valid_kwargs = AgeVlmImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    def get_resized_size(
        self,
        height: int,
        width: int,
        size: dict[str, int] | SizeDict | None = None,
        do_resize: bool | None = None,
        do_pad: bool | None = None,
    ) -> tuple[int, int]:
        """The `(height, width)` in pixels of an image of `height` x `width` after resizing and before padding.

        Masks and boxes that are resized to it and then padded on the right and at the bottom to `size` fit the image that
        the model receives. `size`, `do_resize` and `do_pad` default to the settings of the processor.

        Raises:
            ValueError: if the image has no pixels.
        """
        height, width = int(height), int(width)
        if height < 1 or width < 1:
            raise ValueError(f"An image of {height}x{width} pixels (height x width) is empty.")
        if not (self.do_resize if do_resize is None else do_resize):
            return height, width
        size = self.size if size is None else size
        target_height, target_width = int(size["height"]), int(size["width"])
        if not (self.do_pad if do_pad is None else do_pad):
            return target_height, target_width
        # Integer arithmetic that rounds half up gives the same result on every platform, at most the target and at least 1.
        if height * target_width >= width * target_height:
            return target_height, max(1, (2 * width * target_height + height) // (2 * height))
        return max(1, (2 * height * target_width + width) // (2 * width)), target_width

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads paths, URLs and base64 strings into PIL images. Images and the nesting of lists stay unchanged."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        **kwargs,
    ) -> Any:
        """Converts one image to the type of the backend, channels first. See the class for accepted types and errors."""
        if isinstance(image, PIL.Image.Image):
            self.get_resized_size(image.height, image.width)  # raises on empty images
            image = to_8_bits(decode_image(image))
        else:
            image, input_data_format = self._check_array(image, input_data_format, do_rescale)
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, do_rescale=do_rescale, **kwargs
        )

    def _check_array(
        self, image: Any, input_data_format: str | ChannelDimension | None, do_rescale: bool | None
    ) -> tuple[Any, ChannelDimension]:
        """Returns the image with a channel dimension, and which dimension that is."""
        shape = tuple(image.shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"expected 2 or 3 dimensions, got the shape {shape}.")
        if 0 in shape:
            raise ValueError(f"an image of shape {shape} is empty.")
        if len(shape) == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        axes = {None: (0, 2), ChannelDimension.FIRST: (0,), ChannelDimension.LAST: (2,)}
        given_format = None if input_data_format is None else ChannelDimension(input_data_format)
        channels = [image.shape[axis] for axis in axes[given_format]]
        if not set(channels) & {1, 3, 4}:
            raise ValueError(
                f"expected 1 (gray), 3 (RGB) or 4 (RGBA) channels first or last, got the shape {shape}. "
                "Select or merge channels, or fix `input_data_format`."
            )
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        is_tensor = isinstance(image, torch.Tensor)
        if is_tensor:
            is_float, is_uint8 = image.is_floating_point(), image.dtype == torch.uint8
            image = image.detach().cpu() if isinstance(self, PilBackend) else image.detach()
        else:
            is_float, is_uint8 = np.issubdtype(image.dtype, np.floating), image.dtype == np.uint8
            # PyTorch accepts neither flipped views nor read-only arrays.
            image = image if image.flags.c_contiguous and image.flags.writeable else image.copy()
        if is_float:
            image = image.float() if is_tensor else image.astype(np.float32)
            low, high = float(image.min()), float(image.max())
            if not np.isfinite([low, high]).all():
                raise ValueError("the image has values that are NaN or infinite.")
            if do_rescale and low >= 0 and high <= 1:
                logger.warning_once(
                    "The values of an image are in [0, 1] before rescaling, which makes the image almost black. Pass "
                    "`do_rescale=False` if it is rescaled already."
                )
        elif not is_uint8:
            raise ValueError(
                f"expected uint8 or floating point values, got {image.dtype}. Convert the image to uint8."
            )
        return image, ChannelDimension(input_data_format)

    def _prepare_image_like_inputs(self, images: ImageInput, *args, expected_ndims: int = 3, **kwargs) -> list[Any]:
        flat_images = flatten_images(self.fetch_images(images))
        if not flat_images:
            raise ValueError("No images were passed.")
        prepared = []
        for index, image in enumerate(flat_images):
            try:
                prepared.append(self.process_image(image, *args, **kwargs))
            except ValueError as error:
                raise ValueError(f"Image {index} of {len(flat_images)} is invalid: {error}") from error
        return prepared

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:  # type: ignore[override]
        kwargs = super()._standardize_kwargs(**kwargs)
        size = kwargs["size"]
        if size is None or not (size.height and size.width and size.height > 0 and size.width > 0):
            raise ValueError(f'`size` must be {{"height": int, "width": int}}, both positive, got {size}.')
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs) -> None:  # type: ignore[override]
        super()._validate_preprocess_kwargs(**kwargs)
        # With these options the image would not be where `get_resized_size` says, and masks would not fit it.
        if kwargs.get("do_center_crop") or kwargs.get("pad_size"):
            raise ValueError(
                "`do_center_crop` and `pad_size` are not supported: images are resized and padded to `size`."
            )
        needed = [("rescale_factor", True)] if kwargs.get("do_rescale") else []
        needed += [("image_mean", False), ("image_std", True)] if kwargs.get("do_normalize") else []
        for name, nonzero in needed:  # otherwise the pixels would be infinite, NaN or all the same
            values = np.asarray(kwargs[name], np.float32)
            if not np.isfinite(values).all() or (nonzero and not values.all()):
                what = "finite and not 0" if nonzero else "finite"
                raise ValueError(f"`{name}` of the image processor must be {what}, got {kwargs[name]}.")

    def resize(self, image: Any, size: SizeDict, resample: Any = None, **kwargs) -> Any:
        """Resizes `image` `(..., h, w)` to `size`, or to the largest size that fits into its `max_height` and `max_width`."""
        if size.max_height and size.max_width:
            target = SizeDict(height=size.max_height, width=size.max_width)
            height, width = image.shape[-2:]
            height, width = self.get_resized_size(height, width, size=target, do_resize=True, do_pad=True)
            size = SizeDict(height=height, width=width)
        if image.dtype in (torch.uint8, np.dtype(np.uint8)):
            return super().resize(image=image, size=size, resample=resample, **kwargs)  # type: ignore[misc]
        if isinstance(image, np.ndarray) and isinstance(resample, int):
            # The inherited method converts to 8 bits, which turns a floating point image of zeros and ones black.
            channels = [PIL.Image.fromarray(c).resize((size["width"], size["height"]), resample) for c in image]
            resized = np.stack([np.asarray(channel) for channel in channels])
        else:
            resized = super().resize(image=image, size=size, resample=resample, **kwargs)  # type: ignore[misc]
        # Bicubic resampling overshoots at edges. 8-bit images are clipped, so others are clipped too.
        return resized.clip(min(0.0, float(image.min())), 1.0 if image.max() <= 1 else 255.0)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Any],
        size: SizeDict,
        do_pad: bool | None,
        return_image_sizes: bool | None,
        return_tensors: Any,
        disable_grouping: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        resized_size = SizeDict(max_height=size.height, max_width=size.width) if do_pad else size
        kwargs["disable_grouping"] = disable_grouping
        data = super()._preprocess(images, size=resized_size, do_pad=False, return_tensors=None, **kwargs).data
        if do_pad:
            if return_image_sizes:
                data["image_sizes"] = [list(image.shape[-2:]) for image in data["pixel_values"]]
            data["pixel_values"] = self.pad(  # type: ignore[attr-defined]
                data["pixel_values"], pad_size=size, disable_grouping=disable_grouping
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. Its `auto_map`, if any, has the classes of both backends."""
        output = super().to_dict()
        auto_map = output.get("auto_map") or {}
        if "AutoImageProcessor" in auto_map:
            module, name = type(self).__module__.rpartition(".")[2], type(self).__name__.removesuffix("Pil")
            auto_map["AutoImageProcessor"] = {"torchvision": f"{module}.{name}", "pil": f"{module}.{name}Pil"}
        return output


@auto_docstring(custom_intro="The default image processor, with torchvision. See [`AgeVlmImageProcessorMixin`].")
class AgeVlmImageProcessor(AgeVlmImageProcessorMixin, TorchvisionBackend):  # type: ignore[misc]
    pass


@auto_docstring(custom_intro="The image processor with PIL and NumPy. See [`AgeVlmImageProcessorMixin`].")
class AgeVlmImageProcessorPil(AgeVlmImageProcessorMixin, PilBackend):  # type: ignore[misc]
    pass


# A saved processor contains this file, so that it loads without `agevlm`.
AgeVlmImageProcessor.register_for_auto_class()
AgeVlmImageProcessorPil.register_for_auto_class()


__all__ = [
    "AgeVlmImageProcessor",
    "AgeVlmImageProcessorPil",
    "decode_image",
    "flatten_images",
    "load_image",
    "to_8_bits",
    "to_rgb",
]
