# SPDX-License-Identifier: Apache-2.0
"""The report on the results of [`research.runs.run_all`]: tables, claims and figures."""

import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from agevlm.evaluation.benchmark import markdown_table, rich_table
from agevlm.evaluation.scenes import YES_NO_KINDS
from agevlm.files import update_folder
from agevlm.plots import choose_colors, draw_bars, draw_training

# By variant the results of its seeds.
Results = Mapping[str, Sequence[Mapping[str, Any]]]
# Rows of text; the first is the header.
Rows = list[list[str]]

_YES_NO = dict(
    zip(
        YES_NO_KINDS, ("existence (random)", "existence (popular)", "existence (adversarial)", "negation"), strict=True
    )
)
_EXISTENCE = tuple(f"{_YES_NO[kind]}, F1" for kind in YES_NO_KINDS[:3])
_AUROC = "similarity, AUROC"


@dataclass(frozen=True)
class Summary:
    """A score of a variant on a split, by seed, and its chance level, None where there is none."""

    values: tuple[float, ...]
    chance: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; NaN for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{spread}"


@dataclass(frozen=True)
class Claim:
    """A statement about the means over seeds, whether it held, and its numbers."""

    text: str
    held: bool
    numbers: str


def _scores(result: Mapping[str, Any], split: str) -> dict[str, tuple[float, float | None]]:
    """Scores of one run with their chance levels, by name, in the order of the tables."""
    rows, found = result["scores"][split], {}
    for kind, name in _YES_NO.items():
        if kind in rows:
            row = rows[kind]
            # The share of questions whose answer is yes, from accuracy = 1 - (said - hits) - (there - hits).
            there = 1 - row["score"] - row["yes_ratio"] + 2 * row["precision"] * row["yes_ratio"]
            found[f"{name}, F1"] = row["f1"], 2 * there / (1 + there)
            found[f"{name}, accuracy"] = row["score"], row["chance"]
    for kind in ("objects", "count", "position", "relation"):
        if kind in rows:
            found["objects, F1" if kind == "objects" else kind] = rows[kind]["score"], rows[kind]["chance"]
    if "pointing" in rows:
        row = rows["pointing"]
        found["pointing"] = row["score"], row["chance_any_object"]
        found["attention IoU"] = row["iou"], None
        found["attention inside"] = row["mass"], row["chance"]
    if similarity := result.get("similarity", {}).get(split):
        found[_AUROC] = similarity["auroc"], 0.5
        found["similarity, overlap (low is good)"] = similarity["overlap"], 1.0
    return found


def summarize(results: Results) -> dict[str, dict[str, dict[str, Summary]]]:
    """By variant, split and name of the score.

    Chance of F1 is that of always answering "Yes", `2p / (1 + p)` where a share `p` of the answers is yes; of pointing, that of
    pointing at any object of the scene; of `similarity, AUROC` it is 0.5, and of `similarity, overlap (low is good)` 1. All others
    come from [`~agevlm.evaluation.evaluate_scenes`].
    """
    summaries: dict[str, dict[str, dict[str, Summary]]] = {}
    for name, runs in results.items():
        summaries[name] = {}
        for split in runs[0]["scores"]:
            scores = [_scores(result, split) for result in runs]
            summaries[name][split] = {}
            for score in scores[0]:
                values, chances = zip(*(found[score] for found in scores), strict=True)
                chance = None if None in chances else statistics.fmean(chances)
                summaries[name][split][score] = Summary(values, chance)
    return summaries


def _names(summaries: Sequence[Mapping[str, Summary]]) -> list[str]:
    """Names of all scores, in the order of those who have most."""
    return list(dict.fromkeys(name for found in sorted(summaries, key=len, reverse=True) for name in found))


# --- tables ---


def score_tables(results: Results) -> dict[str, Rows]:
    """By title, for each split: the scores of the variants, mean ± standard deviation over the seeds; and of variants with
    cross-attention, the pointing of each block."""
    summaries = summarize(results)
    first = next(iter(results.values()))
    tables: dict[str, Rows] = {}
    for split in first[0]["scores"]:
        rows = [["", *results, "chance"]]
        for name in _names([splits[split] for splits in summaries.values()]):
            found = [splits[split].get(name) for splits in summaries.values()]
            chances = [s.chance for s in found if s is not None and s.chance is not None]
            rows.append([name, *(str(s or "") for s in found), _range(chances)])
        tables[f"{split}: {_seeds(results, f'mean ± standard deviation of {len(first)} seeds')}"] = rows
        blocks = {
            name: [
                statistics.fmean(values)
                for values in zip(*(r["scores"][split]["pointing"]["by_block"] for r in runs), strict=True)
            ]
            for name, runs in results.items()
            if "pointing" in runs[0]["scores"][split]
        }
        if blocks:
            most = max(map(len, blocks.values()))
            rows = [["", *(f"block {number}" for number in range(1, most + 1)), "mean map"]]
            for name, means in blocks.items():
                cells = [f"{value:.3f}" for value in means] + [""] * (most - len(means))
                rows.append([name, *cells, f"{summaries[name][split]['pointing'].mean:.3f}"])
            tables[f"{split}: pointing by block"] = rows
    return tables


