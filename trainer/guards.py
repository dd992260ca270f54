# SPDX-License-Identifier: Apache-2.0
"""What stops a training run: a loss that is not finite, rows without labels, weights that must not be saved, damaged checkpoints."""

import contextlib
import json
import math
import os
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..attention.guidance import AnyTrainer

FIRST_STEPS = 10
"""Steps of which some row must have a label."""

# Settings of an optimizer's groups that are the arguments', not a checkpoint's.
_SETTINGS = ("weight_decay", "betas", "eps")

# What a checkpoint must have: for each part its files or folders, whatever has shared the work.
_PARTS = {
    TRAINER_STATE_NAME: [TRAINER_STATE_NAME],
    "model.safetensors": ["*.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*"],
    "optimizer.pt": ["optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"],
    "scheduler.pt": ["scheduler.pt", "global_step*"],
    "rng_state.pth": ["rng_state*.pth"],
}


class GuardsMixin(AnyTrainer):
    """Stops a run that has diverged or learns nothing, never saves weights that are not finite, and resumes from whole
    checkpoints with the settings of its arguments; for any trainer, before other mixins.

    Raises:
        ValueError: at the first step whose loss or gradient is not finite, before a model is saved whose trained weights are
            not, where no row of the first steps has a label, where there are no rows, or for a damaged checkpoint.
        FileNotFoundError: for a checkpoint that lacks a file.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._loss: torch.Tensor | None = None
        self._watched: deque[tuple[int, torch.Tensor, Any]] = deque()
        self._unlabeled_rows: int | None = 0
        self._unlabeled_steps = 0
        self._saved: list[tuple[int, str]] = []
        if checkpoint:
            self._saved.append((check_checkpoint(checkpoint).global_step, str(checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- losses and gradients ---

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._loss = loss.float() if self._loss is None else self._loss + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Once a step, before the optimizer's. All processes see the same values, so that they stop together."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A scaler of float16 skips steps whose gradient overflows: that is no divergence.
        watched = 0.0 if norm is None or self.args.fp16 else norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss: Any = self._loss  # of the step's batches
        values = torch.stack([loss, torch.as_tensor(watched, device=loss.device).to(loss)])
        self._loss = None
        values = self.accelerator.reduce(values)
        event = None
        if values.device.type == "cuda":  # read a step later, when it is there: no step waits for the device
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._watched.append((self.state.global_step + 1, values, event))
        self._check_losses(unread=0 if event is None else 1)
        return norm

    def _check_losses(self, unread: int = 0) -> None:
        """Looks at the watched steps, but for the last `unread`."""
        while len(self._watched) > unread:
            step, values, event = self._watched.popleft()
            if event is not None:
                event.synchronize()
            loss, norm = values.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                raise ValueError(f"Training has diverged at step {step}: {what}. {self._last_good(step)}")

    def _last_good(self, step: int) -> str:
        """What to do about a step whose loss went wrong. A checkpoint right before it has the weights that it went wrong with."""
        good = [path for saved, path in self._saved if saved < step - 1 and os.path.isdir(path)]
        left = (
            f"The last good checkpoint is {good[-1]}: delete those after it, if any, and resume"
            if good
            else "Start over"
        )
        return f"{left} with a lower learning_rate, or correct the data of this step."

    def log(self, logs, *args, **kwargs):
        if self.is_in_train:
            self._check_losses()
        return super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        # A batch without labels has no loss. It says nothing about the others; where all losses are NaN, so is their mean.
        kept, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, True
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = kept

    # --- labels ---

    def get_train_dataloader(self):
        if hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise ValueError("The data set to train on has no rows.")
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._unlabeled_rows is not None:
            self._look_for_labels(batches, device)
        # A step without labels has the loss 0; divided by the number of its labels it would be NaN, as would be the weights.
        return batches, num_items.clamp(min=1) if torch.is_tensor(num_items) else num_items

    def _look_for_labels(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        limit, rows, labeled, cut = getattr(self.args, "max_length", None), 0, 0, False
        for batch in batches:
            learned = _learned(batch)
            rows += 1 if learned is None else len(learned)
            labeled += 1 if learned is None else int(learned.any(-1).sum())
            cut |= limit is not None and "input_ids" in batch and batch["input_ids"].shape[-1] >= limit
        rows, labeled, cut = self.accelerator.reduce(torch.tensor([rows, labeled, int(cut)], device=device)).tolist()
        if labeled:
            self._unlabeled_rows = None  # looked for no longer
            return
        self._unlabeled_rows += rows
        self._unlabeled_steps += 1
        if self._unlabeled_steps >= FIRST_STEPS or self.state.global_step + 1 >= self.state.max_steps:
            raise ValueError(
                f"None of the {self._unlabeled_rows} rows of the first {self._unlabeled_steps} steps has a token to learn. "
                + (
                    f"max_length={limit} cuts every answer: raise it, or leave it out."
                    if cut
                    else f"They have no assistant turn with a text, or the chat template marks none (max_length={limit}): "
                    "correct the rows or the template, or set assistant_only_loss=false to learn all of the text."
                )
            )

    # --- saving ---

    def _save_checkpoint(self, model, trial) -> None:
        self._check_losses()
        super()._save_checkpoint(model, trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._saved.append((self.state.global_step, os.path.join(self._get_output_dir(trial), name)))

    def save_model(self, *args, **kwargs) -> None:
        check_weights(self)
        super().save_model(*args, **kwargs)

    # --- resuming ---

    def _init_training_state(self, max_steps, *args, **kwargs):
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # when to log, save and evaluate is not the checkpoint's
        return found

    def _run_epoch(self, *args, **kwargs):
        # A run that was stopped behind its last step has only to save its model: Transformers would train another step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _reading(resume_from_checkpoint, "weights"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint):
        with _reading(checkpoint, "random state (rng_state)"):
            return super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Loads what the optimizer has gathered. Learning rates and the like are those of the arguments, at the checkpoint's
        step: the same to the last bit where no argument was changed."""
        groups = [dict(group) for group in self.optimizer.param_groups]
        base_lrs: Any = getattr(self.lr_scheduler, "base_lrs", None)
        with _reading(checkpoint, "optimizer or scheduler (optimizer.pt, scheduler.pt)"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.lr_scheduler, LambdaLR):  # others gather a state themselves
            scheduler = self.lr_scheduler
            scheduler.base_lrs = base_lrs
            rates = [
                base * function(scheduler.last_epoch)
                for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, own, base, rate in zip(self.optimizer.param_groups, groups, base_lrs, rates, strict=True):
                group.update({name: own[name] for name in _SETTINGS if name in own}, initial_lr=base, lr=rate)
            scheduler._last_lr = rates


@contextlib.contextmanager
def _reading(checkpoint: str | os.PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise ValueError(
            f"The {what} of {checkpoint} cannot be read, or are not of what trains now: {error}. {_FIX.format(checkpoint)}"
        ) from error


_FIX = "Delete {} to resume from the checkpoint before it, if there is any, or start over in another folder."


def check_checkpoint(checkpoint: str | os.PathLike) -> TrainerState:
    """Looks at a checkpoint's files without reading their tensors.

    Returns:
        The state of its trainer.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
    """
    folder, fix = Path(checkpoint), _FIX.format(checkpoint)
    for name, patterns in _PARTS.items():
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            raise FileNotFoundError(f"The checkpoint {folder} has no {name}, without which nothing can resume. {fix}")
    for index in folder.glob("*.safetensors.index.json"):
        with _intact(index, fix):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise FileNotFoundError(f"The checkpoint {folder} has no {missing[0]}, which {index.name} names. {fix}")
    for file in folder.glob("*.safetensors"):
        with _intact(file, fix), safe_open(file, "pt"):
            pass
    for pattern in ("*.pt", "*.pth", "*.bin"):  # archives of `torch.save`
        for file in folder.glob(pattern):
            with _intact(file, fix):
                zipfile.ZipFile(file).close()
    with _intact(folder / TRAINER_STATE_NAME, fix):
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if not isinstance(state.global_step, int):
            raise ValueError(f"global_step is {state.global_step!r}")
    return state


@contextlib.contextmanager
def _intact(file: Path, fix: str) -> Iterator[None]:
    try:
        yield
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{file} is damaged: {error}. {fix}") from error


@torch.no_grad()
def check_weights(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: if a weight that trains, or its square, is not finite; names the first such parameter.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not trained:
        return
    # Squared, because the last step of a run has no loss behind it: what it has made so large computes NaN.
    finite = [_local(p).float().square().isfinite().all().to(trainer.args.device) for p in trained.values()]
    damaged = (~torch.stack(finite)).int()
    if any(_local(p) is not p for p in trained.values()) or trainer.is_fsdp_enabled:  # each process has a part
        damaged = trainer.accelerator.reduce(damaged)
    names = [name for name, count in zip(trained, damaged.tolist(), strict=True) if count]
    if names:
        step = trainer.state.global_step
        left = trainer._last_good(step + 1) if isinstance(trainer, GuardsMixin) and trainer.is_in_train else ""
        raise ValueError(
            f"Nothing is saved: after step {step}, {names[0]} has values that are not finite or too large"
            + (f", as have {len(names) - 1} other parameters. " if len(names) > 1 else ". ")
            + (left or "Train again with a lower learning_rate.")
        )


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter: of FSDP2, of ZeRO-3, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def _learned(batch: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens of a batch are learned, bool `(B, S)`; None where that is not known."""
    if "shift_labels" in batch:
        return batch["shift_labels"] != -100
    if "labels" in batch:
        return batch["labels"][..., 1:] != -100
    if "completion_mask" in batch:  # of preferences: the chosen answers, then the rejected
        return batch["completion_mask"].bool().unflatten(0, (2, -1)).any(0)
    return None
