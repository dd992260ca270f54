# SPDX-License-Identifier: Apache-2.0
"""Attention guidance for any trainer of Transformers or TRL and any model: its loss beside the trainer's own, and its metrics."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import ProcessorMixin, Trainer

from ..processing.collator import RowCollator
from .collator import GuidedDataCollator
from .coverage import check_places, tile_grid
from .losses import attention_iou, guidance_losses, pointing_hits, resolve_loss
from .maps import attention_maps, find_model, text_layers

# Type checkers see a mixin as the trainer that it is put in front of.
AnyTrainer: Any = Trainer if TYPE_CHECKING else object

GUIDANCE_INPUTS = ("map_targets", "num_dropped_phrases", "map_queries")
"""What a collator adds to a batch for guidance: the targets `(B, P, V)`, the number of dropped phrases `(1,)`, and the tokens of each
phrase `(B, P, S)`."""


def guided_layers(model: nn.Module, wanted: Sequence[int] | None) -> list[int] | None:
    """The layers that are guided: those that are wanted, otherwise all that attend to all tokens. Layers with a sliding window do not see
    an image that is far away, and nothing would teach them there."""
    inner = find_model(model)
    kinds = getattr(inner.config.get_text_config(), "layer_types", None) or []
    everywhere = [layer for layer in text_layers(inner) if layer >= len(kinds) or "sliding" not in kinds[layer]]
    return everywhere or None if wanted is None else list(wanted)


@dataclass
class GuidanceArguments:
    """What guidance adds to the arguments of any trainer.

    Args:
        guidance_weight (`float`, defaults to 1.0):
            Weight of the guidance loss beside the trainer's own; 0 for no guidance. Rows without masks are not guided anyway.
        guidance_loss (`str`, defaults to `"dice"`):
            What compares attention maps with masks: `"dice"`, the paper's, `"log_dice"` (the negative logarithm of the
            Dice coefficient), `"bce"` (binary cross-entropy) or `"kl"` (Kullback-Leibler divergence), see [`agevlm.attention.losses`].
            Their gradients differ in size, and so do the weights that suit them.
        rescale_maps (`bool`, defaults to `True`):
            Scale maps, which sum to 1, to their mask's area before dice, log_dice or bce compares them. False takes them as they are.
        guided_layers (`list[int]`, *optional*):
            Numbers of the layers to guide, among those of the text model that attend to the image. By default all without a sliding
            window.
        guided_fraction (`float`, defaults to 1.0):
            Share of the rows with masks whose masks are used. The paper has masks for about 10 % of its data. Phrases whose
            object is not in the image are not counted.
    """

    guidance_weight: float = field(default=1.0, metadata={"help": "Weight of the guidance loss; 0 for no guidance."})
    guidance_loss: Literal["dice", "log_dice", "bce", "kl"] = field(
        default="dice", metadata={"help": "What compares attention maps with masks."}
    )
    rescale_maps: bool = field(
        default=True, metadata={"help": "Scale maps to their mask's area, with dice, log_dice and bce."}
    )
    guided_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers to guide, in the configuration's numbering."}
    )
    guided_fraction: float = field(default=1.0, metadata={"help": "Share of the rows with masks that are guided."})

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]  # TrainingArguments, further along
        resolve_loss(self.guidance_loss, self.rescale_maps)
        if self.guided_layers is not None and not self.guided_layers:
            raise ValueError("guided_layers is empty: leave it out to guide all layers, or set guidance_weight to 0.")
        if self.guided_layers is not None and len(set(self.guided_layers)) < len(self.guided_layers):
            raise ValueError(f"guided_layers must name each layer once, got {self.guided_layers}.")
        if not 0 <= self.guidance_weight < math.inf:
            raise ValueError(
                f"guidance_weight must be a number of at least 0, got {self.guidance_weight}: 0 is no guidance."
            )
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"guided_fraction is a share of the rows, from 0 to 1, got {self.guided_fraction}.")


class AttentionGuidance(AnyTrainer):
    """Attention guidance for a trainer: `class MyTrainer(AttentionGuidance, SomeTrainer)`, which calls [`set_up_guidance`].

    It hands the collator's [`GUIDANCE_INPUTS`] past the model, takes the attention maps from the first forward of a loss, whatever head
    the trainer runs, and adds `guidance_weight` times the guidance loss, a mean over all phrases of the optimizer step:
    of its accumulated batches and of all processes.

    It logs `guidance_loss` (mean over phrases), `pointing_accuracy` and `attention_iou` (over those whose object is there),
    `absent_attention` (the attention on the image of the others), `guided_phrases` and `dropped_phrases` (numbers), and
    the trainer's own loss without guidance under `own_loss_name`.
    """

    own_loss_name = "lm_loss"

    def set_up_guidance(self, model: nn.Module, args) -> None:
        """Prepares a trainer before it is made.

        Raises:
            ValueError: if there is no such guidance loss, or the model's attention cannot be guided in `args.guided_layers`.
        """
        self._guidance_loss = resolve_loss(args.guidance_loss, args.rescale_maps)
        self._num_phrases: torch.Tensor | None = None
        self._guidance_sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._eval_prefix = "eval"
        if args.guidance_weight:
            self.check_guidance(model, args)

    def check_guidance(self, model: nn.Module, args) -> None:
        """
        Raises:
            ValueError: if the model's attention cannot be guided.
        """
        check_places(model)
        self._guided_layers = guided_layers(model, args.guided_layers)
        with attention_maps(model, torch.zeros(1, 0, 0, dtype=torch.bool), layers=self._guided_layers):
            pass  # it raises on entry

    def make_collator(self, model: nn.Module, processor: Any, args: Any, assistant_only_loss: bool) -> RowCollator:
        """The collator with the arguments' settings.

        Raises:
            ValueError: if `processor` is no processor of images and text.
        """
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"Pass the model's processor as `processing_class` (AutoProcessor.from_pretrained), got {processor!r:.80}."
            )
        return GuidedDataCollator(
            processor,
            max_length=args.max_length,
            assistant_only_loss=assistant_only_loss,
            pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),  # of TRL's configurations
            guided_fraction=args.guided_fraction,
            seed=args.seed,
            allow_urls=getattr(args, "allow_urls", False),
            grid=tile_grid(find_model(model)),
            guided=args.guidance_weight > 0,
        )

    @contextlib.contextmanager
    def recording(
        self, inputs: dict[str, Any], queries: torch.Tensor | None
    ) -> Iterator[Callable[[], torch.Tensor | None]]:
        """Records the maps of the first forward in the block; the function that it gives returns them, `(layers, B, P, V)`, or None.

        Args:
            inputs: of the model.
            queries: `(B, P, S)`, the tokens of each phrase; None for no maps.
        """
        if queries is None:
            yield lambda: None
            return
        with attention_maps(self.model, queries, layers=self._guided_layers) as found:
            yield lambda: found.maps

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._guidance_sums["train"]["steps"] += bool(batches)
        counts = [_num_phrases(batch) for batch in batches]
        self._num_phrases = self.accelerator.reduce(torch.tensor(sum(counts), device=device))
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        targets, dropped, queries = (inputs.pop(name, None) for name in GUIDANCE_INPUTS)
        if targets is None or not self.args.guidance_weight:
            queries = None
        # The first forward of a loss is the policy's: DPO's reference and extra forwards for metrics come after it.
        with self.recording(inputs, queries) as read_maps:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
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
        if queries is not None:
            guidance = self._guidance(read_maps(), targets, queries.any(-1), sums, mode)
            loss = loss + self.args.guidance_weight * guidance * accumulated
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
        maps = maps[..., : targets.shape[-1]]
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
