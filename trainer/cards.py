# SPDX-License-Identifier: Apache-2.0
"""What a trainer tells about itself: `provenance.json` in everything that it saves, and the model's card."""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.guidance import AnyTrainer
from ..deltas import identify_adapted
from ..hub_cards.model import write_model_card
from ..provenance import describe, identify, model_provenance, write_provenance
from .stages import GROUPS, base_model

# What a stage's last entries of the log tell about its end.
_LAST = ("loss", "lm_loss", "guidance_loss", "pointing_accuracy", "attention_iou")


class CardsMixin(AnyTrainer):
    """Saves with a model where it comes from, and writes its card; for any trainer.

    What is told of a stage beside its arguments may be set before it trains: `stage_name`, and `data_sources`, what
    [`~agevlm.provenance.describe`] says of each data set.
    """

    stage_name: str | None = None
    data_sources: list[dict[str, Any]] | None = None

    def set_up_card(self, model: nn.Module, args) -> None:
        """Reads where a model comes from, before anything is written to its folder."""
        self._origin: dict[str, Any] = {}
        if not args.should_save:
            return
        base = base_model(model)
        self._origin = model_provenance(base.name_or_path)
        for former in ("untrained", "adapts"):
            self._origin.pop(former, None)
        if base is not model and base.name_or_path:
            self._origin["adapts"] = adapted = identify_adapted(base.name_or_path)
            self._origin.setdefault("base", {key: value for key, value in adapted.items() if key != "delta"})
        self._trains = _count_trainable(model)

    def provenance(self) -> dict[str, Any]:
        """Where the model comes from, this training with it; see [`agevlm.provenance`]."""
        args, is_peft = self.args, base_model(self.model) is not self.model
        name = self.stage_name or (args.stage if isinstance(args.stage, str) else ", ".join(args.stage or ()))
        sources = self.data_sources
        if sources is None:
            found = _source_of(self.train_dataset)
            sources = [] if found is None else [found]
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        guidance = f"{args.guidance_loss}, weight {args.guidance_weight:g}"
        if args.guided_fraction < 1:
            guidance += f", {args.guided_fraction:.0%} of the rows with masks"
        logged = {key: entry[key] for entry in self.state.log_history for key in _LAST if key in entry}
        settings = {
            "trainer": type(self).__name__,
            "parameters that train": self._trains,
            **({"LoRA": _lora(self.model)} if is_peft else {}),
            "steps": self.state.global_step,
            "rows a step": rows
            if args.tokens_per_batch is None
            else f"as many as {args.tokens_per_batch} tokens hold",
            "learning rate": args.learning_rate,
            **({"learning rates by group": args.group_learning_rates} if args.group_learning_rates else {}),
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "guidance of maps": guidance if args.guidance_weight else "none",
            "precision": "bfloat16 mixed" if args.bf16 else "float16 mixed" if args.fp16 else "float32",
            "seed": args.seed,
            **{f"{key.replace('_', ' ')}, last logged": value for key, value in logged.items()},
            "versions": {name: importlib.metadata.version(name) for name in self._libraries()},
        }
        stage = {"name": name or ("LoRA" if is_peft else type(self).__name__), "settings": settings, "data": sources}
        stage["tags"] = [
            *getattr(self, "_tag_names", ()),
            *(["attention-guidance"] if "guidance_loss" in logged else []),
        ]
        return {**self._origin, "stages": [*self._origin.get("stages", []), stage]}

    def _libraries(self) -> Iterable[str]:
        yield from ("agevlm", "transformers", "torch")
        if hasattr(self, "_tag_names"):  # TRL's trainers have it
            yield "trl"
        if base_model(self.model) is not self.model:
            yield "peft"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # Transformers comes here in every process
            write_provenance(output_dir or self.args.output_dir, self.provenance())

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the model's card to `output_dir`, with the arguments of Transformers' and of TRL's trainers; so does `push_to_hub`.

        Args:
            model_name: title of the card.
            dataset_name: one or several ids of data sets on the Hub; Transformers calls them `dataset_tags`. Of a path the last
                part is told.
            tags: of the model.
            kwargs: the other arguments of Transformers' `create_model_card`: `language`, `license`, `finetuned_from`, `tasks`,
                `dataset` (names) and `dataset_args` (settings, one for each name).
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        provenance = self.provenance()
        named = [identify(name) for name in _listed(kwargs.get("dataset_tags") or dataset_name)]
        named += [{"name": name} for name in _listed(kwargs.get("dataset"))]
        for source, settings in zip(named[::-1], _listed(kwargs.get("dataset_args"))[::-1], strict=False):
            source["settings"] = settings
        if named:
            provenance["stages"][-1]["data"] = named
        write_provenance(folder, provenance)
        base = kwargs.get("finetuned_from")
        model, config = self.accelerator.unwrap_model(self.model), base_model(self.model).config
        adapter = model.peft_config[model.active_adapter].to_dict() if model is not base_model(model) else {}
        write_model_card(
            folder,
            repo_id=self.hub_model_id,
            title=model_name,
            overwrite=True,
            needs_agevlm=getattr(self.args, "save_trained_only", False),
            config={} if adapter else config.to_dict(),
            adapter=adapter,
            language=kwargs.get("language"),
            license=kwargs.get("license"),
            base_model=identify(base).get("id") if base else None,
            pipeline_tag=next(iter(_listed(kwargs.get("tasks"))), None),
            tags=_listed(tags),
        )


def _count_trainable(model: nn.Module) -> dict[str, int]:
    """The numbers of parameters that train, by group."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups = [group for group, pattern in GROUPS.items() if re.search(rf"(^|\.){pattern}", name)]
            counts["LoRA" if ".lora_" in name else groups[0] if groups else "other"] += parameter.numel()
    return {name.replace("_", " "): counts[name] for name in (*GROUPS, "LoRA", "other") if counts[name]}


def _lora(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    known = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    return {name: getattr(config, field) for name, field in known.items() if hasattr(config, field)}


def _source_of(dataset: Any) -> dict[str, Any] | None:
    """What is known of a data set in memory from where its table lies: in the cache of the Hub's data sets, or in a folder that
    `save_to_disk` wrote."""
    files = getattr(dataset, "cache_files", None) or []
    if not files:
        return None
    folder = Path(files[0]["filename"]).parent
    rows = {"rows": len(dataset)}
    if owned := [part for part in folder.parts if part.count("___") == 1]:
        return {**describe(owned[-1].replace("___", "/"), "data set"), **rows}
    if (folder.parent / "dataset_dict.json").is_file():
        return {**describe(folder.parent, "data set"), "split": folder.name, **rows}
    return {**describe(folder, "data set"), **rows} if (folder / "state.json").is_file() else None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