def _seeds(results: Results, several: str) -> str:
    """What the numbers are: `several`, or a single seed's."""
    return several if len(next(iter(results.values()))) > 1 else "1 seed"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{limit(values):.3f}" if values else "" for limit in (min, max))
    return low if low == high else f"{low}–{high}"


# --- claims ---


def check_claims(results: Results) -> list[Claim]:
    """What guidance and cross-attention should achieve, checked on the means of the arms `guided`, `unguided` and
    `concatenation`. Claims about an arm or a score that is not there are left out."""
    summaries = summarize(results)
    claims = []

    def claim(text: str, split: str, score: str, rival: str | None, holds: Callable[[float, float], bool]) -> None:
        ours = summaries.get("guided", {}).get(split, {}).get(score)
        theirs = None if rival is None else summaries.get(rival, {}).get(split, {}).get(score)
        if ours is None or (rival is not None and theirs is None):
            return
        numbers = f"{ours}" if theirs is None else f"{ours} and {theirs}"
        if ours.chance is not None:
            numbers += f"; chance {ours.chance:.3f}" + (' (always "Yes")' if score in _EXISTENCE else "")
            numbers += ", which guided does not exceed" if ours.mean <= ours.chance else ""
        held = holds(ours.mean, math.nan if theirs is None else theirs.mean)
        claims.append(Claim(f"{split}: {score}, {text}", held, numbers))

    def more(ours: float, theirs: float) -> bool:
        return ours > theirs

    for split in dict.fromkeys(split for splits in summaries.values() for split in splits):
        for score in _EXISTENCE:
            for rival in ("unguided", "concatenation"):
                claim(f"guided > {rival}", split, score, rival, more)
        claim("guided ≥ 0.80", split, "pointing", None, lambda ours, _: ours >= 0.8)
        claim("guided ≥ 2 × unguided", split, "pointing", "unguided", lambda ours, theirs: ours >= 2 * theirs)
        claim("guided ≥ 0.90", split, _AUROC, None, lambda ours, _: ours >= 0.9)
        claim("guided > concatenation", split, _AUROC, "concatenation", more)
        for score in ("relation", "position"):
            claim("guided > concatenation", split, score, "concatenation", more)
    losses = {name: [run["text_loss"] for run in runs if "text_loss" in run] for name, runs in results.items()}
    if any(losses.values()):
        held = all(loss["model"] == loss["language_model"] for found in losses.values() for loss in found)
        numbers = "; ".join(
            f"{name} {', '.join(dict.fromkeys(str(loss['model']) for loss in found))}"
            for name, found in losses.items()
            if found
        )
        alone = ", ".join(dict.fromkeys(str(loss["language_model"]) for found in losses.values() for loss in found))
        text = "loss on text without an image, every model = its language model alone, to the last bit"
        claims.append(Claim(text, held, f"{numbers}; alone {alone}"))
    return claims


# --- figures ---


def draw_scores(results: Results, split: str, path: Path, reference: str | None = None) -> None:
    """Draws a panel for each score of a split, with a bar for each variant.

    Args:
        reference: the variant that is drawn as a line across each panel rather than as a bar.
    """
    summaries = {name: splits[split] for name, splits in summarize(results).items()}
    panels = {
        score: {name: _bar(found.get(score)) for name, found in summaries.items()}
        for score in _names(list(summaries.values()))
    }
    heading = f"{split}: {_seeds(results, 'mean, standard deviation and single seeds')}"
    draw_bars(panels, path, heading, titles=_titles(results), reference=reference)


def draw_auroc(results: Results, path: Path) -> None:
    """Draws the AUROC of matching against random images on each split, as [`draw_scores`] does."""
    summaries = summarize(results)
    splits = dict.fromkeys(split for found in summaries.values() for split in found)
    panels = {split: {name: _bar(found[split].get(_AUROC)) for name, found in summaries.items()} for split in splits}
    draw_bars(panels, path, "Do hidden states distinguish the matching image? (AUROC)", titles=_titles(results))


