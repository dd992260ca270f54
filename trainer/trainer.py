# SPDX-License-Identifier: Apache-2.0
"""`AgeVlmTrainer`, and the mixin that gives its stages and guidance to any trainer of Transformers or TRL."""

import contextlib
import os
import shutil
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing.collator import AgeVlmDataCollator
from ..processing.processing_agevlm import AgeVlmProcessor
from .arguments import AgeVlmTrainingArguments
from .losses import attention_iou, guidance_losses, pointing_hits, resolve_loss
from .stages import freeze, open_gates, optimizer_groups, print_trainable

# Inputs of guidance that are no inputs of the model.
_TARGETS = ("map_targets", "num_dropped_phrases")

# Where a checkpoint is written until it is whole.
UNFINISHED = ".unfinished"


@torch.no_grad()
def visual_grid(model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor) -> tuple[int, int]:
    """Rows and columns of the visual tokens of an image as the processor prepares it."""
    size = processor.image_processor.size
    blank = torch.zeros(1, 3, size["height"], size["width"], device=model.device)
    return model.model._vision_tokens(blank)[1]


# Type checkers see the mixin as the trainer that it is put in front of.
_AnyTrainer: Any = Trainer if TYPE_CHECKING else object


class GuidanceMixin(_AnyTrainer):
    """Stages and attention guidance for a trainer: `class MyTrainer(GuidanceMixin, SomeTrainer)`.

    It sets up what trains (`args.stage`), hands the collator's `map_targets` past the model, takes the attention maps from
    the base model's output, whatever head the trainer runs on it, and adds `guidance_weight` times the guidance loss, a mean
    over all phrases of the optimiser step: of its accumulated batches and of all processes.

    It logs `guidance_loss` (mean over phrases), `pointing_accuracy` and `attention_iou` (over those whose object is there),
    `absent_attention` (the attention on the image of the others), `guided_phrases` and `dropped_phrases` (numbers), and
    the trainer's own loss without guidance under `own_loss_name`.

    Checkpoints appear when they are whole: until then they are in a folder `.unfinished`.
    """

    own_loss_name = "lm_loss"
    _saving = False

    def _set_up(self, model: nn.Module, args) -> None:
        """Before the trainer wraps the model: what trains, and the hook on the attention maps."""
        base = _base(model)
        if not isinstance(base, AgeVlmForConditionalGeneration):
            raise ValueError(
                f"{type(self).__name__} trains AgeVlmForConditionalGeneration, got {type(base).__name__}."
            )
        if args.stage is not None:
            if base is not model:
                raise ValueError(
                    "With PEFT, `stage` must be left out: PEFT freezes all but its adapters and the modules named in "
                    'LoraConfig(modules_to_save=["multi_modal_projector", "cross_attn"]).'
                )
            groups = freeze(base, args.stage)
            if args.process_index == 0 and not args.disable_tqdm:
                print_trainable(base, groups, f"Stage {args.stage}" if isinstance(args.stage, str) else "Groups")
        elif base is not model:  # PEFT leaves `modules_to_save` in the model's type; for the reason see `freeze`
            for parameter in base.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if args.initial_gate is not None:
            open_gates(base, args.initial_gate)
        half = {p.dtype for p in base.parameters() if not p.requires_grad} & {torch.bfloat16, torch.float16}
        full = any(p.dtype == torch.float32 for p in base.parameters() if p.requires_grad)
        if half and full and not (args.bf16 or args.fp16):
            raise ValueError(
                f"The frozen part of the model is {half.pop()} and what trains is float32: train with `bf16=True`, or load "
                "the model in float32."
            )
        layers = base.config.text_config.cross_attention_layers
        guided = list(layers) if args.guided_layers is None else args.guided_layers
        if unknown := [layer for layer in guided if layer not in layers]:
            raise ValueError(f"guided_layers has {unknown}, but the cross-attention layers are {list(layers)}.")
        self._guided_blocks = [list(layers).index(layer) for layer in guided]
        self._guidance_loss = resolve_loss(args.guidance_loss, args.rescale_maps)

        self._captured: list[torch.Tensor | None] | None = None
        self._num_phrases: torch.Tensor | None = None
        self._guidance_sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._eval_prefix = "eval"
        # A model may see several trainers, one after another: their hooks stay, and must not keep them in memory.
        trainer = weakref.ref(self)

        def capture(module: nn.Module, inputs: tuple, output: Any) -> None:
            running = trainer()
            if running is not None and running._captured is not None:
                running._captured.append(output.cross_attention_maps)

        base.base_model.register_forward_hook(capture)

    def _make_collator(self, model: nn.Module, processor, args, assistant_only_loss: bool) -> AgeVlmDataCollator:
        if not isinstance(processor, AgeVlmProcessor):
            raise ValueError(
                f"Pass the model's processor as `processing_class` (AutoProcessor.from_pretrained), got {processor!r:.80}."
            )
        return AgeVlmDataCollator(
            processor,
            grid=visual_grid(_base(model), processor) if args.guidance_weight else None,
            max_length=args.max_length,
            assistant_only_loss=assistant_only_loss,
            pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),  # of TRL's configurations
            guided_fraction=args.guided_fraction,
            guide_absent=_base(model).config.text_config.cross_attention_sink,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    # --- data ---

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = ["messages", "prompt", "completion", "image", "images", "grounding", self.args.length_column_name]
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._guidance_sums["train"]["steps"] += bool(batches)
        counts = [_num_phrases(batch) for batch in batches]
        self._num_phrases = self.accelerator.reduce(torch.tensor(sum(counts), device=device))
        return batches, num_items

    # --- loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        targets, dropped = (inputs.pop(name, None) for name in _TARGETS)
        if not self.args.guidance_weight:
            inputs.pop("map_queries", None)
        captured: list[torch.Tensor | None] = []
        self._captured = captured
        try:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            self._captured = None
        # The first forward of a loss is the policy's: DPO's reference and extra forwards for metrics come after it.
        maps = captured[0] if captured else None
        loss, outputs = result if return_outputs else (result, None)
        mode = "train" if self.model.training else "eval"
        sums = self._guidance_sums[mode]
        # What the trainer will divide by, once this loss is handed to it.
        accumulated = (
            1 if mode == "eval" or self._is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
        )
        sums["own_loss"] += loss.detach() / accumulated
        sums["losses"] += 1
        sums["dropped_phrases"] += 0 if dropped is None else dropped.sum()
        if targets is not None and self.args.guidance_weight:
            named = inputs["map_queries"].any(-1)
            loss = loss + self.args.guidance_weight * self._guidance(maps, targets, named, sums, mode) * accumulated
        return (loss, outputs) if return_outputs else loss

    def _guidance(
        self, maps: torch.Tensor | None, targets: torch.Tensor, named: torch.Tensor, sums: dict, mode: str
    ) -> torch.Tensor:
        """This batch's part of the mean guidance loss over the phrases of the step."""
        if self.get_tp_size() > 1:
            raise NotImplementedError(
                "Under tensor parallelism each process has attention maps of its own heads only: train with DDP, FSDP2 or "
                "ZeRO, or with guidance_weight=0."
            )
        if maps is None or (mode == "train" and not maps.requires_grad):
            raise RuntimeError(
                "The attention maps came without a gradient, so guidance would teach nothing: either no part that they "
                "come from trains (choose a `stage` with the adapter or the cross-attention), or gradient checkpointing is "
                "reentrant (use gradient_checkpointing_kwargs={'use_reentrant': False}) where nothing before it trains."
            )
        maps = maps[self._guided_blocks]
        losses, _ = guidance_losses(maps, targets, self._guidance_loss, named)
        there = (targets > 0).any(-1)
        sums["guided_phrases"] += named.sum()
        sums["absent_phrases"] += (named & ~there).sum()
        sums["guidance_loss"] += losses.detach().sum()
        sums["pointing_accuracy"] += pointing_hits(maps, targets)[there].sum()
        sums["attention_iou"] += attention_iou(maps, targets)[there].sum()
        sums["absent_attention"] += maps.detach().mean(0).sum(-1)[named & ~there].sum()
        if mode == "eval":
            return losses.sum() / named.sum().clamp(min=1)
        # Data-parallel training averages over the processes, each of which has some of the phrases.
        return losses.sum() / self._num_phrases.clamp(min=1) * self.accelerator.num_processes

    def _is_scaled(self, num_items_in_batch) -> bool:
        """Whether the trainer's own loss is that of its share of the step, rather than a mean over the batch."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or self.compute_loss_func is not None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._guidance_sums["eval"].clear()  # of `predict`, which logs nothing
        self._eval_prefix = metric_key_prefix
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Not by the model's mode: after an evaluation it stays as it is until the next step.
        mode = "train" if "loss" in logs else "eval" if f"{self._eval_prefix}_runtime" in logs else None
        sums = self._guidance_sums[mode] if mode else None
        if sums:
            names = ("own_loss", "losses", "guided_phrases", "absent_phrases", "dropped_phrases")
            means = ("guidance_loss", "pointing_accuracy", "attention_iou", "absent_attention")
            device = self.accelerator.device
            local = torch.stack(
                [
                    torch.as_tensor(
                        sums[n], dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
                    )
                    for n in (*names, *means)
                ]
            )
            own, losses, guided, absent, dropped, *totals = self.accelerator.reduce(local).tolist()
            if mode == "train":
                own = own / sums["steps"] / self.accelerator.num_processes
            else:
                own = own / losses
            values = {self.own_loss_name: own, "guided_phrases": guided, "dropped_phrases": dropped}
            # Of all phrases, of those whose object is there, and of the others.
            numbers = (guided, guided - absent, guided - absent, absent)
            values |= {name: total / n for name, total, n in zip(means, totals, numbers, strict=True) if n}
            prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
            logs.update({prefix + k: round(v, 6) for k, v in values.items()})
            sums.clear()
        super().log(logs, start_time)

    # --- optimiser ---

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if is_optimizer_factory(cls) or {"params", "model", "optimizer_dict"} & kwargs.keys():
                if self.args.group_learning_rates:
                    raise ValueError(f"optim={self.args.optim} makes its own groups: leave group_learning_rates out.")
                return super().create_optimizer(model)
            groups = optimizer_groups(model, self.args.weight_decay, self.args.group_learning_rates)
            self.optimizer: torch.optim.Optimizer = cls(groups, **kwargs)
        return self.optimizer

    # --- checkpoints ---

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # FSDP2 gives the model a class that is made in a module of PyTorch's, whose code would be saved as the model's.
        if isinstance(self.model, FSDPModule):
            original = next(c for c in type(self.model).__mro__[1:] if issubclass(c, PreTrainedModel))
            type(self.model).__name__, type(self.model).__module__ = original.__name__, original.__module__
        super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # uploads go on in the background: not from a folder that is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """As in Transformers, but the checkpoint is written aside and takes its name when it is whole."""
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, whole = os.path.join(folder, UNFINISHED), os.path.join(folder, name)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk each writer raises its own
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"Could not save {whole}: {error}. Earlier checkpoints are as they were: make room, and resume from the last."
            ) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint and UNFINISHED in self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = whole
                self.state.save_to_json(os.path.join(unfinished, name, TRAINER_STATE_NAME))
            shutil.rmtree(whole, ignore_errors=True)  # of an earlier run in the same folder
            os.replace(os.path.join(unfinished, name), whole)
            with contextlib.suppress(OSError):
                os.rmdir(unfinished)
            if self.args.push_to_hub:
                self._push_from_checkpoint(whole)
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


def _base(model: Any) -> AgeVlmForConditionalGeneration:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's


def _num_phrases(batch: dict) -> int:
    return int(batch["map_queries"].any(-1).sum()) if "map_targets" in batch else 0


class AgeVlmTrainer(GuidanceMixin, Trainer):
    """Transformers' `Trainer` for AGE-VLM: any stage, with or without guidance, on rows with images, messages and grounding.

    ```python
    trainer = AgeVlmTrainer(
        model=model,
        args=AgeVlmTrainingArguments("output", stage="guide", bf16=True),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    ```

    Args:
        model: [`~agevlm.AgeVlmForConditionalGeneration`], or a PEFT model of one.
        args: [`~agevlm.trainer.arguments.AgeVlmTrainingArguments`].
        processing_class: the model's processor; saved with every checkpoint.
        data_collator: by default [`~agevlm.processing.collator.AgeVlmDataCollator`] with the arguments' settings.
        kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: if the model is no AGE-VLM, or a setting does not fit it.
    """

    def __init__(self, model, args: AgeVlmTrainingArguments, *, processing_class=None, data_collator=None, **kwargs):
        self._set_up(model, args)
        if data_collator is None:
            data_collator = self._make_collator(model, processing_class, args, args.assistant_only_loss)
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                "AgeVlmTrainer does not train with nn.DataParallel, which Transformers uses where one process sees several "
                "GPUs: start it with `accelerate launch`, or show it one with CUDA_VISIBLE_DEVICES."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (
            not return_outputs
            and "labels" in inputs
            and self.label_smoother is None
            and self.compute_loss_func is None
        ):
            inputs = keep_learnt(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def keep_learnt(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with which the head runs only at positions where some row learns its next token: with a vocabulary of a hundred
    thousand and a loss on the answers alone, the others are a large part of a step."""
    shift_labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    learnt = (shift_labels != -100).any(0)
    learnt[0] |= ~learnt.any()  # an empty one would have no loss
    keep = learnt.nonzero()[:, 0]
    return {**inputs, "shift_labels": shift_labels[:, keep], "logits_to_keep": keep}
