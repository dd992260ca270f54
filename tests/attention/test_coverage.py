# SPDX-License-Identifier: Apache-2.0
"""Where image tokens lie, against each processor's arithmetic written out, and against what the tokens of models react to."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import IMAGE, tiny_tokenizer
from tiny_processors import PLACEHOLDERS, tiny_processor
from tiny_vlms import CONFIGURATIONS, tiny_vlm
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Idefics3ImageProcessorPil,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    MllamaImageProcessorPil,
    PreTrainedModel,
    ProcessorMixin,
)

from agevlm.attention import check_places, count_image_tokens, image_tokens, tile_grid, token_boxes, token_coverage
from agevlm.processing import AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.processing.collator import mask_coverage

KINDS = list(CONFIGURATIONS)
SIDE, PATCH = 224, 14
# Height and width: landscape, portrait, extreme, a little more than a tile, small, and large.
SIZES = [(480, 640), (640, 427), (150, 1000), (1000, 300), (100, 230), (40, 40), (900, 1200)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def grid_of(kind: str, side: int = SIDE, patch: int = PATCH) -> tuple[int, int] | None:
    return (side // patch, side // patch) if kind == "mllama" else None


def view(left: float, top: float, right: float, bottom: float, rows: int, columns: int) -> np.ndarray:
    """The boxes of equal tokens, row by row."""
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    return np.array([[x[j], y[i], x[j + 1], y[i + 1]] for i in range(rows) for j in range(columns)])


def tiled(size: tuple[int, int], rows: int, columns: int, side: int, token: int) -> list[np.ndarray]:
    """The boxes of the tiles of an image that is stretched to rows x columns of them."""
    (height, width), n = size, side // token
    y, x = height / rows, width / columns
    return [view(j * x, i * y, (j + 1) * x, (i + 1) * y, n, n) for i in range(rows) for j in range(columns)]


def expected_boxes(
    kind: str, size: tuple[int, int], side: int = SIDE, patch: int = PATCH, tiles: int = 4
) -> np.ndarray:
    """By each processor's own arithmetic. Boxes of tokens that show only padding are zeros."""
    height, width = size
    whole = view(0, 0, width, height, side // patch, side // patch)
    merged = view(0, 0, width, height, side // patch // 2, side // patch // 2)
    if kind == "llava":  # the shortest edge becomes `side`, and the middle is kept
        short = min(size)
        resized = [side if edge == short else int(side * edge / short) for edge in size]
        top, left = ((edge - side) // 2 for edge in resized)
        y, x = height / resized[0], width / resized[1]
        n = side // patch
        return view(left * x, top * y, (left + side) * x, (top + side) * y, n, n)
    if kind in ("smolvlm", "idefics3"):
        long = round(tiles**0.5) * side
        if width >= height:
            columns = math.ceil(long / side)
            narrow = int(long / (width / height))
            rows = math.ceil((narrow + narrow % 2) / side)
            ratio = long / (narrow + narrow % 2)
            rows = math.ceil(int(columns * side / ratio) / side)
        else:
            rows = math.ceil(long / side)
            narrow = int(long * (width / height))
            ratio = (narrow + narrow % 2) / long
            columns = math.ceil(int(rows * side * ratio) / side)
        return np.concatenate([*tiled(size, rows, columns, side, 2 * patch), merged])
    if kind.startswith("qwen"):
        factor, least, most = 2 * patch, side**2, tiles * side**2
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (max(1, math.floor(edge / shrink / factor)) for edge in size)
        elif rows * columns * factor**2 < least:
            grow = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(edge * grow / factor) for edge in size)
        return view(0, 0, width, height, rows, columns)
    if kind == "gemma3":
        return merged
    if kind == "paligemma":
        return whole
    if (
        kind == "internvl"
    ):  # the grid with the nearest proportions; a larger one of the same if it is not twice the image
        grids = [(r, c) for r in range(1, tiles + 1) for c in range(1, tiles + 1) if r * c <= tiles]
        best = min(abs(width / height - c / r) for r, c in grids)
        near = sorted((r * c, r, c) for r, c in grids if abs(width / height - c / r) == best)
        rows, columns = near[0][1:]
        for count, r, c in near[1:]:
            if height * width > 0.5 * side**2 * count:
                rows, columns = r, c
        views = tiled(size, rows, columns, side, 2 * patch)
        return np.concatenate([*views, merged] if len(views) > 1 else views)
    # mllama: of the canvases of one or two tiles the one that the image fits best, filled from its top left
    canvases = [(1, 1), (1, 2), (2, 1)]
    scales = [min(r * side / height, c * side / width) for r, c in canvases]
    enlarging = [s for s in scales if s >= 1]
    scale = min(enlarging) if enlarging else max(scales)
    rows, columns = min((r * c, r, c) for (r, c), s in zip(canvases, scales, strict=True) if s == scale)[1:]
    target = min(max(height, side), rows * side), min(max(width, side), columns * side)
    y, x = target[0] / height, target[1] / width
    if x < y:
        resized = min(math.floor(height * x) or 1, target[0]), target[1]
    else:
        resized = target[0], min(math.floor(width * y) or 1, target[1])
    y, x, n = height / resized[0], width / resized[1], side // patch
    boxes = np.concatenate(
        [
            view(j * side * x, i * side * y, (j + 1) * side * x, (i + 1) * side * y, n, n)
            for i in range(rows)
            for j in range(columns)
        ]
    )
    padding = (boxes[:, 0] > width - 1e-6) | (boxes[:, 1] > height - 1e-6)
    return np.where(padding[:, None], 0, boxes)


def covered(mask: np.ndarray, boxes: np.ndarray, points: int = 40) -> np.ndarray:
    """The share of points, spread evenly in each box, at which the mask is true."""
    height, width = mask.shape
    at = (np.arange(points) + 0.5) / points
    left, top, right, bottom = (edge[:, None] for edge in boxes.T)
    x, y = np.floor(left + at * (right - left)).astype(int), np.floor(top + at * (bottom - top)).astype(int)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    found = mask[y.clip(0, height - 1)[:, :, None], x.clip(0, width - 1)[:, None]] & inside
    return found.mean((1, 2)) * (right > left)[:, 0]


def disk(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def shapes(size: tuple[int, int]) -> np.ndarray:
    """A disk, a rectangle, a slope and scattered dots."""
    height, width = size
    rng = np.random.default_rng(0)
    rectangle = np.zeros(size, bool)
    rectangle[height // 3 : height // 2, width // 5 : width // 2] = True
    slope = np.add.outer(np.arange(height) / height, np.arange(width) / width) < 0.8
    dots = np.any([disk(size, *rng.uniform(0, (width, height)), min(size) / 10) for _ in range(8)], axis=0)
    return np.stack([disk(size, width * 0.6, height * 0.4, min(size) / 4), rectangle, slope, dots])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_and_coverage_are_those_of_the_arithmetic_of_each_processor(kind, size):
    processor, grid = tiny_processor(kind, SIDE, PATCH), grid_of(kind)
    wanted = expected_boxes(kind, size)
    boxes = token_boxes(processor, size, grid=grid)
    assert boxes.dtype == torch.float32
    assert boxes.shape == wanted.shape
    assert count_image_tokens(processor, [size], grid=grid) == [len(wanted)]
    token = np.abs(wanted[:, 2:] - wanted[:, :2]).max(0)
    assert np.abs(boxes.numpy() - wanted).max() < 0.03 * token.max()
    assert (np.abs(boxes.numpy() - wanted) <= 0.1 * np.tile(token, 2)).all()

    masks = shapes(size)
    coverage = token_coverage(processor, masks, grid=grid)
    assert coverage.dtype == torch.float32
    assert coverage.shape == (len(masks), len(wanted))
    assert coverage.min() >= 0
    assert coverage.max() <= 1
    for mask, found in zip(masks, coverage.numpy(), strict=True):
        independent = covered(mask, wanted)
        assert independent.std() == 0 or np.corrcoef(independent, found)[0, 1] >= 0.999
        assert np.abs(independent - found).max() < 0.05


def test_a_disk_that_moves_moves_the_tokens_it_covers(kind):
    size = (420, 560)
    processor, grid = tiny_processor(kind, SIDE, PATCH), grid_of(kind)
    wanted, seen = expected_boxes(kind, size), set()
    places = [(x, y) for x in np.linspace(90, 470, 6) for y in np.linspace(30, 390, 5)]
    masks = np.stack([disk(size, x, y, 12) for x, y in places])
    for (x, y), found in zip(places, token_coverage(processor, masks, grid=grid), strict=True):
        left, top, right, bottom = wanted[found.argmax()]
        assert left - 1 <= x <= right + 1
        assert top - 1 <= y <= bottom + 1
        seen.add(int(found.argmax()))
    assert len(seen) == len(places)


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (300, 300), (400, 1300), (1300, 400)], ids=str)
def test_pan_and_scan(size):
    processor = tiny_processor("gemma3", SIDE, PATCH)
    settings = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 100,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    long, short = max(size), min(size)
    crops = min(3, max(2, min(long // 100, math.floor(long / short + 0.5)))) if long / short >= 1.2 else 0
    (height, width), n = size, SIDE // PATCH // 2
    views = [view(0, 0, width, height, n, n)]
    for i in range(crops):
        length = math.ceil(long / crops)
        begin, end = i * length, min((i + 1) * length, long)
        box = (begin, 0, end, height) if width > height else (0, begin, width, end)
        views.append(view(*box, n, n))
    wanted = np.concatenate(views)
    boxes = token_boxes(processor, size, **settings).numpy()
    assert boxes.shape == wanted.shape
    assert np.abs(boxes - wanted).max() < 1
    masks = shapes(size)
    for mask, found in zip(masks, token_coverage(processor, masks, **settings).numpy(), strict=True):
        assert np.corrcoef(covered(mask, wanted), found)[0, 1] >= 0.999
    assert len(token_boxes(processor, size)) == n * n


def test_padding_is_not_covered_and_has_no_box():
    processor = tiny_processor("llava", SIDE, PATCH)
    image_processor = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.image_processor = image_processor
    height, _ = size = (300, 640)  # 170 pixels of padding above and below
    n = SIDE // PATCH
    wanted = view(0, -170, 640, 470, n, n)
    hidden = (wanted[:, 3] <= 0) | (wanted[:, 1] >= height)
    assert hidden.any()
    boxes = token_boxes(processor, size).numpy()
    assert (boxes[hidden] == 0).all()
    assert np.abs(boxes - wanted)[~hidden].max() < 0.5
    inside = (np.minimum(wanted[:, 3], height) - np.maximum(wanted[:, 1], 0)).clip(0) / (640 / n)
    coverage = token_coverage(processor, np.ones((1, *size), bool))[0].numpy()
    assert np.abs(coverage - inside).max() < 0.01


def test_what_is_left_over_beside_the_patches_has_no_token():
    boxes = token_boxes(tiny_processor("paligemma", 384, 14), (192, 768)).numpy()  # 27 patches of 14 pixels
    assert np.abs(boxes - view(0, 0, 2 * 378, 378 / 2, 27, 27)).max() < 0.3


def test_tiny_images_of_tiny_processors(kind):
    processor, grid = tiny_processor(kind), grid_of(kind, 16, 4)
    for size in [(1, 1), (2, 3), (7, 5), (17, 17)]:
        boxes = token_boxes(processor, size, grid=grid)
        assert boxes.isfinite().all()
        wanted = expected_boxes(kind, size, 16, 4, 2 if kind == "mllama" else 4)
        if min(size) > 3:
            assert np.abs(boxes.numpy() - wanted).max() < 0.35
        full = token_coverage(processor, np.ones((1, *size), bool), grid=grid)[0]
        assert full[(boxes[:, 2] > boxes[:, 0])].min() > 0.1


def reacting_vlm(kind: str, processor: ProcessorMixin) -> PreTrainedModel:
    model = tiny_vlm(kind, processor=processor)
    if kind == "gemma3":
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros until it is trained
        mix_less(model)
    return model


def mix_less(model: PreTrainedModel) -> None:
    """Few patches of a vision tower without training attend to each other more than to themselves."""
    for name, weight in model.model.vision_tower.named_parameters():
        if name.endswith("self_attn.out_proj.weight"):
            weight.data *= 0.1


def embedded_images(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What the text model gets for the image tokens of the first row."""
    found = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.update(kwargs)

    with model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        model(**inputs)
    embedded = found.get("cross_attention_states")
    keys = image_tokens(model, inputs).keys[0]
    return (found["inputs_embeds"][0] if embedded is None else embedded.flatten(0, -2))[keys]


def noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(size[0]).integers(0, 255, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (100, 60)], ids=str)
def test_tokens_of_models_react_to_what_is_in_their_boxes(kind, size):
    processor = tiny_processor(kind)
    model = reacting_vlm(kind, processor)
    grid = tile_grid(model)
    assert (grid is None) == (kind != "mllama")
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16} if kind == "gemma3" else {}
    boxes = token_boxes(processor, size, grid=grid, **settings)

    def run(pixels: np.ndarray) -> torch.Tensor:
        picture = PIL.Image.fromarray(pixels)
        inputs = processor(
            text=[PLACEHOLDERS[kind] + "a dog"], images=[[picture]], padding=True, return_tensors="pt", **settings
        )
        return embedded_images(model, inputs)

    pixels = noise(size)
    before = run(pixels)
    assert len(before) == len(boxes)
    view_size = {"llava": 16, "paligemma": 16, "mllama": 16}.get(kind, len(boxes) if kind.startswith("qwen") else 4)
    for token, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
        if right <= left:
            continue
        changed = pixels.copy()
        changed[max(top, 0) : bottom, max(left, 0) : right] = 255 * (token % 2)
        reaction = (run(changed) - before).norm(dim=-1)
        first = token // view_size * view_size
        assert first + reaction[first : first + view_size].argmax() == token


def test_images_of_a_text_follow_each_other(kind):
    processor = tiny_processor(kind)
    model = reacting_vlm(kind, processor)
    sizes = [(64, 96), (40, 40), (100, 30)]
    counts = count_image_tokens(processor, sizes, grid=tile_grid(model))

    def run(images: list[np.ndarray]) -> torch.Tensor:
        text = "a".join([PLACEHOLDERS[kind]] * 3)
        pictures = [PIL.Image.fromarray(pixels) for pixels in images]
        return embedded_images(model, processor(text=[text], images=[pictures], padding=True, return_tensors="pt"))

    images = [noise(size) for size in sizes]
    before = run(images).split(counts)
    for number in range(3):
        changed = [255 - pixels if i == number else pixels for i, pixels in enumerate(images)]
        after = run(changed).split(counts)
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)]
        assert same == [i != number for i in range(3)]


@pytest.mark.parametrize("do_pad", [True, False])
def test_coverage_of_age_vlm_is_that_of_its_own_collator(do_pad):
    size = {"height": SIDE, "width": SIDE}
    processor = AgeVlmProcessor(AgeVlmImageProcessor(size=size, do_pad=do_pad), tiny_tokenizer(), IMAGE)
    for image_size in SIZES[:5]:
        masks = shapes(image_size)
        found = token_coverage(processor, masks, grid=(14, 14))
        for mask, coverage in zip(masks, found, strict=True):
            assert (coverage - mask_coverage(mask, (14, 14), processor.image_processor)).abs().max() < 0.03


def test_each_image_size_is_measured_once(monkeypatch):
    processor = tiny_processor("gemma3", SIDE, PATCH)
    calls = []
    original = type(processor).__call__

    def count(self, *args, **kwargs):
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", count)
    first = token_boxes(processor, (40, 90))
    number = len(calls)
    token_coverage(processor, np.ones((2, 40, 90), bool))
    assert torch.equal(token_boxes(processor, (40, 90)), first)
    assert len(calls) == number > 0
    assert len(token_boxes(processor, (40, 90), do_pan_and_scan=True, pan_and_scan_min_crop_size=16)) > len(first)
    processor.image_processor.size = {"height": 2 * SIDE, "width": 2 * SIDE}
    token_boxes(processor, (40, 90))
    assert len(calls) == 3 * number


def test_no_masks_and_masks_of_other_shapes():
    processor = tiny_processor("llava")
    assert token_coverage(processor, np.zeros((0, 40, 60), bool)).shape == (0, 16)
    with pytest.raises(ValueError, match="height, width"):
        token_coverage(processor, np.zeros((40, 60), bool))


class Turned(CLIPImageProcessor):
    """Does what no box can tell."""

    turn = "flip"

    def _preprocess(self, images, **kwargs):
        turns = {
            "flip": lambda x: x.flip(-1),
            "transpose": lambda x: x.transpose(-1, -2),
            "gray": lambda x: x.float().mean(-3, keepdim=True).expand(-1, 3, -1, -1).to(x.dtype),
            "mirror": lambda x: torch.cat([x, x.flip(-1)], dim=-1),
        }
        return super()._preprocess([turns[self.turn](image[None])[0] for image in images], **kwargs)


@pytest.mark.parametrize("turn", ["flip", "transpose", "gray", "mirror"])
def test_image_processors_that_do_more_are_refused(turn):
    processor = tiny_processor("llava", SIDE, PATCH)
    processor.image_processor = Turned(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor.image_processor.turn = turn
    with pytest.raises(ValueError, match=r"LlavaProcessor.*(does more than|changes the colors)"):
        token_boxes(processor, (300, 400))


def test_unknown_layouts_are_refused():
    llava = tiny_processor("llava")
    llava.vision_feature_select_strategy = "full"  # keeps the class token
    with pytest.raises(ValueError, match="17 tokens do not fill 1 tiles"):
        token_boxes(llava, (40, 60))
    with pytest.raises(ValueError, match="pass `grid`"):
        token_boxes(tiny_processor("mllama"), (40, 60))
    llava = tiny_processor("llava")
    images = LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]])
    following = LlavaOnevisionProcessor(images, llava.tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=16)
    with pytest.raises(ValueError, match=r"LlavaOnevisionProcessor.*ends of lines"):
        token_boxes(following, (40, 60))


def llava_next(side: int, patch: int, grids: list[tuple[int, int]]) -> LlavaNextProcessor:
    size, tokenizer = {"height": side, "width": side}, tiny_processor("llava").tokenizer
    images = LlavaNextImageProcessor(
        size=size, crop_size=size, image_grid_pinpoints=[[r * side, c * side] for r, c in grids]
    )
    return LlavaNextProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_llava_next(size):
    grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    processor = llava_next(SIDE, PATCH, grids)
    (height, width), n = size, SIDE // PATCH
    # Of the canvases the one that keeps most of the image's pixels, then the one that wastes least.
    scales = [min(r * SIDE / height, c * SIDE / width) for r, c in grids]
    kept = [min(int(height * s) * int(width * s), height * width) for s in scales]
    wasted = [r * c * SIDE**2 - k for (r, c), k in zip(grids, kept, strict=True)]
    _, _, rows, columns, scale = min(
        (-k, w, r, c, s) for k, w, (r, c), s in zip(kept, wasted, grids, scales, strict=True)
    )
    # The image is in the middle of it. Patches that show only padding are left out.
    shown_height, shown_width = (
        min(math.ceil(edge * scale), most * SIDE) for edge, most in zip(size, (rows, columns), strict=True)
    )
    y, x = height / shown_height, width / shown_width
    top, left = (rows * SIDE - shown_height) // 2, (columns * SIDE - shown_width) // 2
    boxes = token_boxes(processor, size).numpy()
    assert np.abs(boxes[: n * n] - view(0, 0, width, height, n, n)).max() < 0.03 * max(size) / n
    lines = view(-left * x, -top * y, (columns * SIDE - left) * x, (rows * SIDE - top) * y, rows * n, columns * n)
    lines = lines.reshape(rows * n, columns * n, 4)
    rest = boxes[n * n :]
    # As many on both sides as fit into the padding, by the whole patches that the image would fill.
    spare = columns * n - int(width * rows * n / height), rows * n - int(height * columns * n / width)
    if spare[0] > 0:
        lines = lines[:, spare[0] // 2 : columns * n - spare[0] // 2]
    elif spare[1] > 0:
        lines = lines[spare[1] // 2 : rows * n - spare[1] // 2]
    rest = rest.reshape(len(lines), -1, 4)
    assert rest.shape[1] == lines.shape[1] + 1
    assert (rest[:, -1] == 0).all()  # the end of a line
    wanted = lines * ((lines[..., 2:] > 1e-6) & (lines[..., :2] < (width - 1e-6, height - 1e-6))).all(
        -1, keepdims=True
    )
    assert np.abs(rest[:, :-1] - wanted).max() < 0.05 * PATCH * max(x, y) + 0.05
    mask = shapes(size)[0]
    found = token_coverage(processor, mask[None])[0].numpy()
    assert np.corrcoef(covered(mask, boxes), found)[0, 1] >= 0.999


def test_tokens_of_llava_next_react_to_what_is_in_their_boxes():
    processor = llava_next(16, 4, [(1, 2), (2, 1)])
    tokenizer, given = processor.tokenizer, CONFIGURATIONS["llava"]
    torch.manual_seed(0)
    config = LlavaNextConfig(
        text_config={**given["text_config"], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config=given["vision_config"],
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_layer=-1,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    mix_less(model)
    boxes = token_boxes(processor, (64, 100))

    def run(pixels: np.ndarray) -> torch.Tensor:
        picture = PIL.Image.fromarray(pixels)
        return embedded_images(model, processor(text=["<image>a dog"], images=[picture], return_tensors="pt"))

    pixels = noise((64, 100))
    before = run(pixels)
    assert len(before) == len(boxes) == 16 + 4 * (6 + 1)
    for token, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
        changed = pixels.copy()
        if right <= left:
            assert token >= 16
            assert (run(255 - pixels)[token] == before[token]).all()
            continue
        changed[max(top, 0) : bottom, max(left, 0) : right] = 255 * (token % 2)
        reaction = (run(changed) - before).norm(dim=-1)
        views = [slice(0, 16), slice(16, None)]
        assert any(reaction[part].argmax() + (part.start or 0) == token for part in views)


def test_models_whose_tokens_have_places(kind):
    check_places(tiny_vlm(kind))


@pytest.mark.parametrize("name", ["idefics2", "blip-2", "instructblip", "kosmos-2", "aria"])
def test_models_whose_tokens_have_no_place_are_refused(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))
    with pytest.raises(ValueError, match=f"{type(model).__name__} makes its image tokens of learned queries"):
        check_places(model)


def test_both_backends_have_the_same_places():
    for kind, pil in (("idefics3", Idefics3ImageProcessorPil), ("mllama", MllamaImageProcessorPil)):
        processor, grid = tiny_processor(kind, SIDE, PATCH), grid_of(kind)
        boxes = token_boxes(processor, (480, 640), grid=grid)
        settings = processor.image_processor.to_dict()
        processor.image_processor = pil(
            **{key: settings[key] for key in ("size", "max_image_size", "max_image_tiles") if key in settings}
        )
        assert (token_boxes(processor, (480, 640), grid=grid) - boxes).abs().max() < 0.2
