# SPDX-License-Identifier: Apache-2.0
"""Training in separate processes: two that share the work, one that is killed, one whose disk is full."""

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_runs
from tiny_training import tiny_processor
from training_runs import train

from agevlm import AgeVlmForConditionalGeneration
from agevlm.trainer import optimizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]

# ---------------------------------------------------------------------------------------- two processes

# By step of two processes with batches of two rows: text alone in the second process; phrases in both; no phrase
# anywhere, text alone in the first; no phrase, images in both; text alone in both; phrases in the second; in both.
KINDS = "12tt u313 tttu uuut tttt tt12 3321".replace(" ", "")
SHARED = {
    "kinds": KINDS,
    "per_device_train_batch_size": 2,
    "optim": "sgd",
    "learning_rate": 0.01,
    "num_train_epochs": 1,
}
# Optimizers whose steps do not depend on the sign of what is next to nothing: SGD, and Adam with a large epsilon.
CHECKPOINTING = {
    "stage": "guide",
    "gradient_checkpointing": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,
}
# No stage: all parameters of the model train, as under plain trainers.
EVERYTHING = {**CHECKPOINTING, "stage": None}
SHARDED = {**EVERYTHING, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
STREAM = {**CHECKPOINTING, "stream": True, "train_sampling_strategy": "random", "max_steps": 8, "save_steps": 5}
MUON = {"stage": "guide", "optim": "muon", "optim_args": "adamw_lr_scale=0.1", "adam_epsilon": 1e-3}
DIVERGED = {**CHECKPOINTING, "save_steps": 1, "max_steps": 5, "poison": [4, 1]}
STOPPED = ("diverged", "unlabeled")
CASES = {
    "ddp": {
        "full": {"stage": "full", "eval_kinds": "12t3uttt", "eval_strategy": "epoch", "per_device_eval_batch_size": 2},
        "checkpointing": {**CHECKPOINTING, "gradient_accumulation_steps": 2},
        "resumed": {**CHECKPOINTING, "gradient_accumulation_steps": 2, "resume": "checkpointing/checkpoint-2"},
        "sft": {"stage": "guide", "trainer": "sft"},
        "everything": {"stage": None, "ddp_find_unused_parameters": False},
        "tokens": {"stage": "guide", "tokens_per_batch": 90, "train_sampling_strategy": "random"},
        "muon": MUON,
        "stream": STREAM,
        "stream resumed": {**STREAM, "resume": "stream/checkpoint-5"},
        "diverged": DIVERGED,
        "unlabeled": {"stage": "guide", "max_length": 6, "max_steps": 2},
    },
    "fsdp": {
        "full": {"stage": "full", "eval_kinds": "12t3uttt", "eval_strategy": "epoch", "per_device_eval_batch_size": 2},
        "checkpointing": CHECKPOINTING,
        "resumed": {**CHECKPOINTING, "resume": "checkpointing/checkpoint-4"},
        "everything": SHARDED,
        "everything resumed": {**SHARDED, "resume": "everything/checkpoint-4"},
        "muon": MUON,
        "diverged": DIVERGED,
    },
}
LAUNCH = {
    "ddp": {"distributed_type": "MULTI_GPU"},  # with `use_cpu`; "MULTI_CPU" would start one process, without MPI
    "fsdp": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "AgeVlmDecoderLayer,AgeVlmCrossAttention",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        },
    },
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Callable[[str], Path]:
    """Of what shares the work, the folder of two processes that have trained all its cases; they are started once each."""
    return functools.cache(lambda kind: train_all(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=["ddp", "fsdp"])
def launched(request, launch) -> tuple[str, Path]:
    return request.param, launch(request.param)


def train_all(kind: str, folder: Path) -> Path:
    machine = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    config = folder / "config.json"
    config.write_text(json.dumps({**machine, **LAUNCH[kind]}))
    cases = {name: {**SHARED, **case} for name, case in CASES[kind].items()}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", training_runs.__file__, str(folder), json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


def results(launched: tuple[str, Path], case: str, tmp_path: Path) -> tuple[list[dict], dict]:
    """What each of the two processes returned, and what one process does that takes twice as many batches a step."""
    kind, folder = launched
    arguments = {**SHARED, **CASES[kind][case], "save_strategy": "no"}
    arguments.pop("fsdp_state_dict_type", None)
    arguments["gradient_accumulation_steps"] = 2 * arguments.get("gradient_accumulation_steps", 1)
    return [torch.load(folder / f"{case}-{i}.pt") for i in range(2)], train(tmp_path, **arguments)


def losses(result: dict) -> dict[int, dict]:
    """What was logged at each step."""
    names = ("loss", "lm_loss", "guidance_loss", "grad_norm", "learning_rate", "guided_phrases")
    return {log["step"]: {name: log.get(name) for name in names} for log in result["logs"] if "loss" in log}


@pytest.mark.parametrize(
    ("launched", "case"),
    [
        (kind, case)
        for kind in CASES
        for case in CASES[kind]
        if "resumed" not in case and case not in (*STOPPED, "stream")  # of which each process reads a share of its own
    ],
    indirect=["launched"],
)
def test_two_processes_log_and_learn_what_one_does(launched, case, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "fastest_dtype", lambda device: torch.float32)  # as the processes do
    (first, second), alone = results(launched, case, tmp_path)
    taken = [batch for pair in zip(first["batches"], second["batches"], strict=True) for batch in pair]
    assert taken == alone["batches"], "the same rows in each step, or there is nothing to compare"

    names = ("loss", "lm_loss", "grad_norm", "guidance_loss", "guided_phrases", "pointing_accuracy", "attention_iou")
    # Not the losses of an evaluation: Transformers averages them over batches, and counts the batches of all processes.
    names = {*names, *(f"eval_{name}" for name in names[3:])}
    logged, expected = (
        [{name: value for name, value in entry.items() if name in names} for entry in result["logs"]]
        for result in (first, alone)
    )
    assert len(logged) == len(expected)
    for one, other in zip(logged, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-6)
    if case not in ("checkpointing", "tokens"):  # which have other batches in a step
        assert [entry["guided_phrases"] for entry in logged if "loss" in entry] == [3, 7, 0, 0, 0, 3, 9]

    trained = 0
    start = training_runs.start_model().state_dict()
    for name, expected in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], expected, rtol=1e-4, atol=1e-5, msg=name)
        trained += not torch.equal(expected, start[name])
    assert trained > 20


