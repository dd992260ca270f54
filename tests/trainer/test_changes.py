# SPDX-License-Identifier: Apache-2.0
"""Runs that are resumed with other settings or data: what is free, what is refused by name, what is accepted and takes effect."""

import json
import shutil

import datasets
import pytest
import torch
import yaml
from command_line import check_refused
from safetensors.torch import load_file
from tiny_training import dataset, rows, tiny_processor, tiny_trainable
from transformers import Trainer, TrainerState

import agevlm
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer import AgeVlmTrainer
from agevlm.trainer.changes import sample_digest

pytestmark = pytest.mark.slow

BATCH = "per_device_train_batch_size x gradient_accumulation_steps x devices"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A recipe and its run of four steps, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_trainable().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(12).save_to_disk(folder / "rows")
    values = {
        "model": str(folder / "model"),
        "data": [{"path": str(folder / "rows")}],
        "training": {
            "output_dir": str(folder / "out"), "stage": "guide", "max_steps": 4, "save_steps": 2, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_cpu": True,
            "disable_tqdm": True, "report_to": "none", "optim": "sgd",
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    agevlm.train(folder / "recipe.yaml")
    return folder


@pytest.fixture
def stopped(begun, tmp_path):
    """What a run that was stopped after its second step has left, in a folder of another place."""
    shutil.copytree(begun / "out" / "checkpoint-2", tmp_path / "moved" / "checkpoint-2")
    return tmp_path / "moved"


def resume(begun, stopped, *overrides, **options) -> Trainer:
    return agevlm.train(
        begun / "recipe.yaml", [f"training.output_dir={stopped}", *overrides], resume=True, **options
    )  # fmt: skip


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_what_does_not_change_the_result_is_free(begun, stopped):
    trainer = resume(
        begun, stopped, "training.logging_steps=2", "training.save_steps=1", "training.dataloader_num_workers=1",
        "training.seed=42", "training.save_total_limit=1",
    )  # fmt: skip
    expected, ended = (load_file(folder / "model.safetensors") for folder in (begun / "out", stopped))
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())
    assert list(logged(trainer, "loss")) == [1, 2, 4], "two of the checkpoint, and then every second"
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-4"]
    assert json.loads((stopped / "training.json").read_text())["changes"] == []


def test_a_step_may_be_shared_in_another_way(begun, stopped, monkeypatch):
    """The same rows train in each step, whose loss and gradient are means over them."""
    whole = json.loads((begun / "out" / "training.json").read_text())["log_history"]
    trainer = resume(
        begun, stopped, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"
    )
    for name in ("loss", "grad_norm", "guided_phrases"):
        expected = {log["step"]: log[name] for log in whole if name in log}
        assert logged(trainer, name) == pytest.approx(expected, rel=1e-4)


REFUSED = {
    "training.learning_rate=0.5": "training.learning_rate was 0.001 and is 0.5",
    "training.max_steps=6": "training.max_steps was 4 and is 6",
    "training.seed=1": "training.seed was 42 and is 1",
    "training.guidance_weight=0.5": "training.guidance_weight was 1.0 and is 0.5",
    "training.per_device_train_batch_size=4": f"training.{BATCH} was 2 and is 4",
    "training.tokens_per_batch=90": "training.tokens_per_batch was None and is 90",
    "model_args.dtype=bfloat16": "model_args.dtype was 'float32' and is 'bfloat16'",
    "data.0.rows=6": "data.0.rows was None and is 6",
    "data.0.path={rows}": "data.0.path was",
    "model={model}": "model was",
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_settings_are_refused_by_name(change, begun, stopped, tmp_path, monkeypatch, capsys):
    """Before weights are loaded or anything is written."""
    monkeypatch.setattr("agevlm.trainer.recipe._load", None)
    for name in ("rows", "model"):
        shutil.copytree(begun / name, tmp_path / name)
    change, message = change.format(rows=tmp_path / "rows", model=tmp_path / "model"), REFUSED[change]
    command = ["train", begun / "recipe.yaml", f"training.output_dir={stopped}", "--resume", change]
    check_refused(monkeypatch, capsys, stopped, message, *command)
    check_refused(monkeypatch, capsys, stopped, "accept them with --accept-changes", *command)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("training.stage=full", "the state of the checkpoint's optimizer is of the former"),
        ("training.optim=adamw_torch", "the state of the checkpoint's optimizer is of the former"),
        ("training.group_learning_rates={adapter: 1e-4}", "the state of the checkpoint's optimizer is of the former"),
        ("training.initial_gate=20", "it acts when a stage begins"),
        ("training.lr_scheduler_type=reduce_lr_on_plateau", "the scheduler keeps the learning rate in the checkpoint"),
    ],
)
def test_what_could_not_take_effect_is_not_accepted(change, reason, begun, stopped, monkeypatch, capsys):
    monkeypatch.setattr("agevlm.trainer.recipe._load", None)
    command = ["train", begun / "recipe.yaml", f"training.output_dir={stopped}", change, "--accept-changes"]
    if "plateau" in change:
        command += ["training.eval_strategy=epoch", f"eval_data=[{{path: {begun / 'rows'}}}]"]
    check_refused(monkeypatch, capsys, stopped, f"cannot be changed: {reason}", *command, "--resume")
    check_refused(monkeypatch, capsys, stopped, "--accept-changes is for a run that resumes", *command)


