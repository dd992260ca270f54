# SPDX-License-Identifier: Apache-2.0
"""The Python of README and docs runs, on tiny parts under the names that the pages use; and so does the notebook."""

import json
import os

import numpy as np
import pytest
from documents import PAGES, ROOT, blocks, name_of
from PIL import Image, ImageDraw
from row_cases import LLAVA, write
from tiny_models import IMAGE_SIZE, tiny_llama, tiny_vision
from tiny_training import dataset, tiny_processor, tiny_trainable
from transformers import AutoImageProcessor, ConvNextImageProcessor

from agevlm import build_scenes

pytestmark = pytest.mark.slow

# Names that stand for something big, and the tiny folder that a test puts in its place.
REPLACED = {
    "meta-llama/Llama-3.2-1B-Instruct": "tiny_llama",
    "timm/convnext_large_mlp.clip_laion2b_ft_soup_320": "tiny_vision",
}
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
NOTEBOOK = ROOT / "examples" / "see_where_it_looks.ipynb"
RECIPE = """
model: my-age-vlm
data: [{path: my_data}]
training: {output_dir: my_run, stage: guide, logging_steps: 1, report_to: none, save_strategy: "no"}
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("parts")
    model, processor = tiny_trainable(), tiny_processor()
    for name in ("demo_output/checkpoint", "my-age-vlm"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    llama = tiny_llama(vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id)
    llama.save_pretrained(folder / "tiny_llama")
    processor.tokenizer.save_pretrained(folder / "tiny_llama")
    tiny_vision().save_pretrained(folder / "tiny_vision")
    ConvNextImageProcessor().save_pretrained(folder / "tiny_vision")
    AutoImageProcessor.from_pretrained(folder / "tiny_vision")  # whether it can be read

    noise = np.random.default_rng(0).integers(0, 255, (240, 200, 3), dtype=np.uint8)
    for name in ("demo_output/example.png", "street.jpg"):
        Image.fromarray(noise).save(folder / name)
    dataset(8).save_to_disk(folder / "my_data")
    (folder / "photographs").mkdir()
    Image.fromarray(noise).save(folder / "photographs" / "a.png")
    write(folder / "llava.json", [{**LLAVA[0], "image": "a.png"}])
    (folder / "my_recipe.yaml").write_text(RECIPE, encoding="utf-8")

    (folder / "cutouts").mkdir()
    (folder / "backgrounds").mkdir()
    for number, name in enumerate(("apple", "dog", "key")):
        cutout = Image.new("RGBA", (60, 60))
        ImageDraw.Draw(cutout).ellipse((2, 2, 57, 57), fill=(80 * number, 200, 90, 255))
        cutout.save(folder / "cutouts" / f"{name}.png")
        Image.new("RGB", (80, 80), (40 * number,) * 3).save(folder / "backgrounds" / f"{number}.png")
    sizes = {"num_train": 2, "num_validation": 2, "num_test": 4, "image_size": 2 * IMAGE_SIZE, "max_objects": 2}
    build_scenes(folder / "cutouts", folder / "backgrounds", folder / "my_scenes", progress=False, **sizes)
    return folder


@pytest.fixture
def world(parts, own_cache, tmp_path, monkeypatch):
    """An empty folder to work in, in which the names of the pages are there."""
    for name in os.listdir(parts):
        (tmp_path / name).symlink_to(parts / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_of_a_page_runs(page, world):
    """All blocks of a page in one session, in the order of the page."""
    if any('save_to_disk("my_data")' in block for block in blocks(page, "python")):
        (world / "my_data").unlink()
    namespace: dict = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python")):
        for name, tiny in REPLACED.items():
            block = block.replace(name, tiny)
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), namespace)
    if "attention" in namespace:
        assert (world / "dog.png").is_file()
        assert namespace["attention"].maps.shape[:2] == (4, 1)
    if "report" in namespace:
        assert (namespace["report"].rows, namespace["report"].bad_rows) == (1, 0)
    if "evaluation" in namespace:
        assert set(namespace["evaluation"].scores) >= {"existence", "pointing"}
        assert (world / "outputs" / "scenes" / "results.json").is_file()


def test_pages_with_python_are_found():
    assert {name_of(page) for page in WITH_PYTHON} >= {
        "README.md",
        *(f"docs/{name}.md" for name in ("quickstart", "data", "training", "evaluation", "attention")),
    }


def test_notebook_runs(world, monkeypatch):
    monkeypatch.setenv("AGEVLM_CHECKPOINT", "demo_output/checkpoint")
    namespace: dict = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), namespace)
    assert namespace["attention"].maps.shape[:2] == (4, 2)  # blocks, phrases
    assert set(namespace["strongest"]) == {"dog", "key"}
    # The tiny model has no sink, so that all of the attention is on the image.
    assert all(share == pytest.approx(1, abs=1e-3) for share in namespace["on_image"].values())
    assert Image.open("dog.png").width > Image.open("dog.png").height
    assert Image.open("phrases.png").width > 0


def test_notebook_is_stripped():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
