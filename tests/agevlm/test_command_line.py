# SPDX-License-Identifier: Apache-2.0
"""What the commands do with inputs and outputs that are wrong: one message, one exit code, no traceback, no leftovers.

`COMMANDS` has each command with good inputs, `FAULTS` all that is done to an input of each kind. A case is a command, one of its
inputs and a fault; the tests make all of them. The message must name what was changed.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pytest
import segment_anything
import torch
from command_line import run
from evaluation_cases import cv_rows, picture, pope_rows, write_lines
from fake_hub import fake_hub
from grounded_rows import make_dataset, make_row, photograph
from published_flickr30k import write_flickr30k
from published_grit import grit_row, jpeg, write_grit
from published_grit import picture as grit_picture
from published_refcoco import write_refcoco
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_laboratory import tiny_checkpoint, tiny_scenes
from tiny_models import tiny_llama, tiny_vision
from tiny_sam import build_tiny_sam, save_checkpoint

import agevlm
from agevlm import hub
from agevlm.cli.commands import app

pytestmark = pytest.mark.slow

# The inputs are in braces: the name of a folder or a file of `world`, whose kind `KINDS` says. `out` is the output.
COMMANDS = {
    "build": "build --text {text} --vision {vision} --image-size 64 --out {out}",
    "build --delta": "build --delta {delta} --text {text} --vision {vision} --out {out}",
    "scenes": "scenes --cutouts {cutouts} --backgrounds {backgrounds} --train 2 --validation 1 --test 1 --image-size 64 "
    "--max-objects 2 --out {out}",
    "masks": "masks {boxes} --teacher sam --checkpoint {sam} --device cpu --out {out}",
    "features": "features {recipe} model={model} data.0.path={rows} training.stage=align features={out}",
    "train": "train {recipe} model={model} data.0.path={rows} training.output_dir={out}",
    "push": "push {model} me/mine --dry-run",
    "ask": "ask --model {model} --image {image} Cat?",
    "ask --heatmap": "ask --model {model} --image {image} Cat? --heatmap {out}.png",
    "ask --out": "ask --model {model} --image {images} --out {out}.jsonl Cat?",
    "ask --ground": "ask --model {model} --image {image} Cat? --ground --boxes {out}.png",
    "attention": "attention --model {model} --image {image} --answer cat Cat? --out {out}",
    "app": "app {model} --port 47860",
    "similarity": "similarity --model {model} --data {rows} --limit 8 --out {out}",
    "data check": "data check {rows.json}",
    "data check --model": "data check {rows.json} --model {model}",
    "data check --report": "data check {rows.json} --report {out}.json",
    "data convert": "data convert {llava.json} --format llava --images {images} --out {out}",
    "data convert --format grit": "data convert {grit.parquet} --format grit --images {downloaded} --out {out}",
    "data convert --format flickr30k": "data convert {flickr30k} --format flickr30k --images {photographs} --split train --out {out}",
    "data convert --format refcoco": "data convert {refcoco.parquet} --format refcoco --images {train2014} --out {out}",
    "data phrases": "data phrases {captions} --out {out}",
    "data prepare": "data prepare {recipe} model={model} data.0.path={rows} training.output_dir={out} --num-proc 1",
    "eval pope": "eval pope --model {model} --data {pope.json} --images {images} --limit 1 --max-new-tokens 1 --out {out}",
    "eval cv-bench": "eval cv-bench --model {model} --data {cv.jsonl} --images {images} --limit 1 --max-new-tokens 1 --out {out}",
    "eval scenes": "eval scenes --model {model} --data {scenes} --split train --limit 1 --max-new-tokens 1 --out {out}",
    "calibrate": "calibrate {model} --data {scenes} --split train",
    "eval grounding": "eval grounding --model {model} --data {scenes} --split train --limit 1 --max-new-tokens 1 --out {out}",
    "serve": "serve {model} --port 0",
    "chat": "chat {model} --image {image}",
    "export": "export {model} --format torch --out {out}",
}

RECIPE = """
model: none
data: [{path: none}]
training: {output_dir: none, stage: align, max_steps: 1, tokens_per_batch: 600, disable_tqdm: true, report_to: none}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A good input of each name."""
    folder = tmp_path_factory.mktemp("world")
    tiny_scenes(folder / "made")
    for name in ("cutouts", "backgrounds"):
        (folder / "made" / name).rename(folder / name)
    (folder / "made" / "exact").rename(folder / "scenes")
    shutil.copytree(folder / "scenes" / "train", folder / "rows")
    make_dataset([make_row(photograph(0, (30, 40)), ("a dog", [2, 3, 20, 30], None))]).save_to_disk(folder / "boxes")
    make_dataset([make_row(photograph(0, (30, 40)), text="A dog on the grass.")]).save_to_disk(folder / "captions")
    tiny_checkpoint(folder / "model")
    tokenizer = tiny_tokenizer()
    for part in (tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer):
        part.save_pretrained(folder / "text")
    tiny_vision().save_pretrained(folder / "vision")
    model, processor = agevlm.build_checkpoint(
        str(folder / "text"), str(folder / "vision"), folder / "whole", image_size=64
    )
    agevlm.save_trained(model, folder / "delta", processor)
    save_checkpoint(folder / "sam")
    (folder / "recipe").write_text(RECIPE)
    (folder / "images").mkdir()
    for number, name in enumerate(["image.png", *(f"COCO_val2014_{number:012d}.jpg" for number in range(2))]):
        picture(number).save(folder / "images" / name)
    shutil.copy(folder / "images" / "image.png", folder / "image")
    turns = [{"from": "human", "value": "<image>\nCat?"}, {"from": "gpt", "value": "No."}]
    (folder / "llava.json").write_text(json.dumps([{"id": 1, "image": "image.png", "conversations": turns}]))
    messages = [{"role": "user", "content": "Cat?"}, {"role": "assistant", "content": "No."}]
    (folder / "rows.json").write_text(json.dumps([{"images": ["images/image.png"], "messages": messages}]))
    grit, downloaded = write_grit(folder / "grit", [grit_row(0)], [jpeg(grit_picture(0))], saved=False)
    shutil.move(grit / "coyo_0_snappy.parquet", folder / "grit.parquet")
    downloaded.rename(folder / "downloaded")
    entities, photographs = write_flickr30k(folder, train=1, val=0, test=0)
    (folder / "flickr30k").mkdir()
    shutil.make_archive(str(folder / "flickr30k" / "annotations"), "zip", entities)
    shutil.copy(entities / "train.txt", folder / "flickr30k")
    photographs.rename(folder / "photographs")
    refcoco, _ = write_refcoco(folder, train=1, other=0)
    shutil.copy(next((refcoco / "data").glob("train-*")), folder / "refcoco.parquet")
    write_lines(folder / "pope.json", pope_rows("random"))
    write_lines(folder / "cv.jsonl", [{**row, "filename": "image.png"} for row in cv_rows()])
    return folder


# --- faults: each changes an input in its place, and returns what the message must name, the input by default ---


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    missing(path)
    path.mkdir() if not path.suffix and path.name not in FILES else path.touch()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    missing(path)
    path.write_text("Not what it should be.")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x80" * 100)


def nested(path: Path) -> None:
    """Deeper than parsers that call themselves can go."""
    path.write_text("[" * 100_000)


def number(path: Path) -> None:
    path.write_text("3")


def in_file(name: str, fault: Callable[[Path], Any]) -> Callable[[Path], str]:
    """A fault of one file of a folder, which the message must name."""

    def change(path: Path) -> str:
        fault(path / name)
        return name

    change.__name__ = f"{fault.__name__}_{name}"
    return change


def part(name: str, fault: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A fault of one file of a data set, of which the message names the folder."""

    def change(path: Path) -> None:
        fault(path / name)

    change.__name__ = f"{fault.__name__}_{name.replace('/', '_')}"
    return change


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def another_shape(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].dim())
    save_file({**tensors, name: torch.zeros(3, 3)}, file, {"format": "pt"})