def test_accepted_changes_take_effect_and_are_recorded(begun, stopped, tmp_path):
    trainer = resume(begun, stopped, "training.learning_rate=0.5", "training.max_steps=3", accept_changes=True)
    assert logged(trainer, "learning_rate") == {1: 1e-3, 2: 1e-3, 3: 0.5}
    start, end = (load_file(folder / "model.safetensors") for folder in (stopped / "checkpoint-2", stopped))
    moved = sum((end[name] - tensor).square().sum() for name, tensor in start.items()).sqrt()
    # Of SGD, whose gradients are clipped to 1.
    assert moved == pytest.approx(0.5 * min(1.0, logged(trainer, "grad_norm")[3]), rel=1e-3)
    changes = [
        {"step": 2, "changes": "training.learning_rate was 0.001 and is 0.5; training.max_steps was 4 and is 3"}
    ]
    assert json.loads((stopped / "training.json").read_text())["changes"] == changes
    # What was accepted goes with the next checkpoint.
    with pytest.raises(
        FileExistsError, match=r"training\.learning_rate was 0\.5 and is 0\.001; training\.max_steps was 3"
    ):
        resume(begun, stopped)
    shutil.rmtree(stopped / "checkpoint-2")
    resume(begun, stopped, "training.learning_rate=0.5", "training.max_steps=3")
    assert json.loads((stopped / "training.json").read_text())["changes"] == changes


# --- data ---


def test_other_data_under_the_same_path_are_refused(begun, tmp_path):
    out, data = tmp_path / "out", tmp_path / "rows.parquet"
    dataset(12).to_parquet(data)
    overrides = [f"training.output_dir={out}", f"data.0.path={data}", "training.max_steps=1", "training.save_steps=1"]
    agevlm.train(begun / "recipe.yaml", overrides)
    shutil.rmtree(out / "checkpoint-1" / "nothing", ignore_errors=True)
    other_image = rows(12)
    other_image[0]["images"] = [other_image[0]["images"][0].transpose(0)]
    other_text = rows(12)
    other_text[-1]["messages"][1]["content"][0]["text"] += "!"
    for changed, expected in (
        (dataset(11), "train_dataset.rows was 12 and is 11"),
        (datasets.Dataset.from_list(other_image, features=dataset(1).features), "train_dataset.sample was"),
        (datasets.Dataset.from_list(other_text, features=dataset(1).features), "train_dataset.sample was"),
    ):
        changed.to_parquet(data)
        with pytest.raises(FileExistsError, match=expected):
            agevlm.train(begun / "recipe.yaml", overrides, resume=True)
    dataset(12).to_parquet(data)  # written anew, with the same rows
    agevlm.train(begun / "recipe.yaml", overrides, resume=True)


