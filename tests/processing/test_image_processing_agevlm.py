# SPDX-License-Identifier: Apache-2.0
"""Image processors: Transformers' common tests, then what AGE-VLM adds."""

import base64
import io
import unittest
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny import register_processors
from transformers_tests import load
from web_server import serve

from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil, load_image, to_rgb

common = load("test_image_processing_common")
BACKENDS = {"torchvision": AgeVlmImageProcessor, "pil": AgeVlmImageProcessorPil}
register_processors()


class AgeVlmImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 48, "width": 64})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        # The original derives them from the name of the folder.
        return BACKENDS


class AgeVlmImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    # Left to Transformers' own conditions: `test_can_compile_torchvision_backend` (slow, needs an accelerator), and
    # `test_image_processor_preprocess_arguments` and `test_override_instance_attributes...`, which skip themselves for
    # all processors of the current design.
    image_processor_tester_class = AgeVlmImageProcessingTester
    test_cast_dtype = True

    @unittest.skip("Loads in a process where nothing is registered, without remote code; see test_remote_code.")
    def test_pil_can_run_without_torchvision(self):
        pass


class AgeVlmImageProcessingStretchTest(AgeVlmImageProcessingTest):
    """The same tests for the processor that neither keeps the aspect ratio nor pads."""

    # The test's images are white noise, on which bicubic resampling overshoots most. Measured on 400 of them, torchvision
    # and PIL differed by up to 16 of 255 levels in 13 (bilinear: 1 level at most; bicubic in one direction only, too).
    backend_equivalence_atol = 0.3

    class image_processor_tester_class(AgeVlmImageProcessingTester):  # noqa: N801
        def __init__(self, parent, **kwargs):
            super().__init__(parent, do_pad=False, **kwargs)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def processor(request):
    return request.param(size={"height": 40, "width": 60})