def another_kind(path: Path) -> None:
    """The folder of a tower that is no Llama, and of a Llama that is none of the others."""
    missing(path)
    tiny_llama().save_pretrained(path) if path.name != "text" else tiny_vision().save_pretrained(path)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def pickled(path: Path) -> str:
    """Weights that run code when they are read."""
    (path / "model.safetensors").unlink()
    with open(path / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Exploit()}, file)
    return "pytorch_model.bin"


def exploit(path: Path) -> None:
    torch.save({"weight": Exploit()}, path)


def broken_template(path: Path) -> str:
    (path / "chat_template.jinja").write_text("{% for message in messages %}{{ message")
    return "chat template"


def failing_template(path: Path) -> str:
    (path / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    return "chat template"


def setting_of_another_type(path: Path) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": "long"}))


def other_weights(path: Path) -> None:
    torch.save(build_tiny_sam(width=16).state_dict(), path)


def bomb(path: Path) -> None:
    """A PNG file of a hundred bytes that claims ten billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def none_of_its_images(path: Path) -> str:
    for file in path.iterdir():
        file.unlink()
    return "."


MODEL = [
    missing, empty, text, another_kind, another_shape, pickled, broken_template, failing_template,
    in_file("model.safetensors", truncated), in_file("model.safetensors", no_bytes),
    in_file("config.json", truncated), in_file("config.json", nested), in_file("config.json", number),
    in_file("tokenizer.json", truncated), setting_of_another_type,
]  # fmt: skip
PART = [fault for fault in MODEL if fault not in (broken_template, failing_template, setting_of_another_type)]
FAULTS: dict[str, list[Callable[[Path], Any]]] = {
    "model": MODEL,
    "text": PART,
    "delta": [missing, empty, text, in_file("trained.safetensors", truncated), in_file("trained.safetensors", no_bytes),
              in_file("parts.json", truncated), in_file("parts.json", nested), in_file("parts.json", number),
              in_file("config.json", truncated), in_file("tokenizer.json", truncated), broken_template],
    "vision": [fault for fault in PART if "tokenizer" not in fault.__name__],
    "dataset": [missing, empty, text, part("state.json", truncated), part("state.json", nested),
                part("dataset_info.json", number), part("data-00000-of-00001.arrow", truncated)],
    "splits": [missing, empty, text, part("dataset_dict.json", truncated), part("dataset_dict.json", number),
               part("train/data-00000-of-00001.arrow", truncated)],
    "json": [missing, empty, truncated, text, binary, nested, number],
    "image": [missing, empty, truncated, text, bomb],
    "images": [missing, text, none_of_its_images],
    "pictures": [missing, empty, text],
    "table": [missing, empty, truncated, text],
    "shards": [missing, empty, text, in_file("00000.tar", missing), in_file("00000.tar", no_bytes)],
    "entities": [missing, empty, text, in_file("annotations.zip", truncated), in_file("annotations.zip", no_bytes),
                 in_file("train.txt", missing), in_file("train.txt", binary)],
    "sam": [missing, empty, truncated, text, other_weights, exploit],
    "recipe": [missing, empty, truncated, text, binary, nested, number],
}  # fmt: skip
FILES = ("sam", "recipe", "image")
KINDS = {
    "text": "text", "vision": "vision", "model": "model", "delta": "delta", "rows": "dataset", "boxes": "dataset", "captions": "dataset", "scenes": "splits", "sam": "sam",
    "recipe": "recipe", "image": "image", "images": "images", "cutouts": "pictures", "backgrounds": "pictures",
    "rows.json": "json", "llava.json": "json", "pope.json": "json", "cv.jsonl": "json",
    "grit.parquet": "table", "downloaded": "shards", "flickr30k": "entities", "photographs": "images",
    "refcoco.parquet": "table", "train2014": "images",
}  # fmt: skip


class Case(NamedTuple):
    command: str
    input: str
    fault: Callable[[Path], Any]


def inputs(command: str) -> list[str]:
    return [name for name in KINDS if f"{{{name}}}" in COMMANDS[command]]


# What several commands read by the same function is changed for one of them only, and what they do not read is not changed.
SKIPPED = {
    "model": {
        "features",
        "push",
        "ask --heatmap",
        "attention",
        "app",
        "similarity",
        "data check --report",
        "data prepare",
        "eval pope",
        "eval cv-bench",
        "eval scenes",
        "ask --ground",
        "calibrate",
        "eval grounding",
        "serve",
        "chat",
        "export",
    },
    "image": {"ask --ground"},
    "scenes": {"calibrate", "eval grounding"},
    "rows": {"data prepare"},
    "text": {"build --delta"},
    "vision": {"build --delta"},
    "rows.json": {"data check --model"},
}


def cases() -> Iterator[Case]:
    for command in COMMANDS:
        for name in inputs(command):
            for fault in FAULTS[KINDS[name]]:
                weights = fault is another_shape or "safetensors" in fault.__name__
                if command not in SKIPPED.get(name, ()) and not (command == "data check --model" and weights):
                    yield Case(command, name, fault)


CASES = list(cases())


def arguments(command: str, world: Path, out: Path, **changed: Path) -> list[str]:
    words = []
    for word in COMMANDS[command].split():
        for name in (*KINDS, "out"):
            word = word.replace(f"{{{name}}}", str(changed.get(name, out if name == "out" else world / name)))
        words.append(word)
    return words


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file() or True}


@pytest.fixture
def command(monkeypatch, capsys, world, tmp_path, tmp_path_factory):
    """Runs a command in an empty folder, with an empty cache of data, and gives its exit code and what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    fake_hub(monkeypatch, down=True)
    monkeypatch.setitem(segment_anything.sam_model_registry, "tiny", build_tiny_sam)

    def call(name: str, out: str | Path = "out", **changed: Path) -> tuple[int, str]:
        code, printed = run(monkeypatch, capsys, *arguments(name, world, tmp_path / out, **changed))
        return code, " ".join(printed.split())

    return call


def check_message(code: int, printed: str, culprit: str, expected: int = 2) -> None:
    """One message, which names the culprit."""
    assert code == expected, printed
    assert printed.count("agevlm: error:") == 1, printed
    assert culprit in printed.split("agevlm: error:")[1], printed
    assert "Traceback" not in printed
    assert "unexpected error" not in printed


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.input}-{case.fault.__name__}")
def test_a_wrong_input_ends_in_one_message(case, command, world, tmp_path):
    changed = tmp_path / "in" / case.input
    changed.parent.mkdir()
    shutil.copytree(world / case.input, changed) if (world / case.input).is_dir() else shutil.copy(
        world / case.input, changed
    )
    culprit = case.fault(changed) or changed.name
    before = tree(tmp_path)
    code, printed = command(case.command, **{case.input: changed})
    check_message(code, printed, culprit)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options", "culprit"),
    [
        ("build", ["--cross-attention-layers", "99"], "cross_attention_layers=[99]"),
        ("build", ["--cross-attention-layers", "3,3"], "cross_attention_layers=[3, 3]"),
        ("build", ["--image-token", "[/b]"], "'[/b]'"),
        ("scenes", ["--classes", "[/b]"], "[/b]"),
        ("masks", ["--min-score", "nan"], "min_score"),
        ("data phrases", ["--max-phrases", "0"], "max_phrases"),
        ("data phrases", ["--num-proc", "-1"], "num_proc"),
        ("train", ["training.stage=[/b]"], "/b"),
        ("train", ["training.max_steps=1e99"], "max_steps"),
        ("train", ["training.gradient_accumulation_steps=0"], "gradient_accumulation_steps"),
        ("train", ["training.max_length=-4"], "max_length"),
        ("train", ["training.weight_decay=-1"], "weight_decay"),
        ("train", ["training.neftune_noise_alpha=-1"], "neftune_noise_alpha"),
        ("train", ["training.group_learning_rates={adapter: x}"], "group_learning_rates.adapter"),
        ("train", ["training.group_learning_rates={adapter: -1}"], "group_learning_rates.adapter"),
        ("train", ["training.lr_scheduler_kwargs={cycles: 1}"], "cycles"),
        ("train", ["training.accelerator_config={nonsense: 1}"], "nonsense"),
        ("train", ["training.log_level=nonsense"], "nonsense"),
        ("attention", ["--answer", "cat\udcff"], "--answer is not UTF-8"),
        ("eval pope", ["--prompt-suffix", "\udcff"], "--prompt-suffix is not UTF-8"),
        ("eval pope", ["--categories", "[/b]"], "[/b]"),
        ("eval scenes", ["--split", "[/b]"], "[/b]"),
        ("calibrate", ["--split", "[/b]"], "[/b]"),
        ("ask", ["--phrase", "[/b]", "--heatmap", "x.png"], "[/b]"),
        ("serve", ["--dtype", "[/b]"], "[/b]"),
        ("chat", ["--device", "[/b]"], "[/b]"),
        ("export", ["--format", "[/b]"], "[/b]"),
    ],
)
def test_a_wrong_option_ends_in_one_message(name, options, culprit, monkeypatch, capsys, world, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(segment_anything.sam_model_registry, "tiny", build_tiny_sam)
    code, printed = run(monkeypatch, capsys, *arguments(name, world, tmp_path / "out"), *options)
    check_message(code, printed, culprit)
    assert tree(tmp_path) == {}


def test_a_question_in_another_encoding(monkeypatch, capsys, world):
    """The bytes of another encoding come as halves of surrogate pairs, which a tokenizer refuses with a TypeError."""
    *words, question = arguments("ask", world, world)
    code, printed = run(monkeypatch, capsys, *words, question + "\udcff")
    check_message(code, printed, "The question is not UTF-8")


# --- the output ---

OUTPUTS = [command for command in COMMANDS if "{out}" in COMMANDS[command]]
# These add to their folder.
ADDING = ("features", "data prepare")
FOLDERS = [command for command in OUTPUTS if "{out}." not in COMMANDS[command] and command not in ADDING]
# Each command's last step before its output is written.
LAST_STEP = {
    "build": "agevlm.build.from_parts",
    "build --delta": "agevlm.deltas.load_processor",
    "scenes": "agevlm.data.scene_builder.quiet_datasets",
    "masks": "agevlm.data.teachers.SamTeacher.masks",
    "features": "agevlm.data.features.image_digest",
    "train": "agevlm.trainer.trainer.AgeVlmTrainer.train",
    "ask --heatmap": "agevlm.inference.attention.Attention.draw",
    "ask --out": "agevlm.evaluation.answers.answer_batch",
    "ask --ground": "agevlm.inference.grounding.Grounded.draw",
    "attention": "agevlm.inference.attention.Attention.draw",
    "similarity": "agevlm.evaluation.similarity.measure_similarity",
    "data check --report": "agevlm.data.check.check_row",
    "data convert": "agevlm.data.formats.llava._row",
    "data convert --format grit": "agevlm.data.formats.grit._row",
    "data convert --format flickr30k": "agevlm.data.formats.flickr30k._read_sentence",
    "data convert --format refcoco": "agevlm.data.formats.refcoco._object",
    "data phrases": "agevlm.data.phrases.replace_grounding",
    "data prepare": "agevlm.trainer.prepare.estimate_step",
    "eval pope": "agevlm.evaluation.answers.answer_batch",
    "eval cv-bench": "agevlm.evaluation.answers.answer_batch",
    "eval scenes": "agevlm.evaluation.answers.answer_batch",
    "export": "agevlm.inference.export._graphs",
    "eval grounding": "agevlm.evaluation.answers.answer_batch",
}
# What an interrupted run leaves for the next one to continue.
KEPT = {
    "masks": ".out.unfinished",
    "ask --out": ".out.jsonl.unfinished",
    "features": "out",
    "eval pope": "out",
    "eval cv-bench": "out",
    "eval scenes": "out",
    "eval grounding": "out",
}


def without_kept(files: dict[str, int], command: str) -> dict[str, int]:
    kept = KEPT.get(command, "-")
    return {name: size for name, size in files.items() if name.split("/")[0] != kept}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_output_that_exists_is_left_alone(name, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    before = tree(tmp_path)
    code, printed = command(name)
    check_message(code, printed, "out")
    assert tree(tmp_path) == before
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_below_a_file(name, command, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    code, printed = command(name, "file/out")
    check_message(code, printed, "file")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_permission_to_write(name, command, tmp_path, monkeypatch):
    """Also where tests run as root, who may write everywhere."""
    (tmp_path / "closed").mkdir()
    before = tree(tmp_path)
    for module, function in ((os, "mkdir"), (os, "access"), (os, "open")):
        original = getattr(module, function)

        def refused(path, *args, original=original, function=function, **kwargs):
            if isinstance(path, (str, Path)) and str(path).startswith(str(tmp_path / "closed")):
                if function == "access":
                    return False
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, function, refused)
    opened = open

    def refused_open(file, mode="r", *args, **kwargs):
        if isinstance(file, (str, Path)) and str(file).startswith(str(tmp_path / "closed")) and mode[0] in "wax":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, mode, *args, **kwargs)

    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, refused_open)
    code, printed = command(name, "closed/out")
    check_message(code, printed, "closed")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk(name, command, tmp_path, monkeypatch):
    """The operating system refuses all files above some bytes, whoever writes them."""
    before = tree(tmp_path)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, allowed[1]))
    try:
        code, printed = command(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    check_message(code, printed, "verdicts" if name == "data prepare" else "out")  # which go to the cache
    assert without_kept(tree(tmp_path), name) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_interrupt(name, command, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LAST_STEP[name], interrupt)
    before = tree(tmp_path)
    code, printed = command(name)
    assert code == 130, printed
    assert printed.count("agevlm: interrupted") == 1
    assert "Traceback" not in printed
    assert without_kept(tree(tmp_path), name) == before


# An export takes as long as many others together.
PRINTING = [
    pytest.param(name, marks=pytest.mark.minutes) if name == "export" else name for name in OUTPUTS if name != "train"
]


@pytest.mark.parametrize("name", PRINTING)
def test_names_that_look_like_markup(name, command, world, tmp_path):
    """A name is printed as it is, at the latest when the work is done."""
    (tmp_path / "[b]:cat:[").mkdir()
    code, printed = command(name, "[b]:cat:[/i]")
    assert code == 0, printed
    assert any("[b]:cat:[/i]" in str(path) for path in tmp_path.rglob("*"))
    if "Saved" in printed:
        assert "[b]:cat:[/i]" in printed


@pytest.mark.parametrize(
    ("name", "changed", "file"),
    [
        ("ask", "model", "config.json"),
        ("train", "model", "config.json"),
        ("build", "text", "config.json"),
        ("build", "vision", "config.json"),
        ("train", "recipe", ""),
        ("data check", "rows.json", ""),
        ("data convert", "llava.json", ""),
        ("data convert --format grit", "downloaded", "00000.tar"),
        ("data convert --format flickr30k", "flickr30k", "annotations.zip"),
        ("eval pope", "pope.json", ""),
    ],
)
def test_no_permission_to_read(name, changed, file, command, world, tmp_path, monkeypatch):
    closed, opened = world / changed / file, open

    def refused(file, *args, **kwargs):
        if not isinstance(file, int) and os.fspath(file) == str(closed):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, refused)
    code, printed = command(name)
    check_message(code, printed, str(closed))
    assert tree(tmp_path) == {}


