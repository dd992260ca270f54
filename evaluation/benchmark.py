# SPDX-License-Identifier: Apache-2.0
"""Benchmarks and their one runner: any model that [`load_model`] loads, or one in memory, on any [`Benchmark`].

A benchmark of your own is an object with the attributes of [`Benchmark`]; give it to [`evaluate`].
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..files import check_new_folder, update_folder
from ..inference.generation import load_model
from ..parts import read_fingerprint
from ..provenance import identify
from .answers import Inspect, Question, answer
from .cv_bench import CvBench
from .grounding import Grounding
from .pope import Pope
from .scenes import Scenes

if TYPE_CHECKING:
    from datasets import Dataset

Scores = dict[str, dict[str, Any]]
"""Numbers by what is scored (a category, a task) and by their name."""

TextTable = Sequence[Sequence[str]]
"""Rows of a table; the first one is its header."""


class Benchmark(Protocol):
    """What is asked, and how the answers are scored. An object knows which data it asks."""

    @property
    def title(self) -> str:
        """The benchmark's name in reports."""

    @property
    def prompt_suffix(self) -> str:
        """The line that prompts end with by default; empty for none."""

    @property
    def max_new_tokens(self) -> int:
        """The longest answer by default, in tokens."""

    @property
    def inspect(self) -> Inspect | None:
        """What to write down of each question beside its answer; None for nothing."""

    @property
    def draw(self) -> Callable[[Scores, Path], None] | None:
        """Writes a figure of the scores, `plot.png` of the output; None for none."""

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What the questions depend on, for a model of this configuration; values that JSON can hold."""

    def questions(self, limit: int | None = None) -> list[Question]:
        """All questions, or the first `limit` of each kind."""

    def score(self, questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]) -> Scores:
        """The scores of answers, which are given by the questions' keys."""

    def tables(self, scores: Scores, settings: Mapping[str, Any]) -> Sequence[TextTable]:
        """The scores as tables."""


BENCHMARKS: dict[str, type[Benchmark]] = {"pope": Pope, "cv-bench": CvBench, "scenes": Scenes, "grounding": Grounding}
"""The benchmarks by the name of their command, `agevlm eval NAME`."""


