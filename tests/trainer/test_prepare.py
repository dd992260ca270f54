# SPDX-License-Identifier: Apache-2.0
"""`agevlm data prepare`: what it counts is what training does, nothing is looked at twice, and bad rows are found before."""

import json
import shutil
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from command_line import run
from grounded_rows import photograph
from PIL import Image
from tiny_training import dataset, tiny_processor, tiny_trainable

import agevlm
from agevlm.data import FeatureStore, verdicts
from agevlm.data.readers import stored_images
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer import estimate, prepare, recipe
from agevlm.trainer.trainer import AgeVlmTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

ROWS = 13


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, good rows, and a LLaVA file with two images that are missing and one that is damaged."""
    folder = tmp_path_factory.mktemp("world")
    tiny_trainable().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(ROWS).save_to_disk(folder / "rows")
    (folder / "images").mkdir()
    entries = []
    for number in range(8):
        if number not in (2, 5):
            Image.fromarray(np.full((20, 30, 3), 30 * number, np.uint8)).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Gray {number}."}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    damaged = folder / "images" / "6.png"  # a JPEG whose header is whole
    photograph(0, (64, 64)).save(damaged, "JPEG")
    damaged.write_bytes(damaged.read_bytes()[:-200])
    (folder / "llava.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(autouse=True)
def _one_estimate(monkeypatch):
    """Estimates have tests of their own, and are the same for the same batch here."""
    cost = estimate.StepCost(10**9, {"float32": 10**6}, 10, 20, 30, 40, visual_tokens=16)
    monkeypatch.setattr(prepare, "estimate_step", lambda *args, **options: cost)


def write(world, tmp_path, *parts, stages=None, **training):
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "report_to": "none", "stage": "guide"}
    settings |= {"output_dir": str(tmp_path / "out"), "disable_tqdm": True, "save_strategy": "no", **training}
    data = [{**part, **{k: str(world / part[k]) for k in ("path", "images") if k in part}} for part in parts]
    content = {"model": str(world / "model"), "data": data, "training": settings}
    if stages:
        content["stages"] = stages
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


GOOD = {"path": "rows"}
LLAVA = {"path": "llava.json", "format": "llava", "images": "images"}


@pytest.fixture
def looked(monkeypatch):
    """The rows that were looked at, by their texts."""
    seen = []

    def look(row, collator):
        seen.append(str(row["messages"]))
        return original(row, collator)

    original = verdicts.look_at_row
    monkeypatch.setattr(verdicts, "look_at_row", look)
    return seen


def do(file, *overrides, **options):
    return prepare.prepare_recipe(file, overrides, num_proc=1, progress=False, **options)


def test_what_is_counted_is_what_trains(world, tmp_path, monkeypatch):
    file = write(world, tmp_path, GOOD, {**GOOD, "rows": 4}, gradient_accumulation_steps=2)
    found = do(file, gpus=1)
    (stage,) = found.stages
    collate = AgeVlmDataCollator(tiny_processor(), grid=(4, 4))
    rows = list(stored_images(dataset(ROWS)))
    batches = [collate([row]) for row in rows]
    part = stage.parts[0]
    assert part.rows == ROWS
    assert part.images == sum(len(row["images"]) for row in rows)
    assert part.phrases == part.masks == sum(len(row["grounding"]) for row in rows)
    assert part.text_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert stage.visual_tokens == 16 * (part.images + stage.parts[1].images)
    # The trainer that trains says how many steps it makes, and its batches how long they are.
    shapes = []

    class Trainer(AgeVlmTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            shapes.append(inputs["input_ids"].shape)
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = agevlm.train(file, trainer_class=Trainer)
    assert stage.steps == trainer.state.global_step
    assert stage.epochs == trainer.state.epoch
    assert len(shapes) == 2 * stage.batches
    assert stage.batch.rows == max(shape[0] for shape in shapes)
    assert stage.longest.tokens == max(shape[1] for shape in shapes)
    assert stage.flops == 10**9 * 2 * stage.steps
    written = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert written["stages"][0]["steps"] == stage.steps
    assert f"{part.text_tokens:,}" in (tmp_path / "out" / "prepared.md").read_text()


@pytest.mark.parametrize("weights", [False, True])
def test_batches_by_tokens_and_weights_are_those_of_the_trainer(world, tmp_path, weights):
    parts = [{**GOOD, "weight": 3}, {**GOOD, "rows": 5, "weight": 1}] if weights else [GOOD]
    file = write(world, tmp_path, *parts, num_train_epochs=1, **({} if weights else {"tokens_per_batch": 70}))
    (stage,) = do(file).stages
    assert stage.steps == agevlm.train(file).state.global_step
    several = do(file, gpus=3).stages[0]
    assert several.batches == -(-stage.batches // 3)


def test_streamed_parts_are_estimated_from_some_rows(world, tmp_path, monkeypatch):
    """And not copied. Here they are all rows, and then three of four."""
    whole = do(write(world, tmp_path, GOOD)).stages[0].parts[0]
    file = write(world, tmp_path, {**GOOD, "streaming": True}, max_steps=3)
    (stage,) = do(file).stages
    assert (stage.parts[0].rows, stage.parts[0].text_tokens) == (ROWS, whole.text_tokens)
    assert stage.steps == 3
    monkeypatch.setattr(prepare, "_SAMPLE", 9)
    (stage,) = do(file).stages
    assert (stage.parts[0].rows, stage.parts[0].sampled) == (ROWS, 9)
    assert stage.parts[0].text_tokens == pytest.approx(whole.text_tokens, rel=0.15)
    with pytest.raises(ValueError, match="max_steps"):
        do(write(world, tmp_path, {**GOOD, "streaming": True}))


def test_bad_rows_of_a_streamed_part_are_counted(world, tmp_path):
    part = {**LLAVA, "streaming": True}
    (found,) = do(write(world, tmp_path, {**part, "on_bad_row": "skip"}, max_steps=3)).stages[0].parts
    assert (found.rows, found.sampled, sum(found.dropped.values())) == (5, 8, 3)
    (found,) = do(write(world, tmp_path, part, max_steps=3)).stages[0].parts
    assert sorted(entry["row"] for entry in found.bad) == [2, 5, 6]
    file = write(world, tmp_path, GOOD, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="say how many as `rows`"):  # as training
        do(file, f"eval_data=[{{path: {world / 'rows'}, streaming: true}}]")


def test_no_row_is_looked_at_twice(world, tmp_path, looked):
    stages = [
        {"name": "a", "training": {"stage": "align", "guidance_weight": 0}},
        {"name": "b", "training": {"stage": "guide"}},
    ]
    file = write(world, tmp_path, GOOD, {**GOOD, "rows": 5}, stages=stages, max_steps=1)
    do(file)
    assert len(looked) == ROWS
    do(file, "stages.a.data=[{path: " + str(world / "rows") + ", rows: 3}]")
    assert len(looked) == ROWS
    do(file, "training.max_length=20")  # another collator
    assert len(looked) == 2 * ROWS


def test_a_stopped_call_goes_on(world, tmp_path, looked, monkeypatch):
    monkeypatch.setattr(verdicts, "_PIECE", 4)
    file, row = write(world, tmp_path, GOOD), verdicts.look_at_row

    def stop(example, collator):
        if len(looked) == 10:
            raise KeyboardInterrupt
        return row(example, collator)

    monkeypatch.setattr(verdicts, "look_at_row", stop)
    with pytest.raises(KeyboardInterrupt):
        do(file)
    before = len(looked)
    monkeypatch.setattr(verdicts, "look_at_row", row)
    assert do(file).stages[0].parts[0].rows == ROWS
    assert before == 10
    assert len(looked) - before == ROWS - 8  # two pieces of four were whole


@pytest.mark.minutes
def test_two_processes_find_what_one_does(world, tmp_path, monkeypatch):
    file = write(world, tmp_path, GOOD, {**LLAVA, "on_bad_row": "skip"})
    monkeypatch.setattr(verdicts, "_PIECE", 3)
    cache = tmp_path / "cache" / "agevlm"
    two = prepare.prepare_recipe(file, num_proc=2, progress=False)
    shutil.rmtree(cache)
    one = do(file)
    assert two.to_json() == one.to_json()


def test_bad_rows_are_left_out_and_training_reads_none_for_it(world, tmp_path, monkeypatch):
    file = write(world, tmp_path, {**LLAVA, "on_bad_row": "skip"}, num_train_epochs=1)
    (part,) = do(file).stages[0].parts
    assert part.rows == 5
    assert part.dropped.pop("missing image (entries)") == 2
    assert list(part.dropped.values()) == [1]

    def refuse(*args):
        raise AssertionError("a row was looked at again")

    monkeypatch.setattr(AgeVlmDataCollator, "find_problem", refuse)
    trainer = agevlm.train(file)
    assert len(trainer.train_dataset) == 5
    (skipped,) = json.loads((tmp_path / "out" / "skipped_rows.json").read_text())["train_dataset"]
    assert skipped["row"] == 6


def test_bad_rows_that_would_stop_training_end_with_exit_code_1(world, tmp_path, monkeypatch, capsys):
    file = write(world, tmp_path, GOOD, LLAVA)
    code, printed = run(monkeypatch, capsys, "data", "prepare", file, "--num-proc", 1, "--report", tmp_path / "r.json")
    assert code == 1
    for name in ("2.png", "5.png", "6.png"):
        assert f"images/{name}" in printed
    assert "at 3 bad rows" in printed
    assert json.loads((tmp_path / "r.json").read_text())["bad_rows"] == 3
    assert "row 6" in (tmp_path / "r.md").read_text()


def test_a_stage_whose_model_is_not_there_yet(world, tmp_path, monkeypatch, capsys):
    file = write(world, tmp_path, GOOD)
    later = f"model={tmp_path / 'first_stage'}"
    code, printed = run(monkeypatch, capsys, "data", "prepare", file, later)
    assert code == 2
    assert "first_stage" in printed
    assert "--model" in printed
    code, printed = run(
        monkeypatch, capsys, "data", "prepare", file, later, "--model", world / "model", "--num-proc", 1
    )
    assert code == 0, printed


def test_features_are_computed(world, tmp_path):
    file = write(world, tmp_path, GOOD, stage="align")
    found = do(file, f"features={tmp_path / 'features'}")
    different = {image.tobytes() for row in dataset(ROWS) for image in row["images"]}
    assert len(FeatureStore(tmp_path / "features")) == len(different)
    assert found.stages[0].features > 0


def test_no_gpu_is_used(world, tmp_path, monkeypatch):
    """On a machine that says it has one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    args = prepare._cpu_arguments(recipe.load_recipe(write(world, tmp_path, GOOD, tf32=True)))
    assert args.device.type == "cpu"


