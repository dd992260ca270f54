# SPDX-License-Identifier: Apache-2.0
"""Attention guidance for any trainer of Transformers or TRL: its loss beside the trainer's own, and its metrics."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing.collator import AgeVlmDataCollator
from ..processing.processing_agevlm import AgeVlmProcessor
from .losses import attention_iou, guidance_losses, pointing_hits, resolve_loss
from .stages import AnyTrainer, base_model

logger = logging.get_logger(__name__)

# Inputs of guidance that are no inputs of the model.
_TARGETS = ("map_targets", "num_dropped_phrases")


@torch.no_grad()
def visual_grid(model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor) -> tuple[int, int]:
    """Rows and columns of the visual tokens of an image as the processor prepares it."""
    size = processor.image_processor.size
    blank = torch.zeros(1, 3, size["height"], size["width"], device=model.device)
    return model.model.get_vision_tokens(blank)[1]


def guided_blocks(config: PreTrainedConfig, guided_layers: Sequence[int] | None) -> list[int]:
    """Positions of the guided layers among a model's cross-attention layers; of all where `guided_layers` is None.

    Raises:
        ValueError: if the model lacks one of them.
    """
    layers = list(config.text_config.cross_attention_layers)
    guided = layers if guided_layers is None else guided_layers
    if unknown := [layer for layer in guided if layer not in layers]:
        raise ValueError(f"guided_layers has {unknown}, but the cross-attention layers are {layers}.")
    return [layers.index(layer) for layer in guided]


class GuidanceMixin(AnyTrainer):
    """Attention guidance for a trainer: `class MyTrainer(GuidanceMixin, SomeTrainer)`, which calls [`set_up_guidance`].

    It hands the collator's `map_targets` past the model, takes the attention maps from the base model's output, whatever head
    the trainer runs on it, and adds `guidance_weight` times the guidance loss, a mean over all phrases of the optimizer step:
    of its accumulated batches and of all processes.

    It logs `guidance_loss` (mean over phrases), `pointing_accuracy` and `attention_iou` (over those whose object is there),
    `absent_attention` (the attention on the image of the others), `guided_phrases` and `dropped_phrases` (numbers), and
    the trainer's own loss without guidance under `own_loss_name`.
    """

    own_loss_name = "lm_loss"

    def set_up_guidance(self, model: nn.Module, args) -> None:
        """Prepares a model before the trainer wraps it: a hook takes its attention maps.

        Raises:
            ValueError: if the model has none of `args.guided_layers`, or there is no such guidance loss.
        """
        base = base_model(model)
        self._guided_blocks = guided_blocks(base.config, args.guided_layers)
        self._guidance_loss = resolve_loss(args.guidance_loss, args.rescale_maps)
        if args.guidance_weight and args.guidance_loss == "dice" and base.config.text_config.cross_attention_sink:
            logger.warning(
                "guidance_loss='dice' with an attention sink: attention can move into the sink, where Dice has almost no "
                "gradient back to the object. Use log_dice or kl, or a model without a sink."
            )

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

    def make_collator(
        self,
        model: nn.Module,
        processor,
        args,
        assistant_only_loss: bool,
        features: Callable[[list], Any] | None = None,
    ) -> AgeVlmDataCollator:
        """The collator with the arguments' settings.

        Raises:
            ValueError: if `processor` is not an AGE-VLM's.
        """
        if not isinstance(processor, AgeVlmProcessor):
            raise ValueError(
                f"Pass the model's processor as `processing_class` (AutoProcessor.from_pretrained), got {processor!r:.80}."
            )
        return AgeVlmDataCollator(
            processor,
            grid=visual_grid(base_model(model), processor) if args.guidance_weight else None,
            max_length=args.max_length,
            assistant_only_loss=assistant_only_loss,
            pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),  # of TRL's configurations
            guided_fraction=args.guided_fraction,
            guide_absent=args.guide_absent and base_model(model).config.text_config.cross_attention_sink,
            seed=args.seed,
            allow_urls=getattr(args, "allow_urls", False),
            features=features,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._guidance_sums["train"]["steps"] += bool(batches)
        counts = [_num_phrases(batch) for batch in batches]
        self._num_phrases = self.accelerator.reduce(torch.tensor(sum(counts), device=device))
        return batches, num_items

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
            raise ValueError(
                "Under tensor parallelism each process has attention maps of its own heads only: train with DDP, FSDP2 or "
                "ZeRO, or with guidance_weight=0."
            )
        if maps is None or (mode == "train" and not maps.requires_grad):
            raise ValueError(
                "The attention maps came without a gradient, so guidance would teach nothing: either no part that they "
                "come from trains (choose a `stage` with the adapter or the cross-attention), or gradient checkpointing is "
                "reentrant (use gradient_checkpointing_kwargs={'use_reentrant': False}) where nothing before it trains."
            )
        # A compiled model has room for more images than any row has: nothing is attended there.
        maps = maps[self._guided_blocks][..., : targets.shape[-1]]
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
        # Data-parallel training averages over the processes; each process has some of the phrases.
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
        # Not by the model's mode, which stays in evaluation until the next step.
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


def _num_phrases(batch: dict) -> int:
    return int(batch["map_queries"].any(-1).sum()) if "map_targets" in batch else 0
