# SPDX-License-Identifier: Apache-2.0
"""All stages of the paper in one go, on grounded scenes and a small budget: what the demo and the experiments train with."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from timm.optim import muon
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agevlm.data.features import select_features
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.processing_agevlm import AgeVlmProcessor
from agevlm.processing.rows import message_text
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.guidance import visual_grid
from agevlm.trainer.trainer import AgeVlmTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class Muon(muon.Muon):
    """timm's Muon, computing in float32: timm's own bfloat16 is ten times slower than that on CPUs that have no instructions
    for it, and longer than the whole rest of a step."""

    def step(self, closure: Callable | None = None):
        orthogonalize = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = functools.partial(orthogonalize, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = orthogonalize


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Args:
        name: of the stage; one of [`agevlm.trainer.stages.PRESETS`] also says what trains in it.
        share: the part of all steps that it gets.
        guided: whether the guidance weight applies in it.
        mixture: kinds of rows (the column `kind` of grounded scenes) and their parts of the batches.
        groups: what trains, if not the preset.
        schedule: of the learning rate.
    """

    name: str
    share: float
    guided: bool
    mixture: Mapping[str, float]
    groups: tuple[str, ...] | None = None
    schedule: str = "constant_with_warmup"


# Lists of objects name most per token, and questions of existence also name what is not there.
NAMING = {"existence": 0.7, "objects": 0.3}
ASKING = {"existence": 0.55, "position": 0.2, "relation": 0.15, "objects": 0.05, "negation": 0.05}

# The paper's stages 1 to 4. The first two are short: without guidance, little data teaches little.
STAGES = (
    Stage("align", 0.03, guided=False, mixture=NAMING),
    Stage("adapt_vision", 0.03, guided=False, mixture=NAMING),
    Stage("guide", 0.27, guided=True, mixture=NAMING),
    Stage("instruct", 0.67, guided=True, mixture=ASKING, schedule="cosine"),
)


