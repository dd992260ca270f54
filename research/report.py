# SPDX-License-Identifier: Apache-2.0
"""What experiments have found, as tables, claims and figures: the report on the results of [`~.experiments.run_all`]."""

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from agevlm.evaluation.scenes import YES_NO_KINDS
from agevlm.files import new_folder

# By variant the results of its seeds.
Results = Mapping[str, Sequence[Mapping[str, Any]]]

_YES_NO = dict(
    zip(
        YES_NO_KINDS, ("existence (random)", "existence (popular)", "existence (adversarial)", "negation"), strict=True
    )
)
_EXISTENCE = tuple(f"{_YES_NO[kind]}, F1" for kind in YES_NO_KINDS[:3])
_COLOURS = ("#999999", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


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
    """Something that is to hold of the means over seeds, whether it does, and its numbers."""

    text: str
    held: bool
    numbers: str


@dataclass(frozen=True)
class Sheet:
    """A table, the first column of names and the others of numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


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
    for kind, name in {
        "objects": "objects, F1",
        "count": "count",
        "position": "position",
        "relation": "relation",
    }.items():
        if kind in rows:
            found[name] = rows[kind]["score"], rows[kind]["chance"]
    if "pointing" in rows:
        row = rows["pointing"]
        found["pointing"] = row["score"], row["chance"]
        found["attention IoU"] = row["iou"], None
        found["attention inside"] = row["mass"], row["chance"]
    if similarity := result.get("similarity", {}).get(split):
        found["similarity, AUROC"] = similarity["auroc"], 0.5
        found["similarity, overlap (low is good)"] = similarity["overlap"], 1.0
    return found


def summarize(results: Results) -> dict[str, dict[str, dict[str, Summary]]]:
    """By variant, split and name of the score.

    Chance of F1 is that of always answering "Yes", `2p / (1 + p)` where a share `p` of the answers is yes; of `similarity,
    AUROC` it is 0.5, and of `similarity, overlap (low is good)` 1. All others are those of [`~agevlm.evaluation.scenes.evaluate_scenes`].
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


def score_sheets(results: Results) -> list[Sheet]:
    """For each split the scores of the variants, mean ± standard deviation over the seeds, and of the blocks of those with
    cross-attention where phrases look."""
    summaries = summarize(results)
    first = next(iter(results.values()))
    seeds = _seeds(results, f"mean ± standard deviation of {len(first)} seeds")
    sheets = []
    for split in first[0]["scores"]:
        names = _names([splits[split] for splits in summaries.values()])
        rows = []
        for name in names:
            found = [splits[split].get(name) for splits in summaries.values()]
            chances = [s.chance for s in found if s is not None and s.chance is not None]
            rows.append([name, *(str(s or "") for s in found), _range(chances)])
        sheets.append(Sheet(f"{split}: {seeds}", ["", *results, "chance"], rows))
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
            rows = [
                [
                    name,
                    *(f"{value:.3f}" for value in means),
                    *[""] * (most - len(means)),
                    f"{summaries[name][split]['pointing'].mean:.3f}",
                ]
                for name, means in blocks.items()
            ]
            columns = ["", *(f"block {number}" for number in range(1, most + 1)), "mean map"]
            sheets.append(Sheet(f"{split}: pointing by block", columns, rows))
    return sheets


def _seeds(results: Results, several: str) -> str:
    """What numbers are said to be: `several`, or of a single seed."""
    return several if len(next(iter(results.values()))) > 1 else "1 seed"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{limit(values):.3f}" if values else "" for limit in (min, max))
    return low if low == high else f"{low}–{high}"


# --- claims ---


def check_claims(results: Results) -> list[Claim]:
    """What guidance and cross-attention are to achieve, checked on the means of the arms `guided`, `unguided` and
    `concatenation`; what needs an arm or a score that is not there is left out."""
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
        claim("guided ≥ 0.90", split, "similarity, AUROC", None, lambda ours, _: ours >= 0.9)
        claim("guided > concatenation", split, "similarity, AUROC", "concatenation", more)
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


def claim_sheet(claims: Sequence[Claim]) -> Sheet:
    """Claims with their verdicts and numbers; of two numbers the first is that of `guided`."""
    rows = [[claim.text, "held" if claim.held else "did not hold", claim.numbers] for claim in claims]
    return Sheet(
        f"Claims: {sum(claim.held for claim in claims)} of {len(claims)} held", ["claim", "verdict", "numbers"], rows
    )


# --- figures ---


def draw_scores(results: Results, split: str, path: Path, reference: str | None = None) -> None:
    """Draws a panel for each score of a split: a bar for each variant with the standard deviation over its seeds, each seed as
    a dot, and chance as a dashed line.

    Args:
        reference: the variant that is drawn as a line across each panel rather than as a bar.
    """
    summaries = {name: splits.get(split, {}) for name, splits in summarize(results).items()}
    line = {} if reference is None else summaries.pop(reference)
    scores = _names([*summaries.values(), line])
    _draw_bars(
        [(score, {name: found.get(score) for name, found in summaries.items()}, line.get(score)) for score in scores],
        {name: results[name][0]["title"] for name in summaries},
        path,
        f"{split}: {_seeds(results, 'mean, standard deviation and single seeds')}",
        reference and results[reference][0]["title"],
    )


def draw_similarity(results: Results, path: Path) -> None:
    """Draws the AUROC of matching against random images on each split, as [`draw_scores`] does."""
    summaries, score = summarize(results), "similarity, AUROC"
    splits = dict.fromkeys(split for found in summaries.values() for split in found)
    _draw_bars(
        [
            (split, {name: found.get(split, {}).get(score) for name, found in summaries.items()}, None)
            for split in splits
        ],
        {name: runs[0]["title"] for name, runs in results.items()},
        path,
        "Do hidden states tell the matching image from another? (AUROC)",
    )


def _draw_bars(
    panels: Sequence[tuple[str, Mapping[str, Summary | None], Summary | None]],
    titles: Mapping[str, str],
    path: Path,
    heading: str,
    reference: str | None = None,
) -> None:
    """Panels of bars: each has a title, a summary (or none) by variant, and a summary that is drawn as a line."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, save = _figure((max(6.0, 2.9 * columns), 2.2 * lines + 1.1))
    grid = figure.subplots(lines, columns, squeeze=False)
    colours = _colours(titles)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, summaries, line) in zip(grid.flat, panels, strict=False):
        for place, (name, summary) in enumerate(summaries.items()):
            if summary is None:
                axes.text(place, 0.02, "none", ha="center", color="grey", fontsize=8)
                continue
            error = None if math.isnan(summary.deviation) else summary.deviation
            axes.bar(place, summary.mean, 0.72, yerr=error, capsize=4, color=colours[name], alpha=0.75, ecolor="black")
            if len(summary.values) > 1:
                spread = [place + 0.16 * (i - (len(summary.values) - 1) / 2) for i in range(len(summary.values))]
                axes.scatter(spread, summary.values, s=9, color="black", zorder=3, linewidths=0)
            if summary.chance is not None:
                axes.plot(
                    [place - 0.5, place + 0.5], [summary.chance] * 2, color="#b00020", linestyle="--", linewidth=1.2
                )
        if line is not None:
            axes.axhline(line.mean, color="black", linewidth=1.2)
            if not math.isnan(line.deviation):
                axes.axhspan(
                    line.mean - line.deviation, line.mean + line.deviation, color="black", alpha=0.12, linewidth=0
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlim(-0.6, len(summaries) - 0.4)
        axes.set_ylim(0, 1.05)
        axes.set_xticks([])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    legend: list[Any] = [Patch(color=colours[name], alpha=0.75, label=title) for name, title in titles.items()]
    if reference is not None:
        legend.append(Line2D([], [], color="black", linewidth=1.2, label=reference))
    legend.append(Line2D([], [], color="#b00020", linestyle="--", linewidth=1.2, label="chance"))
    figure.suptitle(heading, fontsize=11)
    figure.legend(handles=legend, loc="outside lower center", ncols=min(3, len(legend)), frameon=False, fontsize=9)
    save(path)


def _colours(names: Iterable[str], reference: str | None = None) -> dict[str, str]:
    """A variant's colour is the same in all figures of a topic: black of the reference, one of its own for each other."""
    colours = dict(zip((name for name in names if name != reference), itertools.cycle(_COLOURS), strict=False))
    return colours if reference is None else {**colours, reference: "black"}


def draw_training(results: Results, path: Path, reference: str | None = None) -> None:
    """Draws the language modelling loss and pointing accuracy of training: the mean over seeds, and each seed thin.

    Args:
        reference: the variant that is drawn in black, as in [`draw_scores`].
    """
    figure, save = _figure((10, 4.2))
    panels = figure.subplots(1, 2)
    colours = _colours(results, reference)
    for axes, key in zip(panels, ("lm_loss", "pointing_accuracy"), strict=True):
        for name, runs in results.items():
            colour, curves = colours[name], []
            for run in runs:
                # The concatenating model's loss has no other part.
                values = {e["step"]: e.get(key, e["loss"] if key == "lm_loss" else None) for e in run["log"]}
                curves.append({step: value for step, value in values.items() if value is not None})
                if len(runs) > 1:
                    axes.plot(list(curves[-1]), list(curves[-1].values()), color=colour, alpha=0.3, linewidth=0.7)
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
            axes.plot(steps, means, color=colour, linewidth=1.8, label=runs[0]["title"])
        log = next(iter(results.values()))[0]["log"]
        for before, after in itertools.pairwise(log):
            if before["stage"] != after["stage"]:
                axes.axvline(before["step"], color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(key.replace("_", " ").replace("lm", "language modelling"), fontsize=10)
        axes.set_xlabel("step (dotted: the next stage begins)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[1].set_ylim(0, 1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    save(path)


def _figure(size: tuple[float, float]) -> tuple[Any, Callable[[Path], None]]:
    """A figure, and what writes it; without pyplot, which would choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90, layout="constrained")
    return figure, FigureCanvasAgg(figure).print_png


# --- the report ---


def write_report(
    results: Results,
    folder: Path,
    *,
    title: str,
    command: str,
    topics: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    claims: Sequence[Claim] = (),
    notes: Mapping[str, Any] | None = None,
) -> Group:
    """Writes `report.md`, its figures, and `results.json` (all results without their logs) as one folder, in place of a former
    report there.

    Args:
        folder: of the report; it appears whole.
        command: that made the results.
        topics: names of variants that are shown together, by heading; all together by default.
        reference: the variant that figures show as a line; it comes first in each topic's tables.
        claims: of [`check_claims`].
        notes: what else is to be said, by name.

    Returns:
        the tables, for the terminal.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    topics = topics or {"": list(results)}
    runs = [run for found in results.values() for run in found]
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    versions = [dict(pairs) for pairs in dict.fromkeys(tuple(run["versions"].items()) for run in runs)]
    minutes = sum(sum(run["seconds"].values()) for run in runs) / 60
    facts = {
        "command": f"`{command}`",
        "seeds": ", ".join(map(str, seeds)),
        "runs": f"{len(runs)}, {minutes:.0f} minutes of training and examination, one run after the other",
        "versions": "; ".join(", ".join(f"{k} {v}" for k, v in found.items()) for found in versions),
        **{name: _plain(note) for name, note in (notes or {}).items()},
    }
    lines = [f"# {title}", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    chosen = {
        topic: {name: results[name] for name in dict.fromkeys([*([reference] if reference else []), *names])}
        for topic, names in topics.items()
    }
    shown = dict.fromkeys(name for found in chosen.values() for name in found)
    lines += [f"- `{name}`: {results[name][0]['title']}" for name in shown]
    tables: list[Table] = []

    def add(sheet: Sheet) -> None:
        lines.extend(["", sheet.markdown()])
        tables.append(sheet.rich())

    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    with new_folder(new) as partial:
        for topic, found in chosen.items():
            first, *others = next(iter(found.values()))[0]["scores"]
            figures = (
                {f"scores_{split}": split for split in (first, *others)} if not topic else {f"topic_{topic}": first}
            )
            lines += ["", f"## {topic or 'Scores'}".replace("_", " ")]
            for sheet in score_sheets(found):
                add(sheet)
            for name, split in figures.items():
                draw_scores(found, split, partial / f"{name}.png", reference)
                lines += ["", f"![{name.replace('_', ' ')}]({name}.png)"]
            if not topic:
                draw_similarity(found, partial / "similarity.png")
                lines += ["", "![similarity](similarity.png)"]
        if claims:
            lines += ["", "## Claims", "", "On the means over the seeds; of two numbers the first is guided."]
            add(claim_sheet(claims))
        lines += ["", "## Training"]
        for topic, found in chosen.items():
            name = f"training_{topic}" if topic else "training"
            draw_training(found, partial / f"{name}.png", reference)
            lines += ["", f"![{name.replace('_', ' ')}]({name}.png)"]
        (partial / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        kept = {
            name: [{k: v for k, v in run.items() if k != "log"} for run in found] for name, found in results.items()
        }
        record = {
            "title": title,
            "command": command,
            "seeds": seeds,
            "versions": versions,
            "minutes": minutes,
            "notes": dict(notes or {}),
            "claims": [asdict(claim) for claim in claims],
            "results": kept,
        }
        (partial / "results.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return Group(*tables)


def _plain(note: Any) -> str:
    if isinstance(note, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in note.items())
    return f"{note:.3f}" if isinstance(note, float) else str(note)