def test_another_processor_under_the_same_path_is_refused(begun, stopped):
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(FileExistsError, match=r"processor\.image_mean was \[0\.4.* and is \[0\.5, 0\.5, 0\.5\]"):
        resume(begun, stopped, processor=processor)
    processor = tiny_processor()
    processor.chat_template += "!"
    with pytest.raises(FileExistsError, match=r"processor\.chat_template was"):
        resume(begun, stopped, processor=processor)
    resume(begun, stopped, processor=tiny_processor())


def test_a_sample_of_data_is_that_of_their_contents(tmp_path):
    whole = dataset(9)
    known = sample_digest(whole)
    whole.save_to_disk(tmp_path / "rows")
    whole.to_parquet(tmp_path / "rows.parquet")
    for same in (
        datasets.load_from_disk(tmp_path / "rows"),
        datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")),
        datasets.concatenate_datasets([whole, whole]).select(range(9)),
    ):
        assert sample_digest(same) == known
    assert len({known, sample_digest(whole.select(range(8))), sample_digest(whole.select([1, 0, *range(2, 9)]))}) == 3
    many = datasets.Dataset.from_dict({"number": list(range(100_000))})
    assert sample_digest(many) != sample_digest(
        many.map(lambda row: {"number": -row["number"]}, cache_file_name=str(tmp_path / "many.arrow"))
    )
    assert sample_digest(whole.select([])) != known

    for folder in ("here", "there"):  # images in files: their contents, not their places
        (tmp_path / folder).mkdir()
        rows(1)[0]["images"][0].save(tmp_path / folder / "a.png")
    found = set()
    for folder in ("here", "there"):
        found.add(
            sample_digest(
                datasets.Dataset.from_dict({"image": [str(tmp_path / folder / "a.png")]}).cast_column(
                    "image", datasets.Image()
                )
            )
        )
    assert len(found) == 1
    (tmp_path / "here" / "a.png").write_bytes(b"another")
    found.add(
        sample_digest(
            datasets.Dataset.from_dict({"image": [str(tmp_path / "here" / "a.png")]}).cast_column(
                "image", datasets.Image()
            )
        )
    )
    assert len(found) == 2


# --- stages ---