@pytest.mark.parametrize(
    ("launched", "case", "resumed"),
    [
        ("ddp", "checkpointing", "resumed"),
        ("ddp", "stream", "stream resumed"),
        ("fsdp", "checkpointing", "resumed"),
        ("fsdp", "everything", "everything resumed"),
    ],
    indirect=["launched"],
)
def test_two_processes_resume_from_a_checkpoint(launched, case, resumed):
    _, folder = launched
    if case == "everything":
        assert (folder / "everything" / "checkpoint-4" / "optimizer_0").is_dir(), "sharded indeed"
    resumed, whole = (torch.load(folder / f"{name}-0.pt") for name in (resumed, case))
    assert losses(resumed) == losses(whole)
    for name, weights in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weights), name


@pytest.mark.parametrize("launched", ["ddp"], indirect=True)
def test_two_processes_divide_the_rows_of_a_stream(launched):
    _, folder = launched
    first, second = (torch.load(folder / f"stream-{i}.pt")["batches"] for i in range(2))
    assert all(len(batch) == 2 for batch in (*first, *second))
    # Of seven groups of four rows the first process reads four in an epoch.
    rows = [list(itertools.chain(*batches))[:number] for batches, number in ((first, 16), (second, 12))]
    assert sorted([*rows[0], *rows[1]]) == list(range(28))
    assert rows[0] != sorted(rows[0])


def test_all_processes_stop_at_the_step_that_one_of_them_sees(launched):
    kind, folder = launched
    messages = [torch.load(folder / f"diverged-{i}.pt")["error"] for i in range(2)]
    assert messages[0] == messages[1]
    assert "diverged at step 4: the loss is nan. The last good checkpoint is" in messages[0]
    assert "checkpoint-2:" in messages[0]
    assert checkpoints(folder / "diverged") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    if kind == "ddp":
        told = {torch.load(folder / f"unlabeled-{i}.pt")["error"] for i in range(2)}
        assert len(told) == 1
        assert (
            "None of the 8 rows of the first 2 steps has a token to learn. max_length=6 cuts every answer"
            in told.pop()
        )


