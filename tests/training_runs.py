# SPDX-License-Identifier: Apache-2.0
"""Training runs for tests: in this process, in several at once (`accelerate launch`), killed, or short of disk space."""

import io
import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset, Features, Value
from tiny_training import row, tiny_processor, tiny_trainable
from transformers import TrainerCallback

from agevlm import AgeVlmForConditionalGeneration
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.grounding import mask_to_rle, row_features
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmSFTConfig, AgeVlmSFTTrainer

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    # TRL has defaults of its own for these.
    "bf16": False,
    "gradient_checkpointing": False,
}
TRAINERS = {"own": (AgeVlmTrainer, AgeVlmTrainingArguments), "sft": (AgeVlmSFTTrainer, AgeVlmSFTConfig)}


def mixed_row(kind: str, index: int) -> dict:
    """A row with: `t`, text alone; `u`, an image and no mask; `1` or `2`, an image and so many phrases with masks; `3`, two
    images and three phrases; `a`, an image, a phrase with a mask, and one that names nothing in the image."""
    made = row(index, {"t": 0, "3": 2}.get(kind, 1))
    grounding = made["grounding"][: {"t": 0, "u": 0, "1": 1}.get(kind)]
    if kind == "a":
        grounding[1] = {**grounding[1], "mask": mask_to_rle(np.zeros(made["images"][0].size[::-1], dtype=bool))}
    if kind == "3":
        grounding.append({**grounding[0], "message": 1, "start": 0, "end": len("There")})
    return {**made, "grounding": grounding, "index": index}


def mixed_rows(kinds: str) -> Dataset:
    made = [mixed_row(kind, index) for index, kind in enumerate(kinds)]
    return Dataset.from_list(made, features=Features({**row_features(), "index": Value("int64")}))


class Recorder(AgeVlmDataCollator):
    """Remembers which rows came in which batch."""

    def __call__(self, rows):
        self.batches = [*getattr(self, "batches", []), [row["index"] for row in rows]]
        return super().__call__(rows)


def start_model(dropout: float = 0.0, **kwargs) -> AgeVlmForConditionalGeneration:
    model = tiny_trainable(**kwargs)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def train(
    folder: str | Path,
    kinds: str,
    *,
    trainer: str = "own",
    dropout: float = 0.0,
    callback: TrainerCallback | None = None,
    resume: bool | str = False,
    eval_kinds: str | None = None,
    **settings,
) -> dict:
    """Trains the tiny model on rows of these kinds; returns what was logged, the final weights and the batches' rows."""
    model, processor = start_model(dropout), tiny_processor()
    recorder = Recorder(processor, grid=(4, 4))
    trainer_class, args_class = TRAINERS[trainer]
    args = args_class(str(folder), **{**SETTINGS, **settings})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards models on accelerators only, by the kind of its processes; PyTorch does on CPUs as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    running = trainer_class(
        model=model,
        args=args,
        train_dataset=mixed_rows(kinds),
        eval_dataset=mixed_rows(eval_kinds) if eval_kinds else None,
        data_collator=recorder,
        processing_class=processor,
        callbacks=[callback] if callback else None,
    )
    running.train(resume_from_checkpoint=resume or None)
    weights = running.accelerator.get_state_dict(running.model)
    return {
        "logs": running.state.log_history,
        "weights": {name: tensor.detach().cpu().clone() for name, tensor in weights.items()},
        "batches": recorder.batches,
    }


# ---------------------------------------------------------------------------------------- several processes


def main(folder: str, cases: str) -> None:
    """Trains each case (`{name: arguments of train}` as JSON), and keeps what each process returned."""
    for name, arguments in json.loads(cases).items():
        if "resume" in arguments:
            arguments["resume"] = os.path.join(folder, arguments["resume"])
        result = train(os.path.join(folder, name), **arguments)
        state = PartialState()
        if not state.is_main_process:
            del result["weights"]
        torch.save(result, os.path.join(folder, f"{name}-{state.process_index}.pt"))
    PartialState().destroy_process_group()


# ---------------------------------------------------------------------------------------- accidents


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter(TrainerCallback):
    """Kills this process after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill()


class LimitFiles(TrainerCallback):
    """After a step, no file of this process may grow beyond so many bytes: a full disk, as the system tells of it."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit_files(self.size)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def kill_while_saving(call: int) -> None:
    """Kills this process in the middle of the `call`-th file that `torch.save` writes."""
    save, calls = torch.save, iter(range(1, call + 1))

    def interrupted(thing, path, **kwargs):
        if next(calls) == call:
            buffer = io.BytesIO()
            save(thing, buffer, **kwargs)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            kill()
        save(thing, path, **kwargs)

    torch.save = interrupted


def kill_before_naming(call: int) -> None:
    """Kills this process when the `call`-th checkpoint is whole but has not its name yet."""
    replace, calls = os.replace, iter(range(1, call + 1))

    def interrupted(source, target):
        if Path(target).name.startswith("checkpoint-") and next(calls) == call:
            kill()
        replace(source, target)

    os.replace = interrupted


def train_in_a_process(folder: str, accident: tuple | None, result: str, arguments: dict) -> None:
    """What a process of its own runs: `accident` is one of those above and its arguments."""
    torch.set_num_threads(1)
    if accident is not None:
        function, *details = accident
        made = globals()[function](*details)
        arguments = {**arguments, **({"callback": made} if made is not None else {})}
    try:
        torch.save(train(folder, **arguments), result)
    except OSError as error:
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        torch.save(f"{type(error).__name__}: {error}", result)


if __name__ == "__main__":
    main(*sys.argv[1:])