def without_vision(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages with the vision tower frozen throughout, so that its features can be computed once for all steps."""
    return tuple(replace(stage, groups=("adapter", "cross_attention")) for stage in stages)


@dataclass(frozen=True)
class Curriculum:
    """How grounded scenes are trained on: the stages, and what every optimiser step sees.

    Args:
        steps: optimiser steps of all stages together.
        tokens_per_batch: text tokens of a step, about.
        learning_rate: of the adapter's and the cross-attention's matrices, which Muon trains; a third of it is that of all
            else, which AdamW trains.
        vision_learning_rate: of the vision tower's last block.
        initial_gate: what gates at 0 are set to. A gate at 0 passes no gradient to its block, and one that wavers about 0
            turns what the block has learnt into its opposite: with the gates well open training is several times faster.
        guidance_loss: see [`~agevlm.trainer.arguments.AgeVlmTrainingArguments`].
        stages: in order; their shares sum to 1.
    """

    steps: int = 200
    tokens_per_batch: int = 480
    learning_rate: float = 6e-3
    vision_learning_rate: float = 3e-4
    initial_gate: float = 0.5
    guidance_loss: str = "kl"
    stages: Sequence[Stage] = STAGES

    def stage_steps(self) -> list[int]:
        return [max(1, round(self.steps * stage.share)) for stage in self.stages]


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: "Dataset") -> list[int]:
    """About how many tokens each conversation has: those of its texts, and six around each message."""
    conversations = list(rows["messages"])
    texts = [message_text(message) for messages in conversations for message in messages]
    counts = iter([len(ids) + 6 for ids in tokenizer(texts)["input_ids"]])
    return [sum(next(counts) for _ in messages) for messages in conversations]


class PlannedBatches(torch.utils.data.Dataset):
    """Batches of about as many tokens each, each of one kind and of conversations of similar length: so that a batch of
    short answers holds as much to learn as one of long conversations."""

    def __init__(
        self,
        rows: "Dataset",
        lengths: Sequence[int],
        batches: int,
        tokens: int,
        mixture: Mapping[str, float],
        seed: int,
    ):
        self.rows = rows
        kinds, rng = list(rows["kind"]), random.Random(seed)
        pools: dict[str, list[list[int]]] = {kind: [] for kind in mixture}
        if missing := set(mixture).difference(kinds):
            raise ValueError(f"The scenes have no rows of the kind(s) {', '.join(sorted(missing))}.")

        def draw(kind: str) -> list[int]:
            if not pools[kind]:
                left = [row for row, k in enumerate(kinds) if k == kind]
                left.sort(key=lambda row: (lengths[row], rng.random()))
                while left:
                    size = max(1, tokens // lengths[left[-1]])
                    pools[kind].append(left[-size:])
                    del left[-size:]
                rng.shuffle(pools[kind])
            return pools[kind].pop()

        self.batches = [draw(kind) for kind in rng.choices(list(mixture), list(mixture.values()), k=batches)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.rows[row] for row in self.batches[index]]


def train_stages(
    model: PreTrainedModel,
    processor: AgeVlmProcessor,
    rows: "Dataset",
    output_dir: Path,
    curriculum: Curriculum,
    *,
    seed: int = 0,
    arguments: dict[str, Any] | None = None,
    trainer_class: type = AgeVlmTrainer,
    features: AgeVlmImageFeatures | None = None,
    after_stage: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> list[dict]:
    """Trains the stages of a curriculum one after another.

    Args:
        model: an AGE-VLM, or what `trainer_class` trains; in bfloat16 or float32, which is what it is trained in (what
            trains is float32 in both) and comes out in.
        rows: a split of grounded scenes.
        output_dir: for the trainer; nothing is saved there.
        seed: of the batches: the same seed gives the same batches to any model.
        arguments: further arguments of [`AgeVlmTrainingArguments`], for all stages, before those of the curriculum.
            `guidance_weight` holds in the guided stages only.
        features: of the images of all scenes, in the order of their numbers ([`image_features`]), for stages that train
            nothing of the vision tower: computed once, they save its forward in every step.
        after_stage: called with the name of each stage when it is done.
        quiet: no progress bars and no tables.

    Returns:
        The log of all stages, its steps counted through; each entry names its `stage`.
    """
    arguments, dtype = dict(arguments or {}), model.dtype
    weight = arguments.pop("guidance_weight", 1.0)
    if features is not None and any(stage.groups is None and stage.name != "align" for stage in curriculum.stages):
        raise ValueError("With ready-made `features` nothing of the vision tower can train: use `without_vision`.")
    # Channels last is several times faster for depthwise convolutions on CPUs, and changes no value's meaning.
    model.model.vision_tower.to(memory_format=torch.channels_last)
    grid = visual_grid(model, processor) if isinstance(model, AgeVlmForConditionalGeneration) else None
    lengths = count_tokens(processor.tokenizer, rows)
    log: list[dict] = []
    done = 0
    for number, (stage, steps) in enumerate(zip(curriculum.stages, curriculum.stage_steps(), strict=True), 1):
        if not quiet:
            Console().rule(f"Stage {number} of {len(curriculum.stages)}: {stage.name}, {steps} steps")
        guidance = weight if stage.guided else 0.0
        collator = AgeVlmDataCollator(
            processor,
            grid if guidance else None,
            guided_fraction=arguments.get("guided_fraction", 1.0),
            guide_absent=getattr(model.config.text_config, "cross_attention_sink", False),
            seed=seed,
        )
        settings = {
            "output_dir": str(output_dir / stage.name),
            "stage": stage.name if stage.groups is None else list(stage.groups),
            "guidance_weight": guidance,
            "guidance_loss": curriculum.guidance_loss,
            "initial_gate": curriculum.initial_gate,
            "learning_rate": curriculum.learning_rate,
            "group_learning_rates": (
                {} if stage.groups or stage.name == "align" else {"vision_last_block": curriculum.vision_learning_rate}
            ),
            "lr_scheduler_type": stage.schedule,
            "warmup_steps": min(20, steps // 4),
            "max_steps": steps,
            "per_device_train_batch_size": 1,  # of planned batches
            "train_sampling_strategy": "sequential",
            "bf16": dtype == torch.bfloat16,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": min(10, steps),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": quiet,
            "seed": seed,
        }
        batches = PlannedBatches(rows, lengths, steps, curriculum.tokens_per_batch, stage.mixture, 10 * seed + number)
        trainer = trainer_class(
            model=model,
            args=AgeVlmTrainingArguments(**{**settings, **arguments}),
            train_dataset=batches,
            # With so few steps Muon learns where to look in half as many as AdamW.
            optimizer_cls_and_kwargs=(
                Muon,
                {"lr": curriculum.learning_rate, "nesterov": True, "fallback_lr_scale": 1 / 3},
            ),
            data_collator=functools.partial(_collate, collator, features),
            processing_class=processor,
        )
        trainer.train()
        log += [{**e, "step": done + e["step"], "stage": stage.name} for e in trainer.state.log_history if "loss" in e]
        done += steps
        if after_stage is not None:
            after_stage(stage.name)
    model.to(dtype).eval()
    return log


def _collate(collator: AgeVlmDataCollator, features: AgeVlmImageFeatures | None, planned: list[list[dict]]) -> dict:
    (rows,) = planned
    batch: dict[str, Any] = dict(collator(rows))
    if features is not None:
        del batch["pixel_values"]
        batch.pop("pixel_attention_mask", None)
        batch["mm_encoder_outputs"] = {"image": select_features(features, [row["scene"] for row in rows])}
    return batch
