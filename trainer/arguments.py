# SPDX-License-Identifier: Apache-2.0
"""Training arguments: Transformers' own, and arguments for stages and guidance."""

import contextlib
import json
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..attention.guidance import GuidanceArguments
from .optimizer import MUON, MuonOptions
from .stages import resolve_groups


@dataclass
class AgeVlmArgumentsMixin(GuidanceArguments):
    """What AGE-VLM adds to the arguments of any trainer, beside those of guidance: [`AgeVlmTrainingArguments`], and TRL's
    configurations in [`agevlm.trainer.trl_trainers`]. `guided_layers` are numbers of `cross_attention_layers` (2, 7, 12, 17 for age-vlm-1b).

    Args:
        stage (`str` or `list[str]`, *optional*):
            What trains: a preset of [`agevlm.trainer.stages.PRESETS`], or a list of its groups. By default all
            parameters that already require gradients; with PEFT always so, because PEFT chooses them.
        guide_absent (`bool`, defaults to `True`):
            Also guide phrases whose object is not in the image: to the attention sink. Without a sink they are not guided.
        eval_heatmaps (`int`, defaults to 4):
            Rows with masks of each evaluation whose heat maps go to TensorBoard, Trackio and W&B, where `report_to` names one of
            them; 0 for none. See [`~agevlm.trainer.heatmaps.HeatmapsMixin`].
        initial_gate (`float`, *optional*):
            Value that replaces gates of exactly 0, as in a freshly assembled model, when training starts. 20 keeps them
            open, as if there were none: `tanh` is exactly 1 there, and its gradient exactly 0.
        group_learning_rates (`dict[str, float]`, *optional*):
            Learning rates by group of parameters, as `{"vision_last_block": 2e-6}`; the others have `learning_rate`.
        tokens_per_batch (`int`, *optional*):
            Most text tokens of a device's batch, all rows padded to its longest, in place of
            `per_device_train_batch_size`; see [`~agevlm.trainer.sampling.GroupedBatches`].
        save_trained_only (`bool`, defaults to `False`):
            Save checkpoints and the final model as deltas ([`agevlm.deltas`]), which have what was trained and name the parts
            that all else comes from. Not with PEFT, whose checkpoints are small anyway, and not with FSDP or DeepSpeed.
        optim (`str`):
            As in Transformers, or `"muon"`: [`~agevlm.trainer.optimizer.Muon`] for matrices and AdamW for the rest, with
            the `optim_args` of [`~agevlm.trainer.optimizer.MuonOptions`].
        logging_nan_inf_filter (`bool`, defaults to `False`):
            As in Transformers, which has True: it logs a loss of 0 where the loss is NaN. Either way training stops there.
    """

    # In this order, because `HfArgumentParser` reads the second: a command line names a preset.
    stage: list[str] | str | None = field(default=None, metadata={"help": "Preset or groups that train."})
    guide_absent: bool = field(
        default=True, metadata={"help": "Guide phrases of absent objects to the attention sink."}
    )
    eval_heatmaps: int = field(default=4, metadata={"help": "Rows of an evaluation whose heat maps are logged."})
    initial_gate: float | None = field(default=None, metadata={"help": "Value of gates that are exactly 0."})
    group_learning_rates: dict | str | None = field(
        default=None, metadata={"help": "Learning rates by group of parameters."}
    )
    tokens_per_batch: int | None = field(default=None, metadata={"help": "Most text tokens of a device's batch."})
    save_trained_only: bool = field(default=False, metadata={"help": "Save what was trained, and name the parts."})
    optim: str = field(default=TrainingArguments.optim, metadata={"help": "Transformers' optimizers, or muon."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log losses that are NaN as 0."})

    def __post_init__(self):
        optim = self.optim
        if optim == MUON:  # which Transformers does not know
            self.optim, _ = "adamw_torch", MuonOptions.read(self.optim_args)  # type: ignore[attr-defined]
        super().__post_init__()
        self.optim = MUON if optim == MUON else self.optim
        if isinstance(self.group_learning_rates, str):  # from a command line
            with contextlib.suppress(json.JSONDecodeError):
                self.group_learning_rates = json.loads(self.group_learning_rates)
            if not isinstance(self.group_learning_rates, dict):
                raise ValueError(
                    "group_learning_rates must be a mapping of groups to learning rates, as "
                    f'{{"adapter": 1e-3}}, got {self.group_learning_rates!r}.'
                )
        if self.stage is not None:
            resolve_groups(self.stage)
        rates = self.group_learning_rates or {}
        resolve_groups(list(rates))
        numbers = {f"group_learning_rates.{name}": rate for name, rate in rates.items()}
        numbers |= {name: getattr(self, name) for name in ("weight_decay", "neftune_noise_alpha")}
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        for name in ("gradient_accumulation_steps", "max_length"):
            if (value := getattr(self, name, None)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.initial_gate is not None and not math.isfinite(self.initial_gate):
            raise ValueError(f"initial_gate must be a finite number, got {self.initial_gate}.")
        if self.eval_heatmaps < 0:
            raise ValueError(f"eval_heatmaps must be at least 0, got {self.eval_heatmaps}.")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {self.tokens_per_batch}.")


@dataclass
class GuidedTrainingArguments(GuidanceArguments, TrainingArguments):
    """Arguments of [`~agevlm.trainer.GuidedTrainer`]: Transformers', those of [`~agevlm.attention.GuidanceArguments`], and

    Args:
        max_length (`int`, *optional*):
            Tokens that a conversation is cut to; all are kept by default.
        assistant_only_loss (`bool`, defaults to `True`):
            Learn the assistant's turns only.
        allow_urls (`bool`, defaults to `False`):
            Fetch images that the data name by a URL, from public addresses only.
    """

    max_length: int | None = field(default=None, metadata={"help": "Tokens that a conversation is cut to."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Learn the assistant's turns only."})
    allow_urls: bool = field(default=False, metadata={"help": "Fetch images that the data name by a URL."})


@dataclass
class AgeVlmTrainingArguments(AgeVlmArgumentsMixin, GuidedTrainingArguments):
    """Arguments of [`~agevlm.trainer.AgeVlmTrainer`]: those of [`GuidedTrainingArguments`] and of [`AgeVlmArgumentsMixin`]."""