def picture(height=30, width=50, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def restore(processor, pixel_values):
    """8-bit pixels `(h, w, 3)` of normalized ones `(3, h, w)`."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((pixel_values.permute(1, 2, 0) * std + mean) * 255).round().numpy()


def test_defaults(processor):
    processor = type(processor)()
    assert processor.size == {"height": 768, "width": 768}
    outputs = processor(picture(), return_tensors="pt")
    assert outputs.pixel_values.shape == (1, 3, 768, 768)
    assert outputs.pixel_values.dtype == torch.float32
    assert outputs.image_sizes.shape == (1, 2)
    assert outputs.image_sizes.dtype == torch.int64
    assert set(outputs) == set(processor.model_input_names)


def test_padding_is_at_the_right_and_bottom_in_the_mean_color(processor):
    tall, wide = processor([picture(80, 40), picture(20, 90)], return_tensors="pt").values()
    (pixels, sizes), images = (tall, wide), [(80, 40), (20, 90)]
    for pixel_values, size, (h, w) in zip(pixels, sizes, images, strict=True):
        height, width = processor.get_resized_size(h, w)
        assert size.tolist() == [height, width]
        assert height * width < 40 * 60
        shown = (pixel_values != 0).any(0)
        assert shown[:height, :width].all()
        assert shown.sum() == height * width


def test_a_batch_carries_two_numbers_an_image_beside_its_pixels(processor):
    batch = processor([picture(3, 5)] * 32, size={"height": 64, "width": 64}, return_tensors="pt")
    assert batch.pixel_values.shape == (32, 3, 64, 64)
    assert sum(tensor.nbytes for name, tensor in batch.items() if name != "pixel_values") == 32 * 2 * 8


def test_the_settings_and_not_the_images_decide_whether_there_are_sizes(processor):
    """So batches of one processor have the same inputs, and may be joined."""
    fitting, padded = picture(40, 60), picture(40, 40)
    for images in ([fitting], [padded], [fitting, padded]):
        assert set(processor(images, return_tensors="pt")) == {"pixel_values", "image_sizes"}
        assert set(processor(images, return_image_sizes=False, return_tensors="pt")) == {"pixel_values"}
    assert processor([fitting, padded], return_tensors="np").image_sizes.tolist() == [[40, 60], [40, 40]]


def test_image_content_is_where_the_geometry_says(processor):
    """A white square on black, found again at its coordinates scaled by the geometry."""
    image = np.zeros((100, 80, 3), np.uint8)
    image[20:60, 40:70] = 255
    pixels = restore(processor, processor(image, return_tensors="pt").pixel_values[0])
    height, width = processor.get_resized_size(100, 80)
    bright = np.argwhere(pixels[:height, :width, 0] > 127)
    (top, left), (bottom, right) = bright.min(0), bright.max(0) + 1
    expected = [20 * height / 100, 40 * width / 80, 60 * height / 100, 70 * width / 80]
    np.testing.assert_allclose([top, left, bottom, right], expected, atol=0.6)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (40, 60, (40, 60)),
        (20, 30, (40, 60)),  # enlarged
        (400, 60, (40, 6)),
        (100, 600, (10, 60)),
        (7, 5, (40, 29)),  # 28.57
        (100_000, 1, (40, 1)),  # not 0
        (1, 100_000, (1, 60)),
        (np.uint8(200), np.uint8(255), (40, 51)),  # no overflow of small integer types
    ],
)
def test_get_resized_size(processor, height, width, expected):
    assert processor.get_resized_size(height, width) == expected
    image = np.zeros((3, int(height), int(width)), np.uint8)
    assert processor(image, return_tensors="pt").image_sizes.tolist() == [list(expected)]


def test_get_resized_size_keeps_the_aspect_ratio_and_fits(processor):
    for height, width in np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist():
        new_height, new_width = processor.get_resized_size(height, width)
        assert (new_height == 40 and new_width <= 60) or (new_width == 60 and new_height <= 40)
        scale = min(Fraction(40, height), Fraction(60, width))
        assert abs(new_height - max(1, height * scale)) <= Fraction(1, 2)
        assert abs(new_width - max(1, width * scale)) <= Fraction(1, 2)


def test_get_resized_size_follows_the_options(processor):
    assert processor.get_resized_size(10, 10, do_pad=False) == (40, 60)
    assert processor.get_resized_size(10, 11, do_resize=False) == (10, 11)
    assert processor.get_resized_size(10, 10, size={"height": 100, "width": 50}) == (50, 50)
    with pytest.raises(ValueError, match="empty"):
        processor.get_resized_size(0, 10)


def test_without_padding_images_are_stretched(processor):
    outputs = processor([picture(80, 40), picture(20, 90)], do_pad=False, return_tensors="pt")
    assert set(outputs) == {"pixel_values"}
    assert outputs.pixel_values.shape == (2, 3, 40, 60)
    assert (outputs.pixel_values[:, :, -1, -1] != 0).any(1).all()


def test_without_resizing_images_are_only_padded(processor):
    image = picture(30, 50)
    outputs = processor(image, do_resize=False, return_tensors="pt")
    pixels = restore(processor, outputs.pixel_values[0])
    np.testing.assert_array_equal(pixels[:30, :50], np.array(image))
    assert outputs.image_sizes.tolist() == [[30, 50]]


def test_nested_lists_are_flattened_in_order(processor):
    colors = [0, 50, 100, 150, 200]
    images = [Image.new("RGB", (60, 40), (c, c, c)) for c in colors]
    nested = [[images[0]], [], [np.array(images[1]), images[2]], np.stack([np.array(i) for i in images[3:]])]
    pixel_values = processor(nested, return_tensors="pt").pixel_values
    assert [restore(processor, p)[0, 0, 0] for p in pixel_values] == colors


def test_backends_agree_on_all_kinds_of_images(tmp_path):
    smooth = picture(12, 20).resize((200, 120), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "image.jpg")
    images = [
        smooth,
        np.array(smooth),
        np.array(smooth.convert("L")),
        torch.from_numpy(np.array(smooth)).permute(2, 0, 1),
        np.array(smooth).astype(np.float32),
        torch.from_numpy(np.array(smooth)).bfloat16(),
        str(tmp_path / "image.jpg"),
        smooth.resize((20, 12)),
    ]
    a, b = (cls(size={"height": 64, "width": 64})(images, return_tensors="pt") for cls in BACKENDS.values())
    assert torch.equal(a.image_sizes, b.image_sizes)
    torch.testing.assert_close(a.pixel_values, b.pixel_values, atol=0.1, rtol=1e-3)
    assert (a.pixel_values - b.pixel_values).abs().mean() < 5e-3


def test_floats_are_clipped_like_8_bit_images(processor):
    """Bicubic resampling overshoots at edges."""
    image = np.zeros((10, 10, 3), np.uint8)
    image[:, 5:] = 255
    expected = processor(image, return_tensors="pt").pixel_values
    for given, options in [(image.astype(np.float32), {}), (image / 255, {"do_rescale": False})]:
        actual = processor(given, return_tensors="pt", **options).pixel_values
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_pil_modes(processor, mode):
    gray = Image.new("L", (60, 40), 102)  # a color of the web palette
    if mode.startswith("I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(np.full((40, 60), 102 * 257, dtype))
        assert image.mode == mode
    else:
        image = gray.convert("RGB").convert(mode)
    pixels = restore(processor, processor(image, return_tensors="pt").pixel_values[0])
    if mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    else:
        np.testing.assert_allclose(pixels, 102, atol=3)
        np.testing.assert_allclose(np.asarray(to_rgb(image)), 102, atol=3)


def test_transparency_is_composited_on_white_however_the_image_comes(processor, tmp_path):
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 30, 40))
    image.save(tmp_path / "image.png")
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((50, 20))
    sources = [
        image,
        np.array(image),
        torch.from_numpy(np.array(image)),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        encoded,
        f"data:image/png;base64,{encoded}",
        palette,
    ]
    for pixel_values in processor(sources, return_tensors="pt").pixel_values:
        pixels = restore(processor, pixel_values)
        np.testing.assert_allclose(pixels[20, 10], (200, 0, 0), atol=1)
        np.testing.assert_allclose(pixels[20, 50], (255, 255, 255), atol=1)


def test_a_transparent_gray_value_of_16_bits_is_white(processor, tmp_path):
    gray = np.random.default_rng(0).integers(2, 200, (40, 60), np.uint8)
    gray[10:30] = 1
    Image.fromarray(gray).save(tmp_path / "8.png", transparency=1)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    deep.info["transparency"] = 257  # as Pillow reads it from a file; it writes none
    (expected,), (found,) = (
        processor(image, return_tensors="pt").pixel_values for image in (tmp_path / "8.png", deep)
    )
    assert torch.equal(found, expected)
    assert (np.asarray(to_rgb(deep))[10:30] == 255).all()


def test_files_are_turned_upright(processor, tmp_path):
    image = picture(30, 50)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    size = {"size": {"height": 50, "width": 50}, "return_tensors": "pt"}
    upright = processor(image.transpose(Image.Transpose.ROTATE_270), **size)
    assert torch.equal(processor(str(tmp_path / "image.png"), **size).pixel_values, upright.pixel_values)


def test_files_and_their_bytes_are_one_image(tmp_path):
    image = picture(30, 50)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    data = (tmp_path / "image.png").read_bytes()
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), data):
        loaded = load_image(source)
        assert loaded.tobytes() == upright.tobytes()
        assert loaded.size == upright.size
    with pytest.raises(ValueError, match=r"Cannot read image of \d+ bytes: .*truncated"):
        load_image(data[: len(data) // 2])


def test_urls(processor):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    with serve({"/image.png": buffer.getvalue()}) as (port, _):
        actual = processor(f"http://127.0.0.1:{port}/image.png", return_tensors="pt").pixel_values
        assert torch.equal(actual, processor(picture(), return_tensors="pt").pixel_values)
        with pytest.raises(ValueError, match=r"missing\.png.*404"):
            processor(f"http://127.0.0.1:{port}/missing.png")


def test_views_and_read_only_arrays(processor):
    image = np.array(picture())
    flipped = image[:, :, ::-1]
    expected = processor(flipped.copy(), return_tensors="pt").pixel_values
    assert torch.equal(processor(flipped, return_tensors="pt").pixel_values, expected)
    read_only = np.asarray(picture())
    read_only.flags.writeable = False
    assert processor(read_only, return_tensors="pt").pixel_values.shape == (1, 3, 40, 60)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((30, 50, 2), np.uint8), r"Image 1 of 2.*channels.*\(30, 50, 2\)"),
        (torch.zeros(5, 30, 50, dtype=torch.uint8), r"Image 1 of 2.*channels.*\(5, 30, 50\)"),
        (np.zeros((30,), np.uint8), r"Image 1 of 2.*dimensions"),
        (np.zeros((0, 50, 3), np.uint8), r"Image 1 of 2.*empty"),
        (Image.new("RGB", (0, 5)), r"Image 1 of 2.*empty"),
        (np.zeros((30, 50, 3), np.uint16), r"Image 1 of 2.*uint16.*Convert"),
        (torch.zeros(3, 30, 50, dtype=torch.int64), r"Image 1 of 2.*int64.*Convert"),
        (np.full((30, 50, 3), np.nan), r"Image 1 of 2.*NaN"),
        (Image.new("F", (5, 5)), r'Image 1 of 2.*mode "F".*Convert'),
        (Image.fromarray(np.full((5, 5), 70_000, np.int32)), r"Image 1 of 2.*70000.*Convert"),
    ],
)
def test_bad_images_raise(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor([picture(), image])


def test_bad_channels_raise_also_where_the_format_is_given(processor):
    with pytest.raises(ValueError, match="channels"):
        processor(np.zeros((3, 30, 50), np.uint8), input_data_format="channels_last")


def test_damaged_files_raise(processor, tmp_path):
    picture(100, 100).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"truncated.png'.*Replace the file"):
        processor([str(tmp_path / "good.png"), str(tmp_path / "truncated.png")])
    with Image.open(tmp_path / "truncated.png") as image, pytest.raises(ValueError, match=r"Image 1 of 2.*truncated"):
        processor([picture(), image])
    with pytest.raises(ValueError, match=r"text.png'.*intact image"):
        processor(str(tmp_path / "text.png"))
    with pytest.raises(ValueError, match=r"missing.png'.*path"):
        processor(str(tmp_path / "missing.png"))
    with pytest.raises(TypeError):
        processor([None])
    with pytest.raises(ValueError, match="No images"):
        processor([])


def test_truncated_files_can_be_allowed(processor, tmp_path, monkeypatch):
    picture(100, 100).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert len(processor(str(tmp_path / "truncated.jpg")).pixel_values) == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [50 * 30 - 1, 50 * 30 // 3], ids=["warning", "error"])
def test_decompression_bombs_raise(processor, tmp_path, monkeypatch, limit):
    picture(30, 50).save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"image\.png'.*decompression bomb.*MAX_IMAGE_PIXELS"):
        processor(str(tmp_path / "image.png"))
    with image, pytest.raises(ValueError, match=r"Image 0 of 1.*decompression bomb.*MAX_IMAGE_PIXELS"):
        processor(image)
    assert len(processor(picture()).pixel_values) == 1  # created in memory, so no bomb


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 10}, {"height": 0, "width": 10}, {"max_height": 5, "max_width": 5}]
)
def test_bad_sizes_raise(processor, size):
    with pytest.raises(ValueError, match="size"):
        type(processor)(size=size)
    with pytest.raises(ValueError, match="size"):
        processor(picture(), size=size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_std", [0.5, 0.0, 0.5]), ("image_std", [1e-300] * 3),
        ("image_mean", [float("nan")] * 3), ("image_mean", [None, 0, 0]), ("rescale_factor", 0),
    ],
)  # fmt: skip
def test_settings_that_give_no_finite_pixels_raise(processor, name, value):
    """A checkpoint that was saved with them is refused where it is asked."""
    with pytest.raises(ValueError, match=f"`{name}` of the image processor must be"):
        type(processor)(**{name: value})(picture())
    type(processor)(**{name: value}, do_rescale=False, do_normalize=False)(picture())


def test_options_that_break_the_geometry_raise(processor):
    with pytest.raises(ValueError, match="do_center_crop"):
        processor(picture(), do_center_crop=True, crop_size={"height": 5, "width": 5})
    with pytest.raises(ValueError, match="pad_size"):
        processor(picture(), pad_size={"height": 500, "width": 500})