def test_stages_not_begun_are_free_and_finished_ones_are_not(begun, tmp_path):
    class Failing(AgeVlmTrainer):
        def train(self, *args, **kwargs):
            if self.args.output_dir.endswith("2_guide"):
                raise ZeroDivisionError
            return super().train(*args, **kwargs)

    recipe, out = begun / "recipe.yaml", tmp_path / "out"
    overrides = [
        f"training.output_dir={out}", "training.save_steps=1", "training.max_steps=2",
        "stages=[{name: align, share: 0.5, training: {stage: align}}, {name: guide, share: 0.5, training: {stage: guide}}]",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        agevlm.train(recipe, overrides, trainer_class=Failing)
    with pytest.raises(
        FileExistsError, match=r"1_align is a finished stage of other settings .*training\.seed was 42 and is 1"
    ):
        agevlm.train(recipe, [*overrides, "training.seed=1"], resume=True, accept_changes=True)
    change = "stages.guide.training.learning_rate=0.25"
    agevlm.train(recipe, [*overrides, change], resume=True)
    records = [json.loads((out / name / "training.json").read_text()) for name in ("1_align", "2_guide")]
    rates = [[log["learning_rate"] for log in record["log_history"] if "loss" in log] for record in records]
    assert rates == [[1e-3], [0.25]]
    assert json.loads((out / "training.json").read_text())["changes"] == {"align": [], "guide": []}
    (out / "1_align" / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"1_align/training\.json is damaged"):
        agevlm.train(recipe, [*overrides, change], resume=True)


# --- other trainers, other checkpoints ---


class Plain(Trainer):
    """Transformers' own, with the collator that AGE-VLM needs."""

    def __init__(self, *, processing_class, **kwargs):
        collator = AgeVlmDataCollator(processing_class)
        super().__init__(processing_class=processing_class, data_collator=collator, **kwargs)


def test_a_trainer_of_ones_own_keeps_the_recipe_too(begun, tmp_path):
    overrides = ["training.max_steps=1", "training.save_steps=1", "training.remove_unused_columns=false"]
    overrides.append(f"training.output_dir={tmp_path / 'out'}")
    agevlm.train(begun / "recipe.yaml", overrides, trainer_class=Plain)
    agevlm.train(begun / "recipe.yaml", overrides, trainer_class=Plain, resume=True)
    change = [*overrides, "training.learning_rate=0.5"]
    with pytest.raises(FileExistsError, match=r"training\.learning_rate was 0\.001 and is 0\.5"):
        agevlm.train(begun / "recipe.yaml", change, trainer_class=Plain, resume=True)
    with pytest.raises(ValueError, match="Plain would keep the checkpoint's settings"):
        agevlm.train(begun / "recipe.yaml", change, trainer_class=Plain, resume=True, accept_changes=True)


def test_a_checkpoint_without_a_recipe_or_a_file_is_refused(begun, stopped, monkeypatch, capsys):
    command = ["train", begun / "recipe.yaml", f"training.output_dir={stopped}", "--resume"]
    checkpoint = stopped / "checkpoint-2"
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    del state.stateful_callbacks["recipe"]
    state.save_to_json(str(checkpoint / "trainer_state.json"))
    check_refused(monkeypatch, capsys, stopped, "has no recipe to compare with", *command)
    monkeypatch.setattr("agevlm.trainer.recipe._load", None)
    (checkpoint / "scheduler.pt").write_bytes(b"")
    check_refused(monkeypatch, capsys, stopped, "scheduler.pt is damaged", *command)
    (checkpoint / "optimizer.pt").unlink()
    check_refused(monkeypatch, capsys, stopped, "has no optimizer.pt, without which nothing can resume", *command)
    monkeypatch.undo()
    shutil.copytree(begun / "out" / "checkpoint-2", checkpoint, dirs_exist_ok=True)
    state.save_to_json(str(checkpoint / "trainer_state.json"))
    resume(begun, stopped, accept_changes=True)
    assert json.loads((stopped / "training.json").read_text())["changes"] == [
        {"step": 2, "changes": "the checkpoint had no recipe"}
    ]


# --- data and folders of no use ---


def test_empty_data_and_folders_that_cannot_be_written_are_told(begun, tmp_path, monkeypatch, capsys):
    dataset(2).select([]).save_to_disk(tmp_path / "empty")
    monkeypatch.setattr("agevlm.trainer.recipe._load", None)
    command = ["train", begun / "recipe.yaml", f"training.output_dir={tmp_path / 'out'}"]
    check_refused(
        monkeypatch,
        capsys,
        tmp_path,
        f"{tmp_path / 'empty'} has no rows",
        *command,
        f"data.0.path={tmp_path / 'empty'}",
    )
    dataset(2).select([]).to_parquet(tmp_path / "empty.parquet")
    check_refused(
        monkeypatch, capsys, tmp_path, "empty.parquet has no rows", *command, "training.eval_strategy=epoch",
        f"eval_data=[{{path: {tmp_path / 'empty.parquet'}}}]",
    )  # fmt: skip
    # Read-only for everyone, root included.
    check_refused(
        monkeypatch, capsys, tmp_path, "Cannot write in /proc/none", *command, "training.output_dir=/proc/none"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no recipe"),
        (b"", "must be a mapping with model, data and training, got None"),
        (b"[1, 2]", "must be a mapping with model, data and training"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not YAML"),
        (b"\x00" * 100, "is not YAML"),
        (b"[" * 5000, "is nested too deeply"),
        (b"{a: " * 5000, "is nested too deeply"),
        (b"a: &a [*a]", "is nested too deeply"),
        (b"a: !!timestamp x", "is not YAML"),
    ],
)
def test_recipes_that_are_none(content, message, tmp_path, monkeypatch, capsys):
    file = tmp_path / "recipe.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    check_refused(monkeypatch, capsys, tmp_path, message, "train", file)
