# SPDX-License-Identifier: Apache-2.0
"""Training on data that are read on the way: recipes with `streaming: true`, stopped and resumed, with bad rows, and refused."""

import itertools
import json
import shutil

import datasets
import pytest
import torch
import yaml
from command_line import check_refused, run
from safetensors.torch import load_file
from tiny_training import dataset, tiny_processor, tiny_trainable
from training_runs import streamed_number

import agevlm
from agevlm.data.readers import stored_images
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer import AgeVlmTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

ROWS = 12


def spoil(rows: datasets.Dataset, number: int) -> datasets.Dataset:
    """The rows with a damaged image in one of them."""
    stored = [row | {"images": [*row["images"]]} for row in stored_images(rows)]
    stored[number]["images"] = [{"bytes": b"no image", "path": "damaged.png"}]
    return datasets.Dataset.from_list(stored, features=rows.features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a parquet file of rows in three groups, one of whose rows is bad in another file, and a recipe."""
    folder = tmp_path_factory.mktemp("streams")
    tiny_trainable().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(ROWS).to_parquet(folder / "rows.parquet", batch_size=4)
    spoil(dataset(ROWS), 4).to_parquet(folder / "bad.parquet", batch_size=4)
    dataset(4).save_to_disk(folder / "saved")
    values = {
        "model": str(folder / "model"),
        "data": [{"path": str(folder / "rows.parquet"), "streaming": True}],
        "training": {
            "output_dir": str(folder / "out"), "stage": "guide", "max_steps": 6, "save_steps": 4, "logging_steps": 1,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_cpu": True,
            "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def seen(monkeypatch) -> list[list[int]]:
    """The rows of the batches that are collated in this process, by their numbers among all."""
    batches: list[list[int]] = []
    collate = AgeVlmDataCollator.__call__

    def remember(self, rows):
        batches.append([streamed_number(row) for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(AgeVlmDataCollator, "__call__", remember)
    return batches


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_resumed_run_is_that_of_an_undisturbed_one(folder, tmp_path, seen):
    """In the second epoch of the data, whose rows were shuffled again: to the last bit, and nothing is collated twice."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    agevlm.train(folder / "recipe.yaml", [f"training.output_dir={whole}"])
    expected = list(seen)
    epochs = [list(itertools.chain(*expected[start : start + 6])) for start in (0, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]

    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    seen.clear()
    trainer = agevlm.train(folder / "recipe.yaml", [f"training.output_dir={resumed}"], resume=True)
    assert seen == expected[8:]  # with the one that was taken ahead
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    logs = json.loads((whole / "training.json").read_text())["log_history"]
    kept = ("loss", "epoch", "grad_norm", "guidance_loss", "learning_rate", "step")
    for log, other in zip(logs[:-1], trainer.state.log_history[:-1], strict=True):
        assert {name: log[name] for name in kept} == {name: other[name] for name in kept}


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_run_that_was_stopped_behind_its_last_step_only_saves_its_model(streaming, folder, tmp_path):
    options = [f"data.0.streaming={streaming}", "training.max_steps=2", "training.lr_scheduler_type=constant"]
    agevlm.train(folder / "recipe.yaml", [*options, f"training.output_dir={tmp_path / 'whole'}"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    options.append(f"training.output_dir={tmp_path / 'resumed'}")
    assert agevlm.train(folder / "recipe.yaml", options, resume=True).state.global_step == 2
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_workers_are_a_part_of_the_settings_and_resume_as_well(folder, tmp_path, monkeypatch, capsys):
    options = ["training.dataloader_num_workers=2", "training.max_steps=3", "training.save_steps=2"]
    agevlm.train(folder / "recipe.yaml", [*options, f"training.output_dir={tmp_path / 'whole'}"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    options.append(f"training.output_dir={tmp_path / 'resumed'}")
    message = "training.dataloader_num_workers was 2 and is 1"
    changed = [*options, "training.dataloader_num_workers=1"]
    check_refused(
        monkeypatch, capsys, tmp_path / "resumed", message, "train", folder / "recipe.yaml", "--resume", *changed
    )
    agevlm.train(folder / "recipe.yaml", options, resume=True)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_bad_rows_are_left_out_on_the_way_or_stop_training(folder, tmp_path, seen, monkeypatch, capsys):
    bad = [f"data.0.path={folder / 'bad.parquet'}", f"training.output_dir={tmp_path / 'out'}"]
    code, printed = run(monkeypatch, capsys, "train", folder / "recipe.yaml", *bad)
    assert code == 2
    assert f"{folder / 'bad.parquet'}, part 2 of 3, row 0: " in printed
    assert "`on_bad_row: skip`" in printed
    assert not (tmp_path / "out").exists()
    seen.clear()
    code, printed = run(monkeypatch, capsys, "train", folder / "recipe.yaml", *bad, "data.0.on_bad_row=skip")
    assert code == 0, printed
    trained = list(itertools.chain(*seen[:12]))
    assert len(trained) == 24
    assert sorted(trained[:11]) == sorted(set(range(ROWS)) - {4}), "an epoch, without the bad row"
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    (kind,) = record["left_out"]
    assert kind == "cannot be trained on"
    assert record["metrics"]["skipped_rows"] == record["left_out"][kind]["rows"] == 3, "once in each epoch that began"
    assert record["left_out"][kind]["first"].startswith(f"{folder / 'bad.parquet'}, part 2 of 3, row 0: ")
    assert "Left out on the way: 3 rows, cannot be trained on" in printed


def test_an_evaluation_of_streamed_rows_is_of_the_same_rows_each_time(folder, tmp_path, seen):
    part = f"{{path: {folder / 'rows.parquet'}, streaming: true, rows: 5}}"
    options = ["training.eval_strategy=steps", "training.eval_steps=1", "training.per_device_eval_batch_size=8"]
    options += [f"eval_data=[{part}]", f"training.output_dir={tmp_path / 'out'}", "training.max_steps=2"]
    agevlm.train(folder / "recipe.yaml", options)
    evaluations = [batch for batch in seen if len(batch) == 5]
    assert len(evaluations) == 2
    assert evaluations[0] == evaluations[1]
    assert len(set(evaluations[0])) == 5


REFUSED = {
    # 12 rows of 3 epochs, and 4 in a step.
    "A stream (`streaming: true`) has no end: set training.max_steps (9 for 3 epochs)": ["training.max_steps=-1"],
    "tokens_per_batch needs the length of every row": ["training.tokens_per_batch=90"],
    "train_sampling_strategy=group_by_length needs all rows": ["training.train_sampling_strategy=group_by_length"],
    "`features` are computed for all images before training": ["features=features"],
    "an evaluation reads the same rows each time": [
        "eval_data=[{path: {folder}/rows.parquet, streaming: true}]", "training.eval_strategy=steps",
    ],
    "weight_by looks at all rows before training": ["data.0.weight_by={kind: {a: 1}}"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_stream_cannot_do_is_named(message, folder, tmp_path, monkeypatch, capsys):
    options = [option.replace("{folder}", str(folder)) for option in REFUSED[message]]
    options.append(f"training.output_dir={tmp_path / 'out'}")
    (tmp_path / "out").mkdir()
    check_refused(monkeypatch, capsys, tmp_path / "out", message, "train", folder / "recipe.yaml", *options)


def test_a_trainer_that_cannot_share_a_stream_is_refused(folder, tmp_path):
    from transformers import Trainer

    class Plain(Trainer):
        pass

    with pytest.raises(ValueError, match="Plain cannot read a stream"):
        agevlm.train(folder / "recipe.yaml", [f"training.output_dir={tmp_path / 'out'}"], trainer_class=Plain)
    assert issubclass(AgeVlmTrainer, Trainer)