# --- the Hub ---


@pytest.fixture
def silent_hub(monkeypatch):
    """A Hub that accepts connections and never answers; one that refuses them is faster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.3)
        monkeypatch.setattr(hub, "_answers", {})
        asked, real = [], hub.within_patience

        def ask(question):
            asked.append(question)
            return real(question)

        monkeypatch.setattr(hub, "within_patience", ask)
        yield server, asked


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ask", "model"),
        ("build", "text"),
        ("build", "vision"),
        ("train", "model"),
        ("train", "rows"),
        ("similarity", "rows"),
    ],
)
def test_a_name_that_is_nowhere(name, changed, silent_hub, monkeypatch, capsys, world, tmp_path):
    """One message names the folder and the Hub, after one question that ends in time."""
    monkeypatch.chdir(tmp_path)
    server, asked = silent_hub
    code, printed = run(
        monkeypatch, capsys, *arguments(name, world, tmp_path / "out", **{changed: Path("me/nothing")})
    )
    check_message(code, printed, "me/nothing")
    assert "the Hub cannot be asked" in printed
    assert len(asked) == 1
    server.setblocking(False)
    connections = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connections.append(server.accept()[0])
    for connection in connections:
        connection.close()
    assert len(connections) <= 1  # no other way to ask, and no second attempt
    assert tree(tmp_path) == {}


def test_the_hub_has_its_time_in_full():
    assert 5 <= hub.PATIENCE < 10


@pytest.mark.parametrize(
    "path", ["./nothing", "/no/such/model", "~/model", "a/b/c", "rows.json", "model.safetensors", "a//b", ""]
)
def test_paths_are_not_asked_for(path, monkeypatch):
    asked = fake_hub(monkeypatch)
    for kind in ("model", "data set"):
        with pytest.raises(FileNotFoundError, match="name one that exists"):
            hub.ask_hub(path, kind)
    assert not asked


def test_models_of_the_hub(monkeypatch, tmp_path):
    """By name where it answers, from the cache where it does not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    fake_hub(monkeypatch, "me/mine", "gpt2")
    assert [hub.find_model(name) for name in ("me/mine", "gpt2")] == ["me/mine", "gpt2"]
    with pytest.raises(FileNotFoundError, match="no folder me/other, and the Hub has no model of this name"):
        hub.find_model("me/other")
    fake_hub(monkeypatch, down=True)
    with pytest.raises(FileNotFoundError, match="no folder me/mine, and the Hub cannot be asked"):
        hub.find_model("me/mine")
    cached = tmp_path / "models--me--mine"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    assert hub.find_model("me/mine") == str(cached / "snapshots" / "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.find_model("me/mine") == "me/mine"


def test_the_hub_is_asked_once_for_a_model_and_again_later(monkeypatch):
    for down in (False, True):
        asked = fake_hub(monkeypatch, "me/mine", down=down)
        for _ in range(3):  # as a model, its configuration and its processor are loaded
            assert (hub.ask_hub("me/mine", "model") is None) != down
        assert asked == ["me/mine"]
        hub.ask_hub("me/mine", "data set")
        monkeypatch.setattr(hub, "ANSWER_LASTS", 0)
        hub.ask_hub("me/mine", "model")
        assert asked == ["me/mine"] * 3
        monkeypatch.undo()


def test_no_code_in_weights_runs(world, command, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    pickled(tmp_path / "model")
    code, printed = command("ask", model=tmp_path / "model")
    check_message(code, printed, "save_pretrained")
    assert not (tmp_path / "exploited").exists()


def test_a_missing_sam_checkpoint_says_where_to_get_it(command, tmp_path):
    code, printed = command("masks", sam=tmp_path / "sam.pth")
    check_message(code, printed, f"no SAM checkpoint {tmp_path / 'sam.pth'}")
    assert "--checkpoint" in printed
    assert "https://dl.fbaipublicfiles.com/segment_anything/" in printed


# --- the front door ---


def test_the_traceback_is_shown_on_request(monkeypatch, capsys, world, tmp_path):
    for debug in ([], ["--debug"]):
        code, printed = run(monkeypatch, capsys, *debug, "data", "check", tmp_path / "none.json")
        assert code == 2
        assert printed.count("agevlm: error:") == 1
        assert ("Traceback" in printed) == bool(debug)


def test_an_unexpected_error_says_so(monkeypatch, capsys, world):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("agevlm.data.check.check_row", fail)
    for debug in ([], ["--debug"]):
        code, printed = run(monkeypatch, capsys, *debug, "data", "check", world / "rows.json")
        assert code == 70
        assert "agevlm: unexpected error: ZeroDivisionError: a bug" in printed
        assert "agevlm --debug data" in printed
        assert ("Traceback" in printed) == bool(debug)


def test_too_little_memory(monkeypatch, capsys, world):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("agevlm.data.check.check_row", fail)
        code, printed = run(monkeypatch, capsys, "data", "check", world / "rows.json")
        check_message(code, printed, "not enough memory")


def test_findings_have_a_code_of_their_own(monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"images": [], "messages": []}]))
    code, printed = run(monkeypatch, capsys, "data", "check", tmp_path / "rows.json")
    assert code == 1
    assert "agevlm: error" not in printed