@pytest.mark.parametrize(("given", "seconds"), [({}, 24 * 3600), ({"ddp_timeout": 77}, 77)], ids=["default", "given"])
def test_the_processes_group_has_the_timeout(given, seconds, world, tmp_path, monkeypatch):
    """On the CPU too, where Transformers does not hand it on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        recipe.training_arguments(recipe.load_recipe(write(world, tmp_path, GOOD, **given)))
        backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=seconds)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_processes_wait_a_day_and_the_first_says_for_what(world, tmp_path, monkeypatch, capsys):
    file = write(world, tmp_path, {**LLAVA, "on_bad_row": "skip"}, max_steps=1)
    loaded = recipe.load_recipe(file)
    assert recipe.training_arguments(loaded).ddp_timeout == 24 * 3600
    loaded.training["ddp_timeout"] = 60
    assert recipe.training_arguments(loaded).ddp_timeout == 60
    code, printed = run(monkeypatch, capsys, "train", file)
    assert code == 0, printed
    assert printed.count(f"Converting {world / 'llava.json'}") == 1
    assert "agevlm data prepare" in printed
    shutil.rmtree(tmp_path / "out")
    assert "agevlm data prepare" not in run(monkeypatch, capsys, "train", file)[1]


@pytest.mark.parametrize("option", ["gpus", "gpu_tflops", "utilization"])
def test_numbers_that_are_none_are_refused(world, tmp_path, option):
    with pytest.raises(ValueError, match=option.replace("_", "-")):
        do(write(world, tmp_path, GOOD), **{option: 0})


def test_a_corrected_image_is_noticed(world, tmp_path, looked):
    """Prepare names a damaged image; its user writes a whole one under the same name."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "llava.json", tmp_path / "llava.json")
    part = {**LLAVA, "on_bad_row": "skip"}
    file = write(tmp_path, tmp_path, part)
    model = f"model={world / 'model'}"
    assert do(file, model).stages[0].parts[0].rows == 5
    image, before = tmp_path / "images" / "6.png", len(looked)
    shutil.copyfile(tmp_path / "images" / "4.png", image)
    (part,) = do(file, model).stages[0].parts
    assert part.rows == 6
    assert sum(part.dropped.values()) == 2
    assert len(looked) == before + 1
    do(file, model)
    assert len(looked) == before + 1


