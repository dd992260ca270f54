# SPDX-License-Identifier: Apache-2.0
"""The demo: with tiny parts all of it, with the real parts what is shipped, and as a slow test the whole run."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from tiny import IMAGE, tiny_tokenizer
from tiny_models import tiny_llama, tiny_vision

from agevlm import AgeVlmForConditionalGeneration
from agevlm.build import build_checkpoint, load_timm
from agevlm.cli.commands import app
from agevlm.data import build_scenes
from agevlm.deltas import TRAINED_FILE, save_trained
from agevlm.evaluation import evaluate_scenes
from agevlm.evaluation.answers import Question
from agevlm.files import resolve_package_file
from agevlm.hub import load_processor
from agevlm.inference.generation import load_model
from agevlm.trainer.stages import group_parameters
from research.assets.openmoji import export_openmoji, export_photographs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
demo = importlib.import_module("demo")

CLASSES = "apple,banana,bicycle,bird,book,car,chair,dog"
SMALL = [
    *("--scenes", "6", "--test-scenes", "3", "--steps", "20", "--max-questions", "4", "--examples", "4"),
    *("--classes", CLASSES),
]


def trained_parameters(model: AgeVlmForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """What the demo's stages train."""
    groups = group_parameters(model)
    trained = ("adapter", "cross_attention", "vision_last_block")
    return {name: parameter for group in trained for name, parameter in groups[group].items()}


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory):
    """Options of `agevlm build` for tiny parts, and a delta of them."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    tiny_vision().save_pretrained(folder / "vision")
    template = demo.EXAMPLES / "recipes" / "demo" / "chat_template.jinja"
    options = ["--text", folder / "text", "--vision", folder / "vision", "--image-size", "64", "--image-token", IMAGE]
    options += ["--chat-template", template, "--visual-position-embedding", "--cross-attention-sink"]
    app([*map(str, ["build", *options, "--out", folder / "model"])], standalone_mode=False)
    model = AgeVlmForConditionalGeneration.from_pretrained(folder / "model")
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            torch.nn.init.constant_(parameter, 0.5)
    with torch.no_grad():
        for parameter in group_parameters(model)["vision_last_block"].values():
            parameter.add_(0.5)
    metadata = {"classes": CLASSES}
    save_trained(model, folder / "delta", load_processor(folder / "model"), dtype=torch.bfloat16, metadata=metadata)
    return options, folder / "delta"


@pytest.fixture(scope="module")
def commands():
    """The commands that the demo has run."""
    return []


@pytest.fixture(scope="module")
def play(tiny_parts, commands):
    """Runs the demo on the tiny parts; its `agevlm` commands run in this process."""

    def run(*command: str | Path) -> None:
        words = [str(word) for word in command]
        commands.append(words[1:])
        if "--delta" in words:  # the shipped one finds its parts in packages
            words += map(str, tiny_parts[0][:4])
        if words[0] == str(demo.AGEVLM):
            app(words[1:], standalone_mode=False)
        else:
            subprocess.run(words, check=True)

    def play(*options: str | Path) -> None:
        commands.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "run", run)
            patch.setattr(demo, "PARTS", tiny_parts[0])
            patch.setattr(sys, "argv", ["demo.py", *SMALL, *map(str, options)])
            demo.main()

    return play


@pytest.fixture(scope="module")
def output(play, tiny_parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    play("--output-dir", folder, "--weights", tiny_parts[1])
    return folder


# ---------------------------------------------------------------------------------------- the commands


def test_the_demo_is_agevlm_commands(output, commands):
    named = [" ".join(words[:2]) if words[0] == "eval" else Path(words[0]).name for words in commands]
    assert named[:5] == ["openmoji.py", "scenes", "build", "ask", "eval scenes"]
    assert named[5:9] == ["build", "scenes", "train", "eval scenes"]
    assert set(named[9:]) == {"attention"}


def test_commands_are_printed_as_they_can_be_copied(capsys):
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", '{"a": [3]}', "two words", "<x>", "y" * 90]
    demo.run(*command)
    printed = capsys.readouterr().out
    assert printed.startswith("\n$ ")
    assert all(len(line) < 140 for line in printed.splitlines())
    assert shlex.split(printed[3:].replace("\\\n", " ")) == command


def test_a_command_that_fails_ends_the_demo():
    with pytest.raises(SystemExit) as ended:
        demo.run(sys.executable, "-c", "raise SystemExit(3)")
    assert ended.value.code == 3


# ---------------------------------------------------------------------------------------- what it leaves


def check_report(output: Path) -> None:
    """The report shows all pictures there are of the training and the questions, and all scores."""
    report = (output / "report.html").read_text()
    shown = set(re.findall(r"src='([^']+)'", report))
    assert all((output / name).is_file() for name in shown)
    there = {path.relative_to(output).as_posix() for path in (output / "questions").rglob("*.png")}
    drawn = {name for name in there if name.endswith("attention.png")}
    assert drawn
    assert drawn | {"own_run/training.png"} <= shown
    # Each heat map of the shipped weights is shown beside that of the own run; a picture alone where no phrase is named.
    own = {name for name in drawn if "_own_run/" in name}
    assert {name.replace("own_run", "checkpoint") for name in own} == drawn - own
    questions = {name[: len("questions/00")] for name in shown if name.startswith("questions/")}
    assert report.count("<section>") == len(questions)
    for name in ("checkpoint", "own_run"):
        scores = json.loads((output / "examination" / name / "results.json").read_text())["scores"]
        assert {"existence", "objects", "relation", "pointing"} <= scores.keys()
        assert all(f"<td>{row['score']:.2f}</td>" in report for row in scores.values())
        assert all(f"<td>{row['chance']:.2f}" in report for row in scores.values())


def test_the_report_shows_what_there_is(output):
    check_report(output)


def test_the_own_run_went_through_all_stages(output):
    record = json.loads((output / "own_run" / "training.json").read_text())
    stages = [stage["name"] for stage in record["recipe"]["stages"]]
    assert stages == ["align", "adapt_vision", "guide", "instruct"]
    assert [folder.name for folder in sorted((output / "own_run").glob("?_*"))] == [
        f"{number}_{name}" for number, name in enumerate(stages, 1)
    ]
    guided = {entry["stage"] for entry in record["log_history"] if "guidance_loss" in entry}
    assert guided == {"guide", "instruct"}
    steps = [entry["step"] for entry in record["log_history"] if "lm_loss" in entry]
    assert steps == sorted(steps)
    assert steps[-1] == 20


def test_the_own_run_was_trained_and_its_frozen_parts_were_not(output):
    before = AgeVlmForConditionalGeneration.from_pretrained(output / "checkpoint")
    after = AgeVlmForConditionalGeneration.from_pretrained(output / "own_run" / "4_instruct")
    trained = trained_parameters(after)
    for name, value in after.state_dict().items():
        if name not in trained:
            assert torch.equal(value, before.state_dict()[name]), name
    assert all(value != 0 for name, value in trained.items() if name.endswith(".gate"))
    untrained = tiny_vision().to(before.dtype).state_dict()
    tower = {name: value for name, value in trained.items() if "vision_tower" in name}
    assert any(not torch.equal(value, untrained[name.split("vision_tower.")[1]]) for name, value in tower.items())


def test_the_checkpoint_is_the_shipped_model(output, tiny_parts):
    model, shipped = (
        AgeVlmForConditionalGeneration.from_pretrained(output / "checkpoint"),
        load_file(tiny_parts[1] / TRAINED_FILE),
    )
    assert all(torch.equal(p.bfloat16(), shipped[name]) for name, p in trained_parameters(model).items())


def test_the_checkpoint_is_asked_as_in_training(output):
    processor = load_model(output / "checkpoint")[1]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"{processor.image_token}Hi\n"


def test_only_the_shipped_weights_are_asked(play, tiny_parts, commands, tmp_path):
    (tmp_path / "out").mkdir()
    play("--output-dir", tmp_path / "out", "--weights", tiny_parts[1], "--steps", "0")
    assert not any(words[0] == "train" for words in commands)
    assert not (tmp_path / "out" / "own_run").exists()
    report = (tmp_path / "out" / "report.html").read_text()
    assert "shipped weights" in report
    assert "your run" not in report


def test_examples_are_the_first_of_each_kind():
    asked = [
        Question(key, lambda: None, key, expected, kind, source)
        for key, expected, kind, source in [
            ("a", "No", "existence", "0"),
            ("b", "Yes", "existence", "0"),
            ("c", "Yes", "existence", "0"),
            ("d", "Yes", "existence", "1"),
            ("e", "left", "relation", "0"),
            ("f", "left", "relation", "2"),
            ("g", "dog", "objects", "3"),
            ("h", "3", "count", "4"),
        ]
    ]
    # Not of a scene that another question shows already.
    assert [question.key for question in demo.choose_examples(asked, 10)] == ["b", "d", "f", "g"]


# ---------------------------------------------------------------------------------------- mistakes


def test_a_folder_that_no_demo_wrote_is_left_alone(play, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="choose another --output-dir"):
        play("--output-dir", tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_stopped_demo_starts_over(play, tmp_path, monkeypatch):
    (tmp_path / ".agevlm-demo").touch()
    (tmp_path / "held_out_scenes").mkdir()
    (tmp_path / "held_out_scenes" / "half").touch()
    (tmp_path / "mine.png").touch()
    with pytest.raises(SystemExit, match="nothing to ask"):
        play("--output-dir", tmp_path, "--weights", tmp_path / "missing", "--steps", "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".agevlm-demo", "mine.png"]


@pytest.mark.parametrize("steps", ["0", "20"])
@pytest.mark.parametrize("problem", ["was trained without anchor, bell", "No such file", "is not a safetensors file"])
def test_weights_that_do_not_fit_are_named_and_not_used(
    problem, steps, play, tiny_parts, tmp_path, capsys, monkeypatch
):
    def train(*_):
        raise RuntimeError("training begins")

    monkeypatch.setattr(demo, "train", train)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / TRAINED_FILE).write_text("no weights")
    weights = {"No such file": tmp_path / "missing", "is not a safetensors file": tmp_path / "damaged"}
    options = ["--output-dir", tmp_path / "output", "--steps", steps]
    options += ["--weights", weights.get(problem, tiny_parts[1])]
    if "anchor" in problem:
        options += ["--classes", "anchor,bell,car,dog,bird,book,chair"]
    expected = (SystemExit, "nothing to ask") if steps == "0" else (RuntimeError, "training begins")
    with pytest.raises(expected[0], match=expected[1]):
        play(*options)
    assert problem in capsys.readouterr().out
    assert not (tmp_path / "output" / "checkpoint").exists()


# ---------------------------------------------------------------------------------------- the real parts


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    export_openmoji(folder / "cutouts", demo.CLASSES.split(","))
    export_photographs(folder / "backgrounds")
    return folder


def held_out_scenes(assets: Path, folder: Path, train: int, test: int):
    settings = {"num_validation": 1, "image_size": 256, "max_objects": 6, "seed": 0, "progress": False}
    assert demo.SCENES == ["--validation", "1", "--image-size", "256", "--max-objects", "6", "--seed", "0"]
    scenes = build_scenes(
        assets / "cutouts", assets / "backgrounds", folder, num_train=train, num_test=test, **settings
    )
    return scenes["test"]


def test_held_out_scenes_are_the_same_however_many_are_trained_on(assets, tmp_path):
    first, second = (held_out_scenes(assets, tmp_path / f"{train}", train, 3) for train in (1, 4))
    assert first["messages"] == second["messages"]
    pairs = zip(first["images"], second["images"], strict=True)
    assert all(np.array_equal(*(np.asarray(image) for (image,) in pair)) for pair in pairs)


def test_shipped_weights_answer_about_held_out_scenes(assets, tmp_path):
    dtype = str(demo.fastest_dtype())[len("torch.") :]
    command = ["build", "--delta", demo.WEIGHTS, "--dtype", dtype, "--out", tmp_path / "checkpoint"]
    app([*map(str, command)], standalone_mode=False)
    demo.check_weights(demo.WEIGHTS, demo.CLASSES.split(","))
    scenes = held_out_scenes(assets, tmp_path / "scenes", 1, 6)
    scenes = scenes.filter(lambda kind: kind == "existence", input_columns="kind")
    evaluation = evaluate_scenes(tmp_path / "checkpoint", data=scenes, limit=24, progress=None, max_new_tokens=4)
    assert evaluation.scores["existence"]["questions"] == 24
    assert evaluation.scores["existence"]["score"] >= 0.8
    assert evaluation.scores["pointing"]["score"] >= 0.8


def test_the_last_block_is_one_that_the_image_goes_through(tmp_path):
    """The tower ends with the features that are used: otherwise what the stages call its last block would learn nothing."""
    arguments = json.loads(demo.PARTS[demo.PARTS.index("--vision-args") + 1])
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    vision = load_timm("tf_efficientnet_lite0", **arguments)
    model, processor = build_checkpoint(
        str(tmp_path / "text"), vision, tmp_path / "model", image_token=IMAGE, image_size=64
    )
    for block in model.model.language_model.cross_attn.values():
        torch.nn.init.constant_(block.gate, 0.5)
    inputs = processor(images=Image.new("RGB", (64, 64), "red"), text=processor.image_token, return_tensors="pt")
    model(**inputs).logits.sum().backward()
    last = {name: p for name, p in trained_parameters(model).items() if "vision_tower" in name}
    assert last
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in last.values())


def test_efficientnet_weights_recognize_photographs():
    """Named by order alone, the weights must still know a cat and a cup of coffee when they see them."""
    file = resolve_package_file(demo.PARTS[demo.PARTS.index("--vision-weights") + 1])
    tower = load_timm("tf_efficientnet_lite0", file, by_order=True).timm_model  # gives what the classifier reads
    weight, bias = list(torch.load(file, weights_only=True).values())[-2:]
    for name, words in (("chelsea.png", ("cat",)), ("coffee.png", ("espresso", "cup", "coffee"))):
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((224, 224))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            best = int((tower(pixels) @ weight.T + bias).argmax())
        assert any(word in ImageNetInfo().index_to_description(best) for word in words)


# ---------------------------------------------------------------------------------------- all of it


@pytest.mark.minutes
@pytest.mark.timeout(3600)
def test_the_whole_demo(tmp_path):
    output = tmp_path / "demo_output"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, ROOT / "examples" / "demo.py", "--output-dir", output]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    check_report(output)
    scores = {
        name: json.loads((output / "examination" / name / "results.json").read_text())["scores"]
        for name in ("checkpoint", "own_run")
    }
    assert scores["checkpoint"]["existence"]["score"] >= 0.95
    assert scores["checkpoint"]["pointing"]["score"] >= 0.95
    # A short run learns where to look before it learns to answer.
    assert scores["own_run"]["pointing"]["score"] > 2 * scores["own_run"]["pointing"]["chance"]
    (asked,) = re.findall(r"\n\$ (\S+agevlm ask (?:.|\\\n)+?)\n(?!  )", result.stdout)
    again = subprocess.run(
        asked.replace("\\\n", " "), shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().splitlines()[-1] in ("Yes", "Yes.")