@pytest.mark.parametrize("launched", ["fsdp"], indirect=True)
def test_a_checkpoint_of_sharded_training_loads_with_its_weights_and_has_its_code(launched, tmp_path):
    _, folder = launched
    checkpoint = folder / "checkpointing" / "checkpoint-7"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists(), "sharded indeed"
    loaded = AgeVlmForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    weights = torch.load(folder / "checkpointing-0.pt")["weights"]
    training_runs.start_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    code = json.loads((checkpoint / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"]
    assert code == "modeling_agevlm.AgeVlmForConditionalGeneration"
    assert {path.name for path in checkpoint.glob("*.py")} == {path.name for path in tmp_path.glob("*.py")}
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name


# ---------------------------------------------------------------------------------------- accidents

# Nine steps in two epochs of six, in random order and with dropout: all of the random state matters.
INTERRUPTED = {
    "kinds": "12t3u1tt2u313tuu12t3t12t",
    "dropout": 0.2,
    "stage": "guide",
    "max_steps": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}


@pytest.fixture(scope="module")
def start():
    """Runs [`training_runs.train_in_a_process`]: returns its exit code, and what it kept (None where it was killed)."""
    # Each process is forked from one that has imported everything, which takes longer than the training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs"])

    def run(folder: Path, accident: tuple | None = None, **arguments) -> tuple[int, dict | str | None]:
        kept = folder.with_suffix(".pt")
        kept.unlink(missing_ok=True)
        details = (str(folder), accident, str(kept), {**INTERRUPTED, **arguments})
        process = context.Process(target=training_runs.train_in_a_process, args=details)
        process.start()
        process.join(300)
        return process.exitcode, torch.load(kept) if kept.exists() else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(training_runs.__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield run


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> dict:
    code, result = start(tmp_path_factory.mktemp("run") / "undisturbed")
    assert code == 0
    return result


def checkpoints(folder: Path) -> list[str]:
    """What is in a folder; an unfinished checkpoint without its token."""
    return sorted(path.name.partition("-")[0] if path.name.startswith(".") else path.name for path in folder.iterdir())


def assert_same_run(result: dict, expected: dict) -> None:
    """Bit for bit: each step's losses, the weights, and which rows came when."""
    assert losses(result) == losses(expected)
    assert list(losses(result)) == list(range(1, 10))
    for name, weights in expected["weights"].items():
        assert torch.equal(result["weights"][name], weights), name


def test_the_runs_are_random(undisturbed, start, tmp_path):
    """Otherwise the tests below would prove little."""
    _, other = start(tmp_path / "run", seed=43)
    assert losses(other)[1] != losses(undisturbed)[1]
    _, same_order = start(tmp_path / "run2", dropout=0.0)
    assert losses(same_order)[1] != losses(undisturbed)[1]


ACCIDENTS = {
    "after the step that follows a checkpoint": (("KillAfter", 3), ["checkpoint-2"]),
    "at a step with a checkpoint, before it": (("KillAfter", 6), ["checkpoint-2", "checkpoint-4"]),
    "in the second epoch": (("KillAfter", 9), ["checkpoint-6", "checkpoint-8"]),
    # A checkpoint has four such files: the arguments, the optimizer's, the scheduler's and the random state.
    "in the second checkpoint's first such file": (("kill_while_saving", 5), [".unfinished", "checkpoint-2"]),
    "in the second checkpoint's optimizer": (("kill_while_saving", 6), [".unfinished", "checkpoint-2"]),
    "in the third checkpoint's last such file": (
        ("kill_while_saving", 12),
        [".unfinished", "checkpoint-2", "checkpoint-4"],
    ),
    "when the second checkpoint had all but its name": (("kill_before_naming", 2), [".unfinished", "checkpoint-2"]),
}


@pytest.mark.parametrize("when", ACCIDENTS)
def test_a_killed_run_resumes_as_if_nothing_had_happened(when, start, undisturbed, tmp_path):
    accident, left = ACCIDENTS[when]
    code, result = start(tmp_path / "run", accident)
    assert code == -signal.SIGKILL
    assert result is None
    assert checkpoints(tmp_path / "run") == left
    code, result = start(tmp_path / "run", resume=True)
    assert code == 0
    assert_same_run(result, undisturbed)
    assert checkpoints(tmp_path / "run") == ["checkpoint-8", "checkpoint-9"]  # the last is that of the end


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_what_was_there_and_training_resumes(file, start, undisturbed, tmp_path):
    folder = tmp_path / "run"
    # The second checkpoint's file cannot be written; `optimizer.pt` is the larger in this stage.
    stage = {"stage": "full"} if file == "optimizer.pt" else {}
    code, _ = start(folder, max_steps=3, **stage)
    assert code == 0
    sizes = {path.name: path.stat().st_size for path in (folder / "checkpoint-2").iterdir()}
    others = [size for name, size in sizes.items() if name not in ("model.safetensors", "optimizer.pt")]
    limit = max(*others, sizes["model.safetensors"] if file == "optimizer.pt" else 0) + 100
    assert limit < sizes[file]
    shutil.rmtree(folder)

    code, message = start(folder, ("LimitFiles", 3, limit), **stage)
    assert code == 0
    assert message.startswith("OSError: Could not save")
    assert "checkpoint-4" in message
    assert "resume" in message
    assert checkpoints(folder) == ["checkpoint-2"]
    AgeVlmForConditionalGeneration.from_pretrained(folder / "checkpoint-2")
    code, result = start(folder, resume=True, **stage)
    assert code == 0
    assert_same_run(result, undisturbed if not stage else start(tmp_path / "other", **stage)[1])