def test_a_part_without_a_good_row_is_refused_as_by_training(world, tmp_path, monkeypatch, capsys):
    entries = json.loads((world / "llava.json").read_text())
    (tmp_path / "damaged.json").write_text(json.dumps([entries[6]] * 3))
    part = {**LLAVA, "path": str(tmp_path / "damaged.json"), "on_bad_row": "skip"}
    file = write(world, tmp_path, part, GOOD, max_steps=1)
    message = f"{tmp_path / 'damaged.json'}: all of its 3 rows are bad; the first: Cannot read image"
    for command in (("data", "prepare"), ("train",)):
        code, printed = run(monkeypatch, capsys, *command, file)
        assert code == 2
        assert message in printed


def test_what_left_rows_out_is_said_in_short(world, tmp_path):
    """The kind, and neither names nor the fix."""
    (part,) = do(write(world, tmp_path, {**LLAVA, "on_bad_row": "skip"})).stages[0].parts
    (reason,) = set(part.dropped) - {"missing image (entries)"}
    assert reason.startswith("Cannot read image …: ")
    assert "Replace" not in reason


def test_a_folder_is_no_report(world, tmp_path, looked):
    with pytest.raises(ValueError, match="is a folder"):
        do(write(world, tmp_path, GOOD), report=world)
    assert not looked
