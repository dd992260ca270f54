# SPDX-License-Identifier: Apache-2.0
"""`agevlm train`: mistakes, overrides, several stages, several processes. Whole runs of the 1B recipes are in test_published_recipes.py."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tiny_training import dataset, rows, tiny_processor, tiny_trainable
from training_runs import train_recipe

import agevlm
from agevlm import cli
from agevlm.data.mixture import DataPart, read_mixture
from agevlm.plots import draw_training
from agevlm.processing.rows import message_text
from agevlm.trainer import AgeVlmTrainer, optimizer
from agevlm.trainer.recipe import cache_features, load_model, load_recipe, training_arguments
from agevlm.trainer.stages import PRESETS, group_parameters

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes" / "age_vlm_1b").glob("[1-4]_*.yaml"))
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
# What no machine of the tests has: eight GPUs, time, and cores for workers.
SMALL = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.dataloader_num_workers=0",
    "training.logging_steps=1",
    "training.save_steps=2",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A freshly assembled model with its processor, and data sets of every form, in one folder."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_trainable(gate=0.0).bfloat16().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(12).save_to_disk(folder / "rows")

    examples = [row for row in rows(12) if len(row["images"]) < 2]
    (folder / "images").mkdir()
    entries = []
    for i, row in enumerate(examples):
        question, answer = map(message_text, row["messages"])
        entries.append(
            {"id": str(i), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        )
        if row["images"]:
            row["images"][0].save(folder / "images" / f"{i}.png")
            entries[i] |= {"image": f"{i}.png"}
            entries[i]["conversations"][0]["value"] = f"<image>\n{question}"
    (folder / "llava.json").write_text(json.dumps(entries))

    columns = {
        "id": [entry["id"] for entry in entries],
        "conversations": [entry["conversations"] for entry in entries],
        "image": [row["images"][0] if row["images"] else None for row in examples],
    }
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "conversations": datasets.List(turn), "image": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder / "llava_hub")

    # As on the Hub: several configurations, so that one must be named.
    texts = [dict(zip(("user", "assistant"), map(message_text, row["messages"]), strict=True)) for row in examples]
    cauldron = {
        "images": [row["images"] for row in examples],
        "texts": [[{**text, "source": "here"}] for text in texts],
    }
    turn = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    (folder / "cauldron").mkdir()
    datasets.Dataset.from_dict(cauldron, features=features).to_parquet(folder / "cauldron" / "vqav2.parquet")
    names = "".join(f"- config_name: {name}\n  data_files: vqav2.parquet\n" for name in ("vqav2", "other"))
    (folder / "cauldron" / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    return folder


def paths(recipe: Path, parts: Path) -> list[str]:
    """Overrides that lead each part of a recipe's data to a tiny data set: rows with masks for COCO's."""
    overrides = []
    for i, part in enumerate(load_recipe(recipe).data):
        if part.format == "coco":
            overrides += [f"data.{i}.path={parts / 'rows'}", f"data.{i}.format=rows", f"data.{i}.images=null"]
            continue
        name = {"cauldron": "cauldron"}.get(part.format, "llava.json" if part.images else "llava_hub")
        overrides.append(f"data.{i}.path={parts / name}")
        if part.images:
            overrides.append(f"data.{i}.images={parts / 'images'}")
    return overrides


def run(*arguments: str | Path) -> None:
    """`agevlm train …`, in this process."""
    sys_argv, sys.argv = sys.argv, ["agevlm", "train", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = sys_argv


def fails(capsys, *arguments: str | Path) -> str:
    """What `agevlm train …` says when it refuses."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2
    assert "Traceback" not in message
    return message


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def recipe(parts, tmp_path):
    """A small recipe in a file."""
    values = {
        "model": str(parts / "model"),
        "model_args": {"dtype": "float32"},
        "data": [{"path": str(parts / "rows")}],
        "training": {"output_dir": str(tmp_path / "out"), "stage": "guide", "max_steps": 2, "use_cpu": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# --- the four stages ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_follow_each_other(path):
    """Each starts from the former's output, and its size is said for 8 GPUs."""
    recipe, number = load_recipe(path), RECIPES.index(path)
    former = load_recipe(RECIPES[number - 1]).training["output_dir"] if number else "outputs/age-vlm-1b/0_assembled"
    assert recipe.model == former
    args = training_arguments(recipe)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == (256, 256, 128, 128)[number]
    if recipe.training["stage"] == "guide":
        masked, other = recipe.data
        assert masked.rows / (masked.rows + other.rows) == 0.1


# --- recipes as files ---


def test_numbers_and_booleans_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: [{path: d}]\n"
        "training: {output_dir: o, stage: align, learning_rate: 1e-4, weight_decay: 0.0001, bf16: true, save_strategy: no}\n"
    )
    training = load_recipe(
        path, ["training.adam_epsilon=1E-8", "training.max_grad_norm=.5", "training.warmup_steps=1.5e+2"]
    ).training
    assert (training["learning_rate"], training["weight_decay"]) == (0.0001, 0.0001)
    assert (training["adam_epsilon"], training["max_grad_norm"], training["warmup_steps"]) == (1e-8, 0.5, 150.0)
    assert training["save_strategy"] == "no"
    args = training_arguments(load_recipe(path))
    assert (args.learning_rate, args.save_strategy, args.bf16) == (0.0001, "no", True)
    assert args.use_cpu == (not torch.accelerator.is_available())


def test_overrides(recipe):
    changed = load_recipe(
        recipe,
        [
            "model=other/model",
            "model_args.dtype=bfloat16",
            "data.0.path=there=here",
            "data.0.rows=7",
            "eval_data=[{path: a}, {path: b, split: test}]",
            "training.group_learning_rates.adapter=1e-3",
            "training.guided_layers=[1, 3]",
            "training.stage=[adapter]",
        ],
    )
    assert (changed.model, changed.model_args.dtype) == ("other/model", "bfloat16")
    assert changed.data == [DataPart("there=here", rows=7)]
    assert changed.eval_data == [DataPart("a"), DataPart("b", split="test")]
    assert changed.training["group_learning_rates"] == {"adapter": 0.001}
    assert (changed.training["guided_layers"], changed.training["stage"]) == ([1, 3], ["adapter"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["modle=x"], ["no 'modle'", "did you mean 'model'", "model, data, training, model_args, eval_data"]),
        (["data.0.spilt=train"], ["no 'data.0.spilt'", "did you mean 'split'", "path, name, split, format, images, rows"]),
        (["training.lerning_rate=1"], ["no 'training.lerning_rate'", "did you mean 'learning_rate'", "guided_fraction"]),
        (["training.zzz=1"], ["no 'training.zzz'. Known are"]),
        (["model_args.device=cpu"], ["no 'model_args.device'", "dtype, attn_implementation"]),
        (["data.3.path=x"], ["data has the entries 0 to 0, no '3'"]),
        (["data.first.path=x"], ["data has the entries 0 to 0, no 'first'"]),
        (["model.path=x"], ["there is no 'path'"]),
        (["model"], ["'model' is no override: write key=value"]),
        (["training.stage=[a"], ["training.stage=[a is not YAML"]),
        (["model=3"], ["model must be text, got 3"]),
        (["data=x"], ["data must be a list, got 'x'"]),
        (["data=[x]"], ["data.0 must be a mapping, got 'x'"]),
        (["data=[]"], ["has no data"]),
        (["data=[{split: train}]"], ["data.0 has no path"]),
        (["data.0.rows=many"], ["data.0.rows must be a whole number or null, got 'many'"]),
        (["data.0.rows=0"], ["rows must be at least 1, got 0"]),
        (["data.0.format=voc"], ["no format 'voc'; choose one of: rows, llava, cauldron"]),
        (["model_args.dtype=int8"], ["model_args.dtype must be auto or float32 or bfloat16 or float16 or fastest, got 'int8'"]),
        (["training=3"], ["training must be a mapping, got 3"]),
        (["training.learning_rate=fast"], ["training.learning_rate must be a number, got 'fast'"]),
        (["training.bf16=1"], ["training.bf16 must be true or false, got 1"]),
        (["training.guided_layers=2"], ["training.guided_layers must be a list of a whole number or null, got 2"]),
        (["training.output_dir=null"], ["no training.output_dir"]),
        (["training.stage=null"], ["no training.stage"]),
        (["training.stage=aling"], ["no preset 'aling'", "align, adapt_vision, guide, instruct"]),
        (["training.lr_scheduler_type=cosin"], ["cosin is not", "cosine"]),
        (["eval_data=[{path: a}]"], ["set training.eval_strategy"]),
        (["model=nowhere/at/all"], ["no folder nowhere/at/all", "agevlm build"]),
        (["data.0.path=no_such.json"], ["no such file or folder: no_such.json"]),
        (["data.0.images=here"], ["`images` is the folder", "format rows"]),
        (["data.0.format=llava"], ["has no column 'conversations'", "images, messages, grounding", "cauldron texts"]),
        (["data.0.name=default"], ["`name` requires `split`"]),
        (["training.guided_layers=[]"], ["guided_layers is empty: leave it out"]),
        (["training.guided_layers=[0, 99]"], ["guided_layers has [99], but the cross-attention layers are [0, 2, 5, 7]"]),
        (["training.group_learning_rates=foo"], ["group_learning_rates must be a mapping", "got 'foo'"]),
        (["training.group_learning_rates='[1]'"], ["group_learning_rates must be a mapping", "got [1]"]),
        (["stages=[]", "stages.foo.share=1"], ["stages is empty, so it has no 'foo'"]),
        (["training.output_dir={file}"], ["training.output_dir must be a folder, but {file} is a file"]),
        (["training.output_dir={file}/out"], ["training.output_dir must be a folder, but {file} is a file"]),
        (["features={file}"], ["features must be a folder, but {file} is a file"]),
        (["features=no_such_folder", "training.stage=align"], ["no features in no_such_folder"]),
        (["features=no_such_folder", "training.stage=guide"], ["The vision tower trains in the stage guide"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_mistakes_are_named(recipe, overrides, expected, capsys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("text")
    message = fails(capsys, recipe, *(override.replace("{file}", str(file)) for override in overrides))
    for part in expected:
        assert part.replace("{file}", str(file)) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "There is no recipe"),
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "must be a mapping with model, data and training"),
        ("", "must be a mapping with model, data and training"),
        ("model: m\n", "The recipe has no data and no training"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, capsys, text, expected):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in fails(capsys, path)


def test_another_architecture_is_refused_before_its_weights_are_read(recipe, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"no weights")
    message = fails(capsys, recipe, f"model={tmp_path / 'llama'}")
    assert "has the model_type 'llama'" in message
    assert "agevlm build" in message
    assert not (tmp_path / "out").exists()


# --- data ---


def test_mixture_of_all_forms(parts):
    """Rows of each form come out as the same conversations; nothing is lost on the way."""
    mixture = read_mixture(
        [
            DataPart(str(parts / "rows")),
            DataPart(str(parts / "llava.json"), format="llava", images=str(parts / "images")),
            DataPart(str(parts / "llava_hub"), format="llava"),
            DataPart(str(parts / "cauldron"), name="vqav2", split="train", format="cauldron"),
        ]
    )
    expected = rows(12)
    single = [row for row in expected if len(row["images"]) < 2]
    assert len(mixture) == 12 + 3 * len(single)
    for i, row in enumerate(mixture):
        source = expected[i] if i < 12 else single[(i - 12) % len(single)]
        images = row["images"] or ([row["image"]] if row["image"] else [])
        assert len(images) == len(source["images"])
        for image, same in zip(images, source["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(same))
        assert [m["role"] for m in row["messages"]] == [m["role"] for m in source["messages"]]
        assert list(map(message_text, row["messages"])) == list(map(message_text, source["messages"]))
        shown = [part["type"] for message in row["messages"] for part in message["content"]]
        assert shown == ["image"] * len(images) + ["text", "text"]
        assert (row["grounding"] or []) == (source["grounding"] if i < 12 else [])


def test_rows_of_trl_are_taken_as_they_are_used(tmp_path):
    """Messages with plain strings, or with other keys; one image; integers of another width."""
    image = rows(1)[0]["images"][0]
    content = [{"index": None, "text": "What?", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    for name, message in (("parts", content), ("strings", "What?")):
        messages = [{"role": "user", "content": message}]
        grounding = [{"message": 0, "start": 0, "end": 4, "image": 0, "box": None, "mask": None, "score": None}]
        columns = {"image": [image], "messages": [messages], "grounding": [grounding], "other": [1]}
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    first, second = read_mixture([DataPart(str(tmp_path / "parts")), DataPart(str(tmp_path / "strings"))])
    text, shown = {"type": "text", "text": "What?"}, {"type": "image", "text": None}
    assert first["messages"] == [{"role": "user", "content": [text, shown]}]
    assert second["messages"] == [{"role": "user", "content": [shown, text]}]
    assert first["grounding"][0]["end"] == 4
    assert "other" not in first


def test_rows_are_drawn_with_the_seed(parts):
    def drawn(number, seed):
        mixture = read_mixture(
            [DataPart(str(parts / "rows"), rows=number), DataPart(str(parts / "llava_hub"), format="llava")], seed
        )
        return [message_text(row["messages"][1]) + str(row["grounding"]) for row in mixture]

    every = drawn(None, 0)
    assert drawn(100, 0) == every
    few = drawn(4, 0)
    assert few[4:] == every[12:]
    assert set(few[:4]) < set(every[:12])
    assert few == drawn(4, 0) != drawn(4, 1)


def test_a_conversation_that_does_not_fit_is_named(parts, tmp_path):
    whole = datasets.load_from_disk(parts / "llava_hub")
    for name, value, expected in (
        ("more", "<image><image> What?", "the messages show 2 images, but the row has 1"),
        ("null", None, "row 1"),
    ):
        turns = [{"from": "human", "value": value}]
        broken = [whole[0], {**whole[2], "conversations": turns}]
        datasets.Dataset.from_list(broken, features=whole.features).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match="row 1 is not a conversation of the format llava") as error:
            read_mixture([DataPart(str(tmp_path / name), format="llava")])
        assert expected in str(error.value)


def test_names_of_images_are_no_images(parts, tmp_path):
    """As `datasets` reads LLaVA's own files from the Hub."""
    named = [{"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}]
    datasets.Dataset.from_list(named).save_to_disk(tmp_path / "named")
    with pytest.raises(ValueError, match=r"column image does not hold images.*give its .json file as `path`"):
        read_mixture([DataPart(str(tmp_path / "named"), format="llava")])


# --- runs ---


def test_resumes_as_if_never_stopped_and_overwrites_nothing(recipe, tmp_path, capsys):
    settings = ["training.max_steps=4", "training.save_steps=2", "training.per_device_train_batch_size=2"]
    assert "no checkpoint" in fails(capsys, recipe, *settings, "--resume")
    run(recipe, *settings)
    out, stopped = tmp_path / "out", tmp_path / "stopped"
    message = fails(capsys, recipe, *settings)
    assert "checkpoint-4 of a former run" in message
    assert "--resume" in message

    shutil.copytree(out / "checkpoint-2", stopped / "checkpoint-2")
    (stopped / ".unfinished").mkdir()  # what a killed run may leave
    assert "checkpoint-2" in fails(capsys, recipe, *settings, f"training.output_dir={stopped}")
    run(recipe, *settings, f"training.output_dir={stopped}", "--resume")
    whole, resumed = weights(out), weights(stopped)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [entry["step"] for entry in json.loads((stopped / "training.json").read_text())["log_history"]]
    assert max(steps) == 4

    shutil.rmtree(out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-4")
    saved = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    for resume in ([], ["--resume"]):
        message = fails(capsys, recipe, *settings, *resume)
        assert "the model of a finished run, and no checkpoint to resume from: delete the folder" in message
    assert saved == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}


def test_evaluates_and_draws(recipe, parts, tmp_path, capsys, monkeypatch):
    run(
        recipe,
        f"eval_data=[{{path: {parts / 'rows'}, rows: 4}}]",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
    )
    assert "eval_pointing_accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "training.png").is_file()

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    run(recipe, "training.logging_steps=1", f"training.output_dir={tmp_path / 'plain'}")
    assert "No training.png, which needs matplotlib: pip install 'agevlm[eval]'" in capsys.readouterr().out
    assert (tmp_path / "plain" / "training.json").is_file()
    assert not (tmp_path / "plain" / "training.png").exists()


def test_nothing_is_drawn_of_nothing(tmp_path):
    draw_training([{"loss": 1.0, "step": 1}], tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


# --- several stages ---

# On top of `recipe`: everything that a stage may have, and dropout in the model.
STAGES = [
    "model_args.dtype=bfloat16", "training.max_steps=8", "training.save_steps=2", "training.logging_steps=1", "training.stage=null",
    "training.tokens_per_batch=90", "training.optim=muon", "training.optim_args=adamw_lr_scale=0.3", "training.learning_rate=5e-3",
    "training.initial_gate=0.5", "data.0.weight_by={kind: {even: 1, odd: 2}}",
    "stages=[{name: align, share: 0.5, training: {stage: align, guidance_weight: 0}},"
    " {name: guide, share: 0.5, training: {stage: guide, group_learning_rates: {vision_last_block: 1e-3}}}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def staged(parts, tmp_path_factory):
    """Parts for `STAGES`, and the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("staged")
    model = tiny_trainable(gate=0.0)
    model.config.text_config.attention_dropout = 0.2
    model.bfloat16().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(24).add_column("kind", [("even", "odd")[i % 2] for i in range(24)]).save_to_disk(folder / "rows")
    return folder


def staged_recipe(staged: Path, out: Path) -> list[str]:
    return [*STAGES, f"model={staged / 'model'}", f"data.0.path={staged / 'rows'}", f"training.output_dir={out}"]


@pytest.fixture
def whole(staged, recipe, monkeypatch):
    out = staged / "whole"
    if not out.exists():
        agevlm.train(recipe, staged_recipe(staged, out))
    return out


def steps_of(file: Path) -> list[tuple]:
    log = json.loads(file.read_text())["log_history"]
    return [(e["step"], e.get("stage"), e["loss"], e["grad_norm"], e["guided_phrases"]) for e in log if "loss" in e]


def test_stages_run_in_order_and_each_starts_from_the_former(staged, whole):
    assert sorted(file.name for file in whole.iterdir()) == [
        "1_align",
        "2_guide",
        "training.json",
        "training.png",
    ]
    start, first, second = weights(staged / "model"), weights(whole / "1_align"), weights(whole / "2_guide")
    groups = group_parameters(tiny_trainable())
    for group, name in ((group, name) for group, members in groups.items() for name in members):
        if group == "vision_last_block":
            assert torch.equal(first[name].float(), start[name].float())
            assert not torch.equal(second[name].float(), first[name].float())
        elif group in PRESETS["align"]:
            assert first[name].dtype == second[name].dtype == torch.float32
            assert not torch.equal(second[name], first[name])
    log = json.loads((whole / "training.json").read_text())
    assert [entry[:2] for entry in steps_of(whole / "training.json")] == [
        *((step, "align") for step in range(1, 5)), *((step, "guide") for step in range(5, 9)),
    ]  # fmt: skip
    assert [guided > 0 for *_, guided in steps_of(whole / "training.json")][:4] == [False] * 4
    assert any(guided for *_, guided in steps_of(whole / "training.json"))
    assert log["metrics"].keys() == {"align", "guide"}
    assert log["recipe"]["training"]["output_dir"] == str(whole)
    for folder in ("1_align", "2_guide"):
        assert {"training.json", "training.png", "checkpoint-4", "config.json"} <= {
            f.name for f in (whole / folder).iterdir()
        }


def test_a_run_that_was_killed_anywhere_ends_as_one_that_was_not(staged, whole, recipe, tmp_path):
    """Within the first stage, in the second before its first checkpoint, and after it; to the last bit."""
    out = tmp_path / "killed"
    overrides, spawn = staged_recipe(staged, out), multiprocessing.get_context("spawn")
    for resume, accident in ((False, ("1_align", 3)), (True, ("2_guide", 1)), (True, ("2_guide", 3)), (True, None)):
        process = spawn.Process(target=train_recipe, args=(str(recipe), overrides, accident, resume))
        process.start()
        process.join(300)
        assert process.exitcode == (0 if accident is None else -signal.SIGKILL), accident
        assert (out / "1_align" / "config.json").exists() == (accident != ("1_align", 3))
    for folder in ("1_align", "2_guide"):
        ended, expected = weights(out / folder), weights(whole / folder)
        assert ended.keys() == expected.keys()
        assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items()), folder
    assert steps_of(out / "training.json") == steps_of(whole / "training.json")


def test_a_finished_run_is_left_as_it_is_and_a_changed_one_refused(staged, whole, recipe, capsys):
    saved = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    overrides = staged_recipe(staged, whole)
    trainer = agevlm.train(recipe, [*overrides, "training.logging_steps=3"], resume=True)
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name].to(tensor), tensor) for name, tensor in weights(whole / "2_guide").items())
    for change in ("training.learning_rate=1e-3", "stages.guide.training.stage=instruct", "data.0.rows=5"):
        assert "other settings" in fails(capsys, recipe, *overrides, change, "--resume")
    assert "1_align has checkpoint-4 of a former run: resume it with --resume" in fails(capsys, recipe, *overrides)
    assert saved == {file: file.stat().st_mtime_ns for file in whole.rglob("*")}


def test_what_trains_goes_on_in_float32(staged, whole, recipe, tmp_path):
    """The second stage begins with the first one's values, not with those rounded to the model's bfloat16."""
    still = ["stages.guide.training.learning_rate=0", "stages.guide.training.group_learning_rates=null"]
    agevlm.train(recipe, [*staged_recipe(staged, tmp_path / "still"), *still])
    first, second = (weights(tmp_path / "still" / folder) for folder in ("1_align", "2_guide"))
    names = [name for name in first if "cross_attn" in name or "multi_modal_projector" in name]
    assert any(not torch.equal(first[name], first[name].bfloat16().float()) for name in names)
    assert all(torch.equal(second[name], first[name]) for name in names)


def test_a_model_and_a_trainer_of_ones_own(staged, recipe, tmp_path):
    """The first stage trains the model that is given, later ones are loaded by its class; all by the given trainer."""
    model, calls = tiny_trainable(gate=0.0, seed=5), []

    class OwnModel(type(model)):
        pass

    class OwnTrainer(AgeVlmTrainer):
        def __init__(self, **kwargs):
            calls.append(kwargs)
            super().__init__(**kwargs)

    model.__class__ = OwnModel
    before = model.state_dict()["lm_head.weight"].clone()
    overrides = [*staged_recipe(staged, tmp_path / "own"), "training.max_steps=2", "model_args.dtype=auto"]
    trainer = agevlm.train(recipe, overrides, model=model, processor=tiny_processor(), trainer_class=OwnTrainer)
    assert calls[0]["model"] is model
    assert [type(kwargs["model"]) for kwargs in calls] == [OwnModel, OwnModel]
    assert [kwargs["args"].data_seed for kwargs in calls] == [421, 422], "other batches in each stage"
    assert isinstance(trainer, OwnTrainer)
    assert torch.equal(trainer.model.state_dict()["lm_head.weight"], before), "in its own type, float32"


def test_features_take_the_place_of_images(staged, recipe, tmp_path):
    """With the tower frozen, training is the same; where something of it trains they are refused."""
    features = tmp_path / "features"
    common = [*staged_recipe(staged, tmp_path / "pixels"), "training.stage=align", "stages=[]", "training.max_steps=2"]
    common += ["model_args.dtype=float32", "training.guidance_weight=1"]
    agevlm.train(recipe, common)
    common += [f"training.output_dir={tmp_path / 'features_run'}", f"features={features}"]
    with pytest.raises(FileNotFoundError, match="no features"):
        agevlm.train(recipe, common)
    cache_features(recipe, common)
    agevlm.train(recipe, common)
    logs = [steps_of(tmp_path / name / "training.json") for name in ("pixels", "features_run")]
    for pixels, ready in zip(*logs, strict=True):
        assert ready[2:] == pytest.approx(pixels[2:], rel=1e-5)
    with pytest.raises(ValueError, match="The vision tower trains"):
        agevlm.train(recipe, [*common, "training.stage=guide", f"training.output_dir={tmp_path / 'refused'}"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stages.0.name=guide", "Two stages have the same name"),
        ("stages.0.name=a/b", "stages.0.name is part of a folder's name"),
        ("stages.1.training.guided_layers=[99]", "guided_layers has [99]"),
        ("stages.1.features=no_such_folder", "The vision tower trains in the stage guide"),
        ("stages.0.training.output_dir=x", "leave output_dir out"),
        ("stages.0.training.stage=null", "no stages.0.training.stage"),
        ("stages.0.training.max_steps=3", "share is a part of training.max_steps, in place of the stage's own"),
        ("training.max_steps=null", "share is a part of training.max_steps"),
        ("stages.0.share=0", "share is a part of training.max_steps"),
        ("stages.0.trainig={}", "did you mean 'training'"),
        ("stages.align.training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("stages.instruct.share=1", "has the entries 0 to 1 (align, guide), no 'instruct'"),
        ("stages.0.data=[]", "has no data"),
        ("data.0.weight_by={kind: {other: 1}}", "has no rows whose kind is other"),
    ],
)  # fmt: skip
def test_mistakes_of_stages_are_named(staged, recipe, tmp_path, capsys, change, expected):
    assert expected in fails(capsys, recipe, *staged_recipe(staged, tmp_path / "none"), change)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stages", [False, True])
def test_a_failure_before_anything_is_saved_leaves_no_folder(stages, staged, recipe, tmp_path):
    class Failing(AgeVlmTrainer):
        def train(self, *args, **kwargs):
            Path(self.args.output_dir).mkdir(exist_ok=True)
            raise ZeroDivisionError

    overrides = staged_recipe(staged, tmp_path / "out") if stages else []
    with pytest.raises(ZeroDivisionError):
        agevlm.train(recipe, overrides, trainer_class=Failing)
    assert not (tmp_path / "out").exists()


def test_the_fastest_type_is_that_of_the_machine(recipe, monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(optimizer, "fastest_dtype", lambda device=None, dtype=dtype: dtype)
        model, processor = load_model(load_recipe(recipe, ["model_args.dtype=fastest"]))
        assert {p.dtype for p in model.parameters()} == {dtype}, supported
        assert type(processor) is type(tiny_processor())


# --- several processes ---


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))  # raises for unknown keys, but not for those of the parts
    known = vars(launch_command_parser().parse_args(["script"]))
    for part in (config.fsdp_config, config.deepspeed_config):
        assert part.keys() <= known.keys()
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(path.stem, DistributedType.DEEPSPEED)
    assert config.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        wrapped = set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","))
        assert wrapped <= {type(module).__name__ for module in tiny_trainable().modules()}


# Accelerate shards models on accelerators only, by the kind of its processes; PyTorch does on CPUs as well.
SHARD_ON_CPU = """
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from agevlm import cli
from agevlm.trainer import recipe, trainer

def training_arguments(stage, original=recipe.training_arguments):
    args = original(stage)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args

class Trainer(trainer.AgeVlmTrainer):
    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        assert isinstance(self.model_wrapped, FSDPModule)
        return result

recipe.training_arguments, trainer.AgeVlmTrainer = training_arguments, Trainer
cli.main()
"""


def test_two_processes_train_as_one(parts, tmp_path):
    """The recipe of stage 3 under the accelerate configurations, beside one process with as many rows a step.

    One row a batch, so that some batches have no image: what trains must get a gradient from those too.
    """
    recipe = next(path for path in RECIPES if path.stem == "3_guide")
    # Float32, and no Adam, which makes steps of noise about 0.
    common = [
        recipe, f"model={parts / 'model'}", *paths(recipe, parts), *SMALL, "training.max_steps=3", "training.optim=sgd",
        "training.bf16=false", "model_args.dtype=float32", "training.learning_rate=1e-2", "training.lr_scheduler_type=constant",
        "training.initial_gate=0.5", "training.per_device_train_batch_size=1", "training.group_learning_rates=null",
    ]  # fmt: skip
    run(*common, "training.gradient_accumulation_steps=4", f"training.output_dir={tmp_path / 'one'}")
    expected, start = weights(tmp_path / "one"), weights(parts / "model")
    steps = [(tensor - start[key].float()).norm() for key, tensor in expected.items() if ".gate" not in key]
    assert sum(step > 1e-4 for step in steps) > 40, "the steps are long enough to compare"

    bin_folder = Path(sys.executable).parent
    (tmp_path / "shard_on_cpu.py").write_text(SHARD_ON_CPU)
    for name, script in (("ddp", bin_folder / "agevlm"), ("fsdp2", tmp_path / "shard_on_cpu.py")):
        command = [
            bin_folder / "accelerate", "launch", "--config_file", ROOT / "examples" / "accelerate" / f"{name}.yaml",
            "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no",
            script, "train", *common, "training.gradient_accumulation_steps=2", f"training.output_dir={tmp_path / name}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
        assert len(re.findall(r"saved in", done.stdout)) == 1, "one process reports"
        actual = weights(tmp_path / name)
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            step = (tensor - start[key].float()).norm()
            assert (actual[key] - tensor).norm() <= 0.01 * step + 1e-6, (name, key)
