# SPDX-License-Identifier: Apache-2.0
"""What `agevlm data prepare` found: as numbers, as tables on the terminal and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..terminal import console, say, say_saved
from .estimate import BatchShape, StepCost

# The number of bad rows that are listed.
_MAX_BAD_ROWS = 20


@dataclass
class PartReport:
    """What a stage trains on of one part.

    Args:
        path, format: of the part.
        use: `data` or `eval_data`.
        rows: that are left; of a part with `streaming` about, or those that were looked at where it does not say how many it has.
        sampled: rows of a part with `streaming` that were looked at, from which its numbers are estimated; what is left out is
            counted among these.
        dropped: by reason the number of rows, and of phrases, that are left out.
        bad: rows that would stop training, with `file`, `row` and `reason`.
        images, phrases, masks: in these rows.
        text_tokens: in these rows, as training tokenizes them.
        disk: bytes of the rows on disk, images included where they are a part of them.
        downloads: bytes of what was downloaded and unpacked.
    """

    path: str
    format: str
    use: str
    rows: int = 0
    sampled: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    phrases: int = 0
    masks: int = 0
    text_tokens: int = 0
    disk: int = 0
    downloads: int = 0


@dataclass
class StageReport:
    """What a stage trains on and what it costs.

    Args:
        name: of the stage.
        parts: of its data.
        visual_tokens: of all images, one epoch.
        padded_tokens: text tokens of the batches of an epoch, padding included.
        batches: of an epoch on each device.
        epochs: that are trained.
        steps: of the optimizer.
        accumulation: batches of a step on each device.
        batch: the mean batch of a device.
        longest: its largest.
        checkpoints: bytes of all that is saved.
        features: bytes of the tower's features on disk.
        cost: of the mean batch.
        memory: bytes of a device at the largest batch.
        flops: of all steps on all devices.
        gpu_hours: of all devices together.
    """

    name: str
    parts: list[PartReport]
    visual_tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    epochs: float = 0.0
    steps: int = 0
    accumulation: int = 1
    batch: BatchShape | None = None
    longest: BatchShape | None = None
    checkpoints: int = 0
    features: int = 0
    cost: StepCost | None = None
    memory: int = 0
    flops: int = 0
    gpu_hours: float = 0.0

    def lines(self, gpus: int) -> list[tuple[str, str]]:
        """What is said of the stage beside its parts: names and values."""
        data = [part for part in self.parts if part.use == "data"]
        lines = [
            ("rows", f"{sum(part.rows for part in data):,}"),
            (
                "text tokens of an epoch",
                f"{sum(part.text_tokens for part in data):,} ({self.padded_tokens:,} with padding)",
            ),
            ("visual tokens of an epoch", f"{self.visual_tokens:,}"),
        ]
        if self.cost is None or self.batch is None or self.longest is None:
            return lines
        cost, batch, longest = self.cost, self.batch, self.longest
        weights = " + ".join(f"{_gib(size)} {kind}" for kind, size in cost.weights.items())
        lines += [
            ("batch of a device", f"{batch.rows} rows of {batch.tokens} tokens, {batch.images} images (the largest: {longest.rows} of "
             f"{longest.tokens})"),
            ("steps", f"{self.steps:,} of {self.accumulation} x {gpus} batches, {self.epochs:.2f} epochs"),
            ("disk: rows, downloads", f"{_gib(sum(p.disk for p in self.parts))}, {_gib(sum(p.downloads for p in self.parts))}"),
            ("disk: checkpoints and model", f"{_gib(self.checkpoints)} (estimate)"),
            ("memory of a device", f"{_gib(cost.memory)} at the mean batch, {_gib(self.memory)} at the largest (estimate)"),
            ("  of it at the mean batch", f"weights {weights}, gradients {_gib(cost.gradients)}, optimizer {_gib(cost.optimizer)}, "
             f"activations {_gib(cost.activations)}, DDP {_gib(cost.buckets)}"),
            ("FLOPs", f"{cost.flops:.2e} a batch, {self.flops:.2e} in all (estimate)"),
            ("GPU-hours", f"{self.gpu_hours:,.3g}, {self.gpu_hours / gpus:,.3g} hours on {gpus} GPU(s) (estimate)"),
        ]  # fmt: skip
        if self.features:
            lines.append(("disk: features", _gib(self.features)))
        return lines


@dataclass
class PrepareReport:
    """The result of [`~agevlm.trainer.prepare.prepare_recipe`].

    Args:
        stages: of the recipe.
        gpus, gpu_tflops, utilization: that were assumed.
        file: that it was written to, JSON; there is a `.md` beside it.
    """

    stages: list[StageReport]
    gpus: int
    gpu_tflops: float
    utilization: float
    file: Path

    @property
    def bad_rows(self) -> int:
        """Rows that would stop training."""
        return sum(len(part.bad) for stage in self.stages for part in stage.parts)

    def assumed(self) -> str:
        """What the estimates of time rest on."""
        return (
            f"Estimates for {self.gpus} GPU(s) of {self.gpu_tflops:g} TFLOPs a second at {self.utilization:.0%} utilization, without "
            "evaluations. Memory is without what CUDA and its allocator keep, about a GiB. Text tokens are counted by the tokenizer."
        )

    def print(self) -> None:
        """Prints the report as tables."""
        from rich.table import Table

        terminal = console()
        for stage in self.stages:
            table = Table(*_COLUMNS, title=f"Stage {stage.name}", title_justify="left")
            for part in stage.parts:
                table.add_row(*_part_cells(part))
            terminal.print(table)
            lines = Table(show_header=False)
            for line in stage.lines(self.gpus):
                lines.add_row(*line)
            terminal.print(lines)
            for part in stage.parts:
                for entry in part.bad[:_MAX_BAD_ROWS]:
                    say(f"{part.path}: bad row: {entry['file']}, row {entry['row']}: {entry['reason']}")
                if len(part.bad) > _MAX_BAD_ROWS:
                    say(f"and {len(part.bad) - _MAX_BAD_ROWS} more bad rows; see {self.file}")
        say(self.assumed())
        if self.bad_rows:
            say(
                f"Training would stop at {self.bad_rows} bad rows: correct or remove them, or leave them out with `on_bad_row: skip` in "
                "their entry of the data."
            )
        say_saved(self.file, f"the report, and {self.file.with_suffix('.md').name} to read.")

    def to_json(self) -> dict[str, Any]:
        """All numbers, with what they mean as names."""
        assumed = {"gpus": self.gpus, "gpu_tflops": self.gpu_tflops, "utilization": self.utilization}
        stages = [dataclasses.asdict(stage) for stage in self.stages]
        return {"assumed": assumed, "bad_rows": self.bad_rows, "stages": stages}

    def to_markdown(self) -> str:
        """The report to read."""
        text = ["# Prepared", "", self.assumed(), ""]
        for stage in self.stages:
            text += [f"## Stage {stage.name}", "", *_table(_COLUMNS, map(_part_cells, stage.parts)), ""]
            text += [*_table(("", ""), stage.lines(self.gpus)), ""]
            bad = [(part, entry) for part in stage.parts for entry in part.bad]
            if bad:
                text += [f"{len(bad)} bad rows, at which training would stop:", ""]
                text += [
                    f"- {entry['file']}, row {entry['row']}: {entry['reason']}" for _, entry in bad[:_MAX_BAD_ROWS]
                ]
                text.append("")
        return "\n".join(text)


_COLUMNS = ("data", "format", "rows", "left out", "images", "phrases", "masks", "text tokens")


def _part_cells(part: PartReport) -> tuple[str, ...]:
    dropped = ", ".join(f"{number} {reason}" for reason, number in part.dropped.items())
    name = part.path if part.use == "data" else f"{part.path} (evaluation)"
    if part.sampled is not None:
        name += f" (streamed: estimated from {part.sampled:,} rows)"
    numbers = (f"{number:,}" for number in (part.images, part.phrases, part.masks, part.text_tokens))
    return (name, part.format, f"{part.rows:,}", dropped, *numbers)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), line("---" for _ in header), *map(line, rows)]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