@pytest.mark.parametrize(
    "words", [["nonsense"], ["ask"], ["train", "--nonsense"], ["eval", "pope", "--batch-size", "[/b]"]]
)
def test_a_wrong_command_line(words, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 2
    assert "Traceback" not in printed


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"agevlm {agevlm.__version__}\n")


def test_every_command_is_in_the_table():
    names = {
        " ".join(filter(None, (group.name, item.name or item.callback.__name__)))
        for group in [typer_group(app), *app.registered_groups]
        for item in group.typer_instance.registered_commands
    }
    assert names == {name.split(" --")[0] for name in COMMANDS}


def typer_group(typer_app):
    return SimpleNamespace(name=None, typer_instance=typer_app)


STARTED = """
import signal, sys
sys.argv = ["agevlm", *{arguments!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it

class Slow:  # an import that a user grows tired of
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.{signal})

sys.meta_path.insert(0, Slow())
from agevlm.cli import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "module", "code", "message"),
    [
        ("SIGINT", "typer", 130, "agevlm: interrupted"),
        ("SIGINT", "numpy", 130, "agevlm: interrupted"),
        ("SIGINT", "torch.nn", 130, "agevlm: interrupted"),
        ("SIGTERM", "torch.nn", 143, "agevlm: terminated"),
    ],
)
def test_a_signal_during_imports(sent, module, code, message, tmp_path):
    words = ["data", "check", "rows.json"]
    (tmp_path / "rows.json").write_text("[]")
    done = subprocess.run(
        [sys.executable, "-c", STARTED.format(arguments=words, module=module, signal=sent)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{message}\n")


def test_little_is_loaded_before_interrupts_are_handled():
    """Nothing but the standard library and what `import agevlm` needs."""
    code = "import sys; import agevlm.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= {
        "__main__",
        "agevlm",
        "lazy_loader",
        "packaging",
    }