def _bar(summary: Summary | None) -> tuple[tuple[float, ...], float | None] | None:
    return None if summary is None else (summary.values, summary.chance)


def _titles(results: Results) -> dict[str, str]:
    return {name: runs[0]["title"] for name, runs in results.items()}


def draw_curves(results: Results, path: Path, reference: str | None = None) -> None:
    """Draws the language modeling loss and the pointing accuracy of training; the `reference` is black."""
    titles, colors = _titles(results), choose_colors(results, reference)
    logs = {titles[name]: [run["log"] for run in runs] for name, runs in results.items()}
    log = next(iter(results.values()))[0]["log"]
    ends = [entry["step"] for entry, after in itertools.pairwise(log) if entry["stage"] != after["stage"]]
    draw_training(
        logs,
        path,
        ends,
        names=("lm_loss", "pointing_accuracy"),
        colors={titles[name]: color for name, color in colors.items()},
    )


# --- the report ---


def write_report(
    results: Results,
    folder: Path,
    *,
    title: str,
    topics: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    claims: Sequence[Claim] = (),
    notes: Mapping[str, Any] | None = None,
) -> Group:
    """Writes `report.md`, its figures, and `results.json` (all results without their logs) in place of a former report.

    Args:
        folder: of the report, which appears whole. Other files in it stay.
        topics: names of variants that are shown together, by heading; all together by default.
        reference: the variant that figures show as a line; it comes first in each topic's tables.
        claims: of [`check_claims`].
        notes: further facts, by name.

    Returns:
        The tables, for the terminal.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    command = shlex.join(["python", *sys.orig_argv[1:]])
    runs = [run for found in results.values() for run in found]
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    versions = [dict(pairs) for pairs in dict.fromkeys(tuple(run["versions"].items()) for run in runs)]
    minutes = sum(sum(run["seconds"].values()) for run in runs) / 60
    chosen = {
        topic: {name: results[name] for name in dict.fromkeys([*([reference] if reference else []), *names])}
        for topic, names in (topics or {"": list(results)}).items()
    }
    facts = {
        "command": f"`{command}`",
        "seeds": ", ".join(map(str, seeds)),
        "runs": f"{len(runs)}, {minutes:.0f} minutes of training and examination, one run after the other",
        "versions": "; ".join(", ".join(f"{k} {v}" for k, v in found.items()) for found in versions),
        **{name: _plain(note) for name, note in (notes or {}).items()},
        **{f"`{name}`": results[name][0]["title"] for found in chosen.values() for name in found},
    }
    lines = [f"# {title}", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    tables: list[Table] = []

    def add_table(heading: str, rows: Rows) -> None:
        lines.extend(["", f"**{heading}**", "", markdown_table(rows)])
        table = rich_table(rows)
        table.title, table.title_justify = heading, "left"
        tables.append(table)

    def add_figure(name: str) -> Path:
        lines.extend(["", f"![{name.replace('_', ' ')}]({name}.png)"])
        return partial / f"{name}.png"

    with update_folder(folder) as partial:
        for topic, found in chosen.items():
            first, *others = next(iter(found.values()))[0]["scores"]
            lines += ["", f"## {topic or 'Scores'}".replace("_", " ")]
            for heading, rows in score_tables(found).items():
                add_table(heading, rows)
            if topic:
                draw_scores(found, first, add_figure(f"topic_{topic}"), reference)
                continue
            for split in (first, *others):
                draw_scores(found, split, add_figure(f"scores_{split}"), reference)
            draw_auroc(found, add_figure("similarity"))
        if claims:
            lines += ["", "## Claims", "", "On the means over the seeds; the first of two numbers is that of guided."]
            verdicts = [[claim.text, "held" if claim.held else "did not hold", claim.numbers] for claim in claims]
            heading = f"Claims: {sum(claim.held for claim in claims)} of {len(claims)} held"
            add_table(heading, [["claim", "verdict", "numbers"], *verdicts])
        lines += ["", "## Training"]
        for topic, found in chosen.items():
            draw_curves(found, add_figure(f"training_{topic}" if topic else "training"), reference)
        (partial / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        record = {
            "title": title,
            "command": command,
            "seeds": seeds,
            "versions": versions,
            "minutes": minutes,
            "notes": dict(notes or {}),
            "claims": [asdict(claim) for claim in claims],
            "results": {
                name: [{key: value for key, value in run.items() if key != "log"} for run in found]
                for name, found in results.items()
            },
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (partial / "results.json").write_text(text + "\n", encoding="utf-8")
    return Group(*tables)


def _plain(note: Any) -> str:
    if isinstance(note, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in note.items())
    return f"{note:.3f}" if isinstance(note, float) else str(note)
