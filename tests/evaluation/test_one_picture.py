# SPDX-License-Identifier: Apache-2.0
"""A picture has the same pixels on every path from its file to a model, a mask teacher, a scene or a figure."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command_line import run
from datasets import Dataset
from datasets import Image as ImageFeature
from evaluation_cases import age_vlm, as_parquet_folder, pope_rows, write_lines
from grounded_rows import BoxTeacher, make_dataset, make_row
from PIL import Image

import agevlm
from agevlm import AgeVlmImageProcessor, attend
from agevlm.data.check import check_dataset
from agevlm.data.features import compute_features
from agevlm.data.masks import add_masks
from agevlm.data.scene_builder import _load_backgrounds
from agevlm.evaluation import Pope
from agevlm.evaluation.answers import Question, answer
from agevlm.evaluation.similarity import text_pairs
from agevlm.inference.generation import open_image
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessorPil, load_image, to_rgb

GRAY = np.random.default_rng(0).integers(0, 256, (9, 6), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
PICTURE = Image.fromarray(GRAY)
COLORS = Image.merge("RGB", [PICTURE, PICTURE.rotate(180), Image.new("L", PICTURE.size, 90)])
WHITE = np.full((*GRAY.shape, 3), 255, np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image = image.convert("LA" if image.mode == "L" else "RGBA")
    image.putalpha(alpha)
    return image


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(COLORS, kind, exif=exif)


def reread(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


TRUE_PIXELS = {
    # Copies of one gray picture, of 8 and of 16 bits.
    "8 bits": (encoded(PICTURE), rgb(PICTURE)),
    "16 bits": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)), rgb(PICTURE)),
    "16 bits, big-endian": (
        encoded(Image.frombytes("I;16B", PICTURE.size, (GRAY.astype(">u2") * 257).tobytes()), "TIFF"),
        rgb(PICTURE),
    ),
    "32 bits": (encoded(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), rgb(PICTURE)),
    "16 bits a color": (cv2.imencode(".png", GRAY.astype(np.uint16)[..., None].repeat(3, -1) * 257)[1].tobytes(), rgb(PICTURE)),
    "with an opaque alpha": (encoded(with_alpha(PICTURE, 255)), rgb(PICTURE)),
    "palette of grays": (encoded(PICTURE.convert("P")), rgb(PICTURE)),
    # Hidden colors.
    "transparent": (encoded(with_alpha(COLORS, 0)), WHITE),
    "transparent gray": (encoded(with_alpha(PICTURE, 0)), WHITE),
    "transparent palette": (encoded(PICTURE.point(lambda value: 3).convert("P"), transparency=3), WHITE),
    "a transparent color": (encoded(Image.new("RGB", PICTURE.size, (9, 8, 7)), transparency=(9, 8, 7)), WHITE),
    "half transparent": (encoded(with_alpha(PICTURE, 128)), np.rint(rgb(PICTURE) * (128 / 255) + 127).astype(np.uint8)),
    # Other modes.
    "1 bit": (encoded(PICTURE.point(lambda value: 255 * (value > 99), "1")), 255 * (rgb(PICTURE) > 99).astype(np.uint8)),
    "CMYK": (encoded(COLORS.convert("CMYK"), "TIFF"), rgb(COLORS)),
    # As a camera that is held upright writes them.
    "turned JPEG": (turned("JPEG", 6), rgb(reread(turned("JPEG", 1)).transpose(Image.Transpose.ROTATE_270))),
    "turned PNG": (turned("PNG", 8), rgb(COLORS.transpose(Image.Transpose.ROTATE_90))),
    "mirrored PNG": (turned("PNG", 2), rgb(COLORS.transpose(Image.Transpose.FLIP_LEFT_RIGHT))),
}  # fmt: skip

SAME = [name for name, (_, pixels) in TRUE_PIXELS.items() if np.array_equal(pixels, rgb(PICTURE))]


@pytest.fixture(scope="module")
def model():
    return age_vlm()


@pytest.fixture(params=TRUE_PIXELS)
def file(request, tmp_path) -> tuple[Path, np.ndarray]:
    """A file, and the pixels `(height, width, 3)` that are right."""
    data, pixels = TRUE_PIXELS[request.param]
    path = tmp_path / "picture"  # without a suffix: the content counts
    path.write_bytes(data)
    return path, pixels


def sources(path: Path) -> list:
    """The forms in which a picture comes: a path, bytes, an opened file, an image that is loaded already."""
    stored = Dataset.from_list([{"image": {"bytes": path.read_bytes(), "path": None}}]).cast_column(
        "image", ImageFeature()
    )
    return [str(path), path, Image.open(path), load_image(path), load_image(path.read_bytes()), stored[0]["image"]]


def row(image, box=(1, 1, 12, 12)) -> dict:
    return make_row(image, ("a dog", list(box), None))


def test_the_processor_reads_every_form_of_a_picture_alike(file, model):
    path, pixels = file
    for backend in (AgeVlmImageProcessor, AgeVlmImageProcessorPil):
        processor = backend(size={"height": 32, "width": 32})
        expected = processor(Image.fromarray(pixels), return_tensors="pt")
        for source in sources(path):
            found = processor(source, return_tensors="pt")
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=0.02 if "pixel" in name else 0, rtol=0)
    messages = [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "Dog?"}]}]
    found = model[1].apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    expected = model[1].image_processor(Image.fromarray(pixels), return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=0.02, rtol=0)


def test_training_sees_it_and_its_masks_fit(file, model, tmp_path):
    path, pixels = file
    collator = AgeVlmDataCollator(model[1], grid=(4, 4))
    box = (0, 0, 12, 30)
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    expected = collator(
        [make_row(Image.fromarray(pixels), ("a dog", list(box), agevlm.processing.rows.mask_to_rle(mask)))]
    )
    assert expected["map_targets"].any()
    for source in sources(path):
        grounded = make_row(Image.fromarray(pixels), ("a dog", list(box), agevlm.processing.rows.mask_to_rle(mask)))
        found = collator([grounded | {"images": [source]}])
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=0.02, rtol=0)
        for name in ("image_sizes", "map_targets", "map_queries"):
            assert torch.equal(found[name], expected[name]), name
    stored = Dataset.from_list([{"image": {"bytes": path.read_bytes(), "path": None}}]).cast_column(
        "image", ImageFeature()
    )
    features = compute_features(*model, [stored], tmp_path / "features", progress=False)
    for source in (stored[0]["image"], load_image(path)):
        assert torch.isfinite(features([source])["last_hidden_state"]).all()


def test_teachers_and_scenes_see_it(file, tmp_path):
    path, pixels = file
    seen = []

    class Teacher(BoxTeacher):
        def masks(self, images, prompts):
            seen.extend(images)
            return super().masks(images, prompts)

    stored = {"bytes": path.read_bytes(), "path": None}
    rows = make_dataset([make_row(Image.fromarray(pixels), ("0.9", [1, 1, 12, 12], None))])
    rows = rows.map(lambda row: {"images": [stored]}, features=rows.features)
    masked, _ = add_masks(rows, Teacher(), tmp_path / "masked", progress=False)
    assert [image.mode for image in seen] == ["RGB"]
    np.testing.assert_allclose(seen[0], pixels, atol=1)
    assert masked[0]["grounding"][0]["mask"]["size"] == list(pixels.shape[:2])
    problems = [str(problem) for problem in check_dataset(masked).problems]
    assert not problems, problems

    folder = tmp_path / "backgrounds"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    for image in _load_backgrounds(folder, 64).values():
        np.testing.assert_allclose(image, pixels, atol=1)


def test_evaluation_sees_it(file, model, tmp_path):
    path, pixels = file
    rows = [
        {"images": [{"bytes": path.read_bytes(), "path": None}], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for text in ("a dog", "a cat")
    ]  # fmt: skip
    from datasets import List

    data = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
    pairs, load = text_pairs(data)
    images = [load(pairs[0].image), open_image(path), to_rgb(Image.open(path))]

    lines = write_lines(tmp_path / "coco_pope_random.json", [{**pope_rows("random")[0], "image": path.name}])
    images.append(Pope(lines, path.parent).questions()[0].open_image())
    table = Dataset.from_list(
        [{"question": "?", "answer": "yes", "category": "random", "image": {"bytes": path.read_bytes(), "path": None}}]
    ).cast_column("image", ImageFeature())
    images.append(Pope(as_parquet_folder(table, tmp_path / "table")).questions()[0].open_image())
    images.append(attend(*model, Image.open(path), "Is there a dog?", "Yes").image)
    for image in images:
        assert image.mode == "RGB"
        np.testing.assert_allclose(image, pixels, atol=1)


def test_copies_of_8_and_16_bits_have_exactly_the_same_pixels():
    assert len(SAME) == 7
    for name in SAME:
        data, pixels = TRUE_PIXELS[name]
        np.testing.assert_array_equal(to_rgb(load_image(data)), pixels, err_msg=name)
        np.testing.assert_array_equal(to_rgb(Image.open(io.BytesIO(data))), pixels, err_msg=name)


def test_the_command_line_answers_as_python_does(monkeypatch, capsys, tmp_path):
    model, processor = age_vlm()
    words = [
        token for token in range(len(processor.tokenizer)) if processor.tokenizer.decode([token]).strip().isalpha()
    ]
    model.generation_config.suppress_tokens = sorted(set(range(len(processor.tokenizer))).difference(words))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    answers = []
    for name in ("8 bits", "16 bits", "transparent", "turned PNG"):
        data, pixels = TRUE_PIXELS[name]
        (tmp_path / "picture").write_bytes(data)
        command = ["ask", "--model", tmp_path / "model", "--image", tmp_path / "picture", "Is there a dog?"]
        code, printed = run(monkeypatch, capsys, *command, "--max-new-tokens", 6)
        assert code == 0, printed
        for image in (Image.fromarray(pixels), Image.open(tmp_path / "picture")):
            question = Question("q", lambda image=image: image, "Is there a dog?")
            (found,) = answer(model, processor, [question], max_new_tokens=6, progress=None).values()
            assert printed.startswith(found["answer"] + "\n")
        answers.append(found["answer"])
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3, "the answers depend on the picture, so that a difference would show"


def test_values_without_a_range_are_refused_everywhere(tmp_path, model):
    path = tmp_path / "picture.tiff"
    path.write_bytes(encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"))
    for read in (
        lambda: open_image(path),
        lambda: to_rgb(Image.open(path)),
        lambda: model[1].image_processor(str(path)),
        lambda: AgeVlmDataCollator(model[1])([row(PICTURE) | {"images": [str(path)]}]),
        lambda: attend(*model, Image.open(path), "Dog?", "Yes"),
        lambda: Question("q", lambda: Image.open(path), "?").open_image(),
    ):
        with pytest.raises(ValueError, match='mode "F"'):
            read()


def test_no_other_conversion_is_in_the_code():
    """Pillow's own conversion to RGB knows neither 16 bits nor transparency nor EXIF."""
    root = Path(agevlm.__file__).parent.parent
    folders = (
        *(
            "agevlm",
            "modeling_agevlm",
            "processing",
            "hub_cards",
            "data",
            "inference",
            "trainer",
            "evaluation",
            "serving",
        ),
        *("research", "examples"),
    )
    files = [file for folder in folders for file in (root / folder).rglob("*") if file.suffix in (".py", ".ipynb")]
    assert len(files) > 40
    found = [
        str(file) for file in files if re.search(r"convert\(\\?[\"']RGB\\?[\"']\)", file.read_text(encoding="utf-8"))
    ]
    assert found == []