@dataclass(frozen=True)
class Evaluation:
    """What a benchmark has found out about a model.

    Args:
        settings: what the answers depend on, the model's weights left out.
        scores: see the benchmark's `score`.
        questions: as they were asked.
        answers: by the questions' keys, the `answer` and what the benchmark has written down beside it.
        tables: the scores as text.
        weights: the trained weights of a model's folder, as [`~agevlm.parts.read_fingerprint`] names them; None for a model in
            memory or of the Hub.
    """

    settings: dict[str, Any]
    scores: Scores
    questions: list[Question]
    answers: dict[str, dict[str, Any]]
    tables: Sequence[TextTable]
    weights: str | None = None

    @property
    def title(self) -> str:
        """The names of the benchmark and the model."""
        return f"{self.settings['benchmark']}: {self.settings['model']}"

    def rich(self) -> Group:
        """The title and the tables, for the terminal."""
        return Group(Text(self.title), *map(rich_table, self.tables))

    def save(self, folder: str | os.PathLike) -> None:
        """Write `results.json` (settings, versions, scores, weights) and `report.md` (the tables) to a folder."""
        import transformers

        from .. import __version__

        versions = {"agevlm": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
        results: dict[str, Any] = {"settings": self.settings, "versions": versions, "scores": self.scores}
        if self.weights is not None:
            results["weights"] = self.weights
        if "data" in self.settings:
            results["data"] = identify(self.settings["data"])  # now, while it can be told whether it is a folder
        facts = [f"- {name}: {value}" for name, value in self.settings.items() if value not in (None, "")]
        report = "\n\n".join([f"# {self.title}", "\n".join(facts), *map(markdown_table, self.tables)])
        with update_folder(folder) as partial:
            text = json.dumps(results, indent=1, ensure_ascii=False)
            (partial / "results.json").write_text(text + "\n", encoding="utf-8")
            (partial / "report.md").write_text(report + "\n", encoding="utf-8")


def evaluate(
    benchmark: Benchmark,
    model: str | os.PathLike | tuple[PreTrainedModel, ProcessorMixin],
    out: str | os.PathLike | None = None,
    *,
    limit: int | None = None,
    prompt_suffix: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: str | None = "questions",
) -> Evaluation:
    """Ask a model the questions of a benchmark and score its answers.

    Args:
        benchmark: such as `Pope(data, images)`; see [`BENCHMARKS`].
        model: folder or Hub id of an image-text-to-text model, or a model in memory with its processor.
        out: folder for `answers.jsonl`, `results.json` and `report.md`; a run of the same settings that was stopped resumes
            there. By default nothing is written.
        limit: only the first questions of each kind; all by default.
        prompt_suffix: a line to add to each question, none where it is empty; the benchmark's by default.
        batch_size: questions that are answered together; answers do not depend on it.
        max_new_tokens: longest answer, in tokens; the benchmark's by default.
        device, dtype: of a model that is loaded, see [`load_model`].
        progress: the label of the progress bar; None for none.

    Returns:
        The scores, answers and tables.

    Raises:
        FileExistsError: if `out` has answers of other settings, weights or questions, or other files and no answers.
        OSError: if there is no such model or data.
        ValueError: for data, a model or an option that is invalid.
    """
    if out is not None and not (Path(out) / "answers.jsonl").is_file():
        check_new_folder(Path(out))
    questions = benchmark.questions(limit)
    if not questions:
        raise ValueError(f"{benchmark.title} has no questions in this data")
    name = str(model) if isinstance(model, (str, os.PathLike)) else model[0].name_or_path or type(model[0]).__name__
    loaded, processor = load_model(model, device, dtype) if isinstance(model, (str, os.PathLike)) else model
    # From the files, because weights that are loaded in another type have other values.
    weights = None if isinstance(model, tuple) or not os.path.isdir(name) else read_fingerprint(name)
    prompt_suffix = benchmark.prompt_suffix if prompt_suffix is None else prompt_suffix
    max_new_tokens = benchmark.max_new_tokens if max_new_tokens is None else max_new_tokens
    settings = {
        "benchmark": benchmark.title,
        **benchmark.settings(loaded.config),
        "limit": limit,
        "model": name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt_suffix": prompt_suffix,
        "max_new_tokens": max_new_tokens,
    }
    asked = [replace(q, text="\n".join(filter(None, (q.text, prompt_suffix)))) for q in questions]
    answers = answer(
        loaded,
        processor,
        asked,
        None if out is None else Path(out) / "answers.jsonl",
        settings=settings,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        inspect=benchmark.inspect,
        progress=progress,
    )
    scores = benchmark.score(asked, answers)
    found = Evaluation(settings, scores, asked, answers, benchmark.tables(scores, settings), weights)
    if out is not None:
        found.save(out)
        if benchmark.draw is not None:
            benchmark.draw(scores, Path(out) / "plot.png")
    return found


def evaluate_pope(
    model: str | os.PathLike | tuple[PreTrainedModel, ProcessorMixin],
    out: str | os.PathLike | None = None,
    data: str | os.PathLike = Pope.data,
    images: str | os.PathLike | None = None,
    *,
    categories: Sequence[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """[`evaluate`] a model on POPE. See [`~agevlm.evaluation.pope.Pope`] for `data`, `images`, `categories`."""
    return evaluate(Pope(data, images, categories), model, out, **settings)


def evaluate_cv_bench(
    model: str | os.PathLike | tuple[PreTrainedModel, ProcessorMixin],
    out: str | os.PathLike | None = None,
    data: str | os.PathLike = CvBench.data,
    images: str | os.PathLike | None = None,
    *,
    tasks: Sequence[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """[`evaluate`] a model on CV-Bench. See [`~agevlm.evaluation.cv_bench.CvBench`] for `data`, `images`, `tasks`."""
    return evaluate(CvBench(data, images, tasks), model, out, **settings)


def evaluate_scenes(
    model: str | os.PathLike | tuple[PreTrainedModel, ProcessorMixin],
    out: str | os.PathLike | None = None,
    *,
    data: "str | os.PathLike | Dataset",
    split: str = Scenes.split,
    **settings: Any,
) -> Evaluation:
    """[`evaluate`] a model on grounded scenes. See [`~agevlm.evaluation.scenes.Scenes`] for `data`, `split`."""
    return evaluate(Scenes(data, split), model, out, **settings)


def evaluate_grounding(
    model: str | os.PathLike | tuple[PreTrainedModel, ProcessorMixin],
    out: str | os.PathLike | None = None,
    *,
    data: "str | os.PathLike | Dataset",
    split: str = Grounding.split,
    **settings: Any,
) -> Evaluation:
    """[`evaluate`] a model's grounded answers. See [`~agevlm.evaluation.grounding.Grounding`] for `data`, `split`."""
    return evaluate(Grounding(data, split), model, out, **settings)


# --- tables ---


def markdown_table(rows: TextTable) -> str:
    """A table in Markdown; the first column is of names, the others of numbers."""
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(rows: TextTable) -> Table:
    """A table for the terminal; the first column is of names, the others of numbers."""
    header, *body = rows
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    return table
