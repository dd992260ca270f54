# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and models that are complete or absent."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..attention.guidance import AnyTrainer
from ..deltas import check_knows_parts, load_trained_into, write_trained
from ..files import UNFINISHED, set_ordinary_permissions, unfinished_folder, update_folder
from ..hub import PICKLES
from ..parts import PARTS_FILE
from .guards import check_weights


@contextlib.contextmanager
def _saving(trainer: Any, what: str) -> Iterator[str]:
    """A token that all processes share, for the hidden folder in which they save something.

    Raises:
        OSError: if it cannot be saved.
    """
    if trainer.args.should_save:
        os.makedirs(trainer.args.output_dir, exist_ok=True)
    tokens = [secrets.token_hex(4)]
    broadcast_object_list(tokens)
    try:
        yield tokens[0]
    except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk each writer raises its own
        raise OSError(
            f"Could not save {what}: {error}. Earlier checkpoints are as they were: make room, and resume from the last."
        ) from error
    trainer.accelerator.wait_for_everyone()


class _WithoutPickles:
    """The Hub, to which a model's folder goes without pickles, and a checkpoint that `hub_strategy` asks for, to resume from it,
    as it is."""

    def __init__(self, hub: HfApi):
        self.hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hub, name)

    def upload_folder(self, *, ignore_patterns: Sequence[str] = (), **kwargs: Any) -> Any:
        if "path_in_repo" not in kwargs:
            ignore_patterns = [*ignore_patterns, *PICKLES, f"{UNFINISHED}*"]
        return self.hub.upload_folder(ignore_patterns=list(ignore_patterns), **kwargs)


@contextlib.contextmanager
def _leaving_pickles_out() -> Iterator[None]:
    """Transformers' trainer uploads `training_args.bin`, and has no argument to change that."""
    usual = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: _WithoutPickles(usual())
    try:
        yield
    finally:
        transformers.trainer.hf_api = usual


class CheckpointsMixin(AnyTrainer):
    """Checkpoints that appear when they are whole, for any trainer: until then they are in a hidden folder."""

    _unfinished: str | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if getattr(self.args, "save_trained_only", False):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "save_trained_only needs the whole weights in one process, and FSDP and DeepSpeed share them among "
                    "several: leave it out, and save the final model as a delta with agevlm.deltas.save_trained."
                )
            check_knows_parts(self.model)

    def _get_output_dir(self, trial=None) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # FSDP2 gives the model a class from a module of PyTorch, whose code would be saved as the model's.
        if isinstance(self.model, FSDPModule):
            original = next(c for c in type(self.model).__mro__[1:] if issubclass(c, PreTrainedModel))
            type(self.model).__name__, type(self.model).__module__ = original.__name__, original.__module__
        if getattr(self.args, "save_trained_only", False):
            self._save_trained(output_dir or self.args.output_dir)
        else:
            super()._save(output_dir, state_dict)
        for file in Path(output_dir or self.args.output_dir).glob("*.safetensors"):
            set_ordinary_permissions(file)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, without pickles."""
        with _leaving_pickles_out():
            return super().push_to_hub(*args, **kwargs)

    def _save_trained(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # With what trains and has not moved yet, so that a later step can go back to it.
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        write_trained(model, output_dir, trains=trains)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if Path(resume_from_checkpoint, PARTS_FILE).is_file():
            load_trained_into(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if Path(self.state.best_model_checkpoint, PARTS_FILE).is_file():
            load_trained_into(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # uploads go on in the background: not from a folder that is about to be renamed
            with _leaving_pickles_out():
                super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """As in Transformers, but the checkpoint is written aside and takes its name when it is whole."""
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        whole = os.path.join(folder, name)
        with _saving(self, whole) as token, contextlib.ExitStack() as stack:
            unfinished = os.path.join(folder, f"{UNFINISHED}-{token}")
            if self.args.should_save:
                os.makedirs(folder, exist_ok=True)
                stack.enter_context(unfinished_folder(folder, token))
            self._unfinished = unfinished
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint and UNFINISHED in self.state.best_model_checkpoint:
                    self.state.best_model_checkpoint = whole
                    self.state.save_to_json(os.path.join(unfinished, name, TRAINER_STATE_NAME))
                set_ordinary_permissions(Path(unfinished, name))
                if os.path.isdir(whole):  # of an earlier run in the same folder
                    os.replace(whole, os.path.join(unfinished, "former"))
                os.replace(os.path.join(unfinished, name), whole)
        if self.args.should_save:
            if self.args.push_to_hub:
                self._push_from_checkpoint(whole)
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


def save_model(trainer: Trainer) -> None:
    """Saves a trainer's model aside and moves its files to their place when they are whole, `config.json` last.

    Raises:
        ValueError: if trained weights are not finite.
        OSError: if it cannot be saved.
    """
    check_weights(trainer)
    folder = Path(trainer.args.output_dir).absolute()
    with _saving(trainer, f"the model in {folder}") as token, contextlib.ExitStack() as stack:
        if trainer.args.should_save:
            stack.enter_context(update_folder(folder, token))
        trainer.save_model(str(folder / f"{UNFINISHED}-{token}" / folder.name), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def has_model(folder: Path) -> bool:
    """Whether a folder has a whole model of [`save_model`]."""
    return (folder / "config.json").is_file()


def last_checkpoint(folder: Path) -> str | None:
    """The path of the last checkpoint in a folder, if there is any."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


@torch.no_grad()
def restore_float32(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Gives what trains in float32 the values that a folder has in float32, where loading has rounded them.

    Args:
        model: loaded from the folder in another type.
        folder: of a model; nothing is done for the name of a model on the Hub.
    """
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as saved:
            for name in trains.keys() & set(saved.keys()):
                exact, loaded = saved.get_tensor(name), trains[name]
                for half in (torch.bfloat16, torch.float16):
                    if exact.dtype == torch.float32 and torch.equal(exact.to(half).to(loaded), loaded):
                        loaded.copy_(exact)
