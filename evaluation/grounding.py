# SPDX-License-Identifier: Apache-2.0
"""Grounded answers: their calibration on validation scenes, and their examination on others."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torchvision.ops import box_iou
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..attention.coverage import token_coverage
from ..attention.grid import image_grid
from ..attention.losses import pointing_cells, pointing_chances
from ..inference.attention import Phrase, show_reply
from ..inference.generation import ask_about
from ..inference.grounding import (
    CALIBRATION_FILE,
    FEATURES,
    Calibration,
    find_boxes,
    find_calibration,
    find_points,
    find_regions,
    ground_reply,
    noun_phrases,
    phrase_features,
    trained_fingerprint,
)
from ..inference.replies import Reply, cross_attention_layers, reply
from ..plots import draw_grounding_scores
from ..processing.rows import mask_from_rle
from ..resume import digest
from .answers import Question
from .scenes import EXISTENCE_KINDS, YES_NO_KINDS, Scenes

if TYPE_CHECKING:
    from datasets import Dataset

THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RESAMPLES = 1000
BINS = 10
"""Of the calibration error."""


# --- what the scenes know ---


def _class_of(phrase: Phrase, question: Question) -> str | None:
    """The class of the scenes that a phrase names."""
    return next((name for name in question.choices if name.lower() == phrase.text.lower()), None)


def _known_phrases(question: Question, found: Reply) -> Iterator[tuple[Phrase, str]]:
    """The noun phrases of a question and of the answer to it that name a class of the scenes, with the class."""
    for phrase in noun_phrases(question.text, found.text):
        if (name := _class_of(phrase, question)) is not None:
            yield phrase, name


def _could_be_absent(source: str, question: Question) -> bool:
    """Whether the words leave it open if a thing is there: in yes/no questions, and in answers. "Where is the dog?" does not."""
    return source == "answer" or question.kind in YES_NO_KINDS


def mask_box(mask: np.ndarray) -> torch.Tensor:
    """The box around a mask, bool `(height, width)`, float64 `(4,)`: left, top, right, bottom in pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float64)


def best_grid_iou(box: torch.Tensor, cell: tuple[float, float], size: tuple[int, int]) -> float:
    """The IoU of a box `(4,)` with the box of whole cells that fits it best, in an image of `size` `(width, height)`.

    A side of the best box is one of the two grid lines around the side of the given one: others only lose.
    """
    sides = []
    for axis in range(2):
        places = []
        for side in (box[axis], box[axis + 2]):
            line = float(side) / cell[axis]
            places.append([min(edge * cell[axis], size[axis]) for edge in (np.floor(line), np.ceil(line))])
        sides.append([(first, last) for first in places[0] for last in places[1] if first < last])
    candidates = [[left, top, right, bottom] for left, right in sides[0] for top, bottom in sides[1]]
    return float(box_iou(torch.tensor(candidates, dtype=torch.float64), box[None]).max())


def _several(questions: Sequence[Question]) -> set[tuple[str, str]]:
    """Scene and class of what appears several times, which the scenes' question of the number says."""
    return {
        (question.source, question.text[slice(*question.span)])
        for question in questions
        if question.kind == "count" and question.span and question.expected != "1"
    }


# --- calibration ---


class _Known(NamedTuple):
    """A phrase whose thing is known: its maps `(blocks, rows, columns)`, and the box `(4,)` and the mask of the thing, None where it is
    absent. `once`: the scene has one of its class. `rated`: the words leave it open if the thing is there."""

    phrase: Phrase
    maps: torch.Tensor
    box: torch.Tensor | None
    mask: np.ndarray | None
    once: bool
    rated: bool


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: "str | os.PathLike | Dataset",
    split: str = "validation",
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: str | None = "questions",
) -> Calibration:
    """Chooses how a model's maps are read for grounded answers.

    The model answers questions of scenes whose things are known. The blocks and the threshold give the boxes with the largest mean
    IoU: the blocks are ranked by their own boxes, and the best one, two, … or all are averaged. The point is then the kind that lies in
    its object most often. A logistic regression makes a probability of the phrases' features ([`phrase_features`]), from phrases of answers and of
    yes/no questions.

    Args:
        model: an AGE-VLM.
        data: grounded scenes, a folder or one of its splits in memory; those that no result is measured on.
        split: of the folder.
        limit: number of scenes, the first ones; all by default.
        batch_size: questions that are answered together.
        progress: the label of the progress bar; None for none.

    Raises:
        ValueError: if the scenes name nothing that is there, or nothing that is absent.
    """
    scenes = Grounding(data, split)
    questions = scenes.questions(limit)
    several = _several(questions)
    # Maps of one shape and place together, so that they are read as a batch.
    groups: dict[Any, list[_Known]] = {}
    starts = range(0, len(questions), batch_size)
    for start in track(starts, progress or "", disable=progress is None):
        asked = questions[start : start + batch_size]
        conversations = [ask_about(question.text, question.open_image()) for question in asked]
        replies = reply(model, processor, conversations, max_new_tokens=scenes.max_new_tokens, maps=True)
        for question, found in zip(asked, replies, strict=True):
            if not (known := list(_known_phrases(question, found))):
                continue
            attention = show_reply(model, processor, found, question.text, [phrase for phrase, _ in known])
            masks = dict(zip(question.names, question.objects, strict=True))
            key = (attention.maps.shape[2:], attention.cell, attention.image.size)
            for number, (phrase, name) in enumerate(known):
                mask = mask_from_rle(masks[name]) if name in masks else None
                box = None if mask is None else mask_box(mask)
                maps = torch.from_numpy(attention.maps[:, number])
                once, rated = (question.source, name) not in several, _could_be_absent(phrase.source, question)
                groups.setdefault(key, []).append(_Known(phrase, maps, box, mask, once, rated))
    every = [each for group in groups.values() for each in group]
    there = [each.box is not None for each in every if each.rated]
    if all(there) or not any(there):
        raise ValueError(
            f"{sum(there)} of {len(there)} phrases in the yes/no questions and the answers of {scenes.place} name something that is there; a "
            "calibration needs some that are there and some that are not: name scenes of `agevlm scenes`, and more of them"
        )
    stacked = [(torch.stack([each.maps for each in group], 1), group, key) for key, group in groups.items()]

    def mean_iou(blocks: Sequence[int], threshold: float) -> float:
        values = []
        for maps, group, (_, cell, size) in stacked:
            boxes = find_boxes(find_regions(maps[list(blocks)].mean(0), threshold), cell, size)
            values += [
                float(box_iou(box[None], each.box[None]))
                for box, each in zip(boxes, group, strict=True)
                if each.box is not None and each.once
            ]
        return float(np.mean(values)) if values else 0.0

    count = stacked[0][0].shape[0]
    single = [max(mean_iou([block], threshold) for threshold in THRESHOLDS) for block in range(count)]
    ranked = sorted(range(count), key=lambda block: -single[block])
    choices = [(sorted(ranked[:n]), threshold) for n in range(count, 0, -1) for threshold in THRESHOLDS]
    blocks, threshold = max(choices, key=lambda choice: mean_iou(*choice))

    def on_object(kind: str) -> float:
        hits = []
        for maps, group, (_, cell, size) in stacked:
            mean = maps[blocks].mean(0)
            points = find_points(mean, find_regions(mean, threshold), kind, cell, size)
            pairs = zip(points, group, strict=True)
            hits += [bool(each.mask[int(y), int(x)]) for (x, y), each in pairs if each.mask is not None]
        return float(np.mean(hits))

    features = torch.cat(
        [phrase_features(maps[blocks], threshold, [each.phrase for each in group]) for maps, group, _ in stacked]
    )
    weights, bias = fit_logistic(features[torch.tensor([each.rated for each in every])], torch.tensor(there))
    layers = cross_attention_layers(model.config)
    return Calibration(
        weights=trained_fingerprint(model),
        layers=tuple(layers[block] for block in blocks),
        threshold=threshold,
        point=max(("center", "peak"), key=on_object),  # type: ignore[arg-type]
        features=dict(zip(FEATURES, weights, strict=True)),
        bias=bias,
        data={
            "name": scenes.place,
            "split": split if isinstance(data, (str, os.PathLike)) else None,
            "questions": digest((q.key, q.text, q.objects) for q in questions),
            "scenes": len({question.source for question in questions}),
            "phrases": len(there),
            "absent": len(there) - sum(there),
        },
    )


def fit_logistic(features: torch.Tensor, labels: torch.Tensor) -> tuple[list[dict[str, float]], float]:
    """Logistic regression of bool labels `(n,)` on features `(n, d)`, with an L2 penalty of 1 on standardized features.

    Returns:
        of each feature its `mean`, `scale` and `weight`, and the bias.
    """
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 1e-3, scale, 1.0)  # one that is the same everywhere, but for rounding, says nothing
    x, y = (features - mean) / scale, labels.double()
    with torch.enable_grad():
        parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = x @ parameters[:-1] + parameters[-1]
            total = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
            total = (total + parameters[:-1].square().sum() / 2) / len(y)
            total.backward()
            return total

        optimizer.step(loss)  # type: ignore[arg-type]
    *weights, bias = parameters.tolist()
    rows = zip(mean.tolist(), scale.tolist(), weights, strict=True)
    return [{"mean": m, "scale": s, "weight": w} for m, s, w in rows], bias


# --- examination ---


@dataclass(frozen=True)
class Grounding(Scenes):
    """Grounded answers about scenes, a [`~agevlm.evaluation.benchmark.Benchmark`]: one question of each kind about each scene.

    Scored are the noun phrases of questions and answers that name a class of the scenes.

    Args:
        data: the folder that `build_scenes` has written, or one of its splits in memory.
        split: of the folder; another one than that of the calibration.
    """

    title = "grounded answers"
    draw = staticmethod(draw_grounding_scores)  # type: ignore[assignment]

    @property
    def place(self) -> str:
        """The data's name, without the folders that it is in."""
        return Path(self.data).resolve().name if self._is_folder else "data in memory"  # type: ignore[arg-type]

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As of [`Scenes`], and the calibration's content."""
        if not cross_attention_layers(config):
            raise ValueError(
                "grounded answers are read from cross-attention maps, which this model has none of: name an AGE-VLM"
            )
        file = Path(config._name_or_path or "", CALIBRATION_FILE)
        calibration = digest([file.read_text(encoding="utf-8")]) if file.is_file() else None
        return {**super().settings(config), "calibration": calibration}

    def questions(self, limit: int | None = None) -> list[Question]:
        """The first question of each kind about each scene.

        Args:
            limit: number of scenes, the first ones; all by default.
        """
        first: dict[tuple[str, str], Question] = {}
        for question in super().questions():
            first.setdefault((question.kind, question.source), question)
        scenes = list(dict.fromkeys(sorted((q.source for q in first.values()), key=int)))[:limit]
        return [question for question in first.values() if question.source in set(scenes)]

    def inspect(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        questions: Sequence[Question],
        replies: Sequence[Reply],
    ) -> list[dict[str, Any]]:
        """Of each question the `phrases` of known classes, as [`ground_reply`] gives them, with what is known about each: see
        [`judge`]."""
        calibration = find_calibration(model)
        rows: list[dict[str, Any]] = []
        for question, found in zip(questions, replies, strict=True):
            known = list(_known_phrases(question, found))
            grounded = ground_reply(
                model, processor, found, question.text, [phrase for phrase, _ in known], calibration=calibration
            )
            assert found.maps is not None
            phrases = [
                {
                    **asdict(phrase),
                    "class": name,
                    **judge(phrase.point, phrase.box, name, question, processor, found.maps.grid),
                }
                for phrase, (_, name) in zip(grounded.phrases, known, strict=True)
            ]
            rows.append({"phrases": phrases, "reason": grounded.reason})
        return rows

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Rows of numbers, each with its 95% interval (`low`, `high`) over resampled scenes.

        Returns:
            Of phrases whose thing is there: `pointing` (the point's cell is one of the object's,
            [`~agevlm.attention.losses.pointing_cells`]) and `on_object` (the point's pixel is the object's), against the larger of two
            chances: a point anywhere in the image, and anywhere on some object of the scene. `box_iou`, of things that appear once,
            against the best of three boxes that know nothing of the phrase: the whole image, one as large as the answer's anywhere in the image, and that
            of any object of the scene; `best_on_grid` is what whole cells allow.

            With a calibration: `there`, the AUROC of the confidence over phrases of yes/no questions, which ask in the same words for what is
            there and what is not; `there_answer`, the same over what answers name, rightly or not; of both
            `calibration_error`, the expected one of ten bins, beside
            `if_calibrated`, what it is at most in 97.5% of draws of labels with these very confidences.
            `above_chance` says whether the interval of the difference excludes 0. `yes_no` is the accuracy of the answers to
            questions of existence, which need no map.
        """
        several = _several(questions)
        rows = [
            {
                **phrase,
                "could_be_absent": _could_be_absent(phrase["source"], question),
                "scene": question.source,
                "once": (question.source, phrase["class"]) not in several,
            }
            for question in questions
            for phrase in answers[question.key]["phrases"]
            if phrase["point"] is not None
        ]
        scores: dict[str, dict[str, Any]] = {}
        there = [row for row in rows if row["is_there"]]
        once = [row for row in there if row["once"]]
        for name, chosen, chances in (
            ("pointing", there, {"anywhere": "cells_share", "any_object": "cells_any_object"}),
            ("on_object", there, {"anywhere": "pixels_share", "any_object": "pixels_any_object"}),
            ("box_iou", once, {name: f"iou_{name}" for name in ("whole_image", "anywhere", "any_object")}),
        ):
            if chosen:
                scores[name] = _mean_row(chosen, name, chances)
        if once:
            scores["box_iou"]["best_on_grid"] = float(np.mean([row["best_on_grid"] for row in once]))
        rated = [row for row in rows if row["confidence"] is not None and row["could_be_absent"]]
        for name, source in (("there", "question"), ("there_answer", "answer")):
            chosen = [row for row in rated if row["source"] == source]
            if len({row["is_there"] for row in chosen}) == 2:
                scores[name] = _auroc_row(chosen)
        if rated:
            scores["calibration_error"] = _calibration_row(rated)
        asked = [question for question in questions if question.kind in EXISTENCE_KINDS]
        if asked:
            words = [q.expected for q in asked]
            rights = [
                {
                    "scene": q.source,
                    "right": answers[q.key]["answer"] == q.expected,
                    "chance": max(map(words.count, words)) / len(words),
                }
                for q in asked
            ]
            scores["yes_no"] = _mean_row(rights, "right", {"most_frequent": "chance"})
        return scores

    def tables(self, scores: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> list[list[list[str]]]:
        """One table of the scores, and one of what the boxes are compared with."""

        def number(row: Mapping[str, Any], name: str) -> str:
            return f"{row[name]:.3f}" if name in row else "–"

        verdicts = {True: "yes", False: "no", None: "–"}
        rows = [
            [
                name.replace("_", " "),
                str(row["phrases"]),
                number(row, "score"),
                f"{row['low']:.3f} to {row['high']:.3f}",
                number(row, "chance"),
                verdicts[row.get("above_chance")],
            ]
            for name, row in scores.items()
        ]
        tables = [[["score", "phrases", "value", "95% interval", "chance", "excludes chance"], *rows]]
        if (row := scores.get("box_iou")) is not None:
            names = {
                "score": "the answer's",
                "best_on_grid": "best of whole cells",
                **dict.fromkeys(row["chances"], ""),
            }
            values = {**row, **row["chances"]}
            tables.append(
                [
                    ["box", "mean IoU"],
                    *([label or name.replace("_", " "), number(values, name)] for name, label in names.items()),
                ]
            )
        return tables


def judge(
    point: list[float] | None,
    box: list[float] | None,
    name: str,
    question: Question,
    processor: ProcessorMixin,
    grid: tuple[int, int] | None,
) -> dict[str, Any]:
    """What the scene knows about a phrase of the class `name`: `is_there`; and if it is, whether its point hits and its box fits.
    `grid` is as for [`~agevlm.attention.token_coverage`].

    `pointing`, `on_object`, `box_iou`, their chances and `best_on_grid` are as in [`Grounding.score`].
    """
    masks = {key: mask_from_rle(rle) for key, rle in zip(question.names, question.objects, strict=True)}
    if name not in masks or point is None or box is None:
        return {"is_there": name in masks}
    mask, (height, width) = masks[name], masks[name].shape
    over = image_grid(processor, (height, width), grid)

    def cover(of: np.ndarray) -> torch.Tensor:
        return over.show(token_coverage(processor, of[None], grid=grid)[0]).flatten()

    objects = torch.stack([cover(other) for other in masks.values()])
    target = cover(mask)
    cells_share, cells_any_object = pointing_chances(target, objects, cover(np.ones_like(mask)) > 0)
    row, column = int(point[1] / over.cell[1]), int(point[0] / over.cell[0])
    found, right = torch.tensor(box, dtype=torch.float64), mask_box(mask)
    boxes = torch.stack([mask_box(other) for other in masks.values()])
    # As large as the answer's, at places on a grid of 8x8 in the image.
    sides = found[2:] - found[:2]
    steps = torch.linspace(0, 1, 8, dtype=torch.float64)
    corners = torch.cartesian_prod(steps * (width - sides[0]), steps * (height - sides[1]))
    anywhere = torch.cat([corners, corners + sides], 1)
    image = torch.tensor([0, 0, width, height], dtype=torch.float64)

    def iou(others: torch.Tensor) -> float:
        return float(box_iou(others.reshape(-1, 4), right[None]).mean())

    return {
        "is_there": True,
        "pointing": float(pointing_cells(target)[row * over.columns + column]),
        "cells_share": cells_share,
        "cells_any_object": cells_any_object,
        "on_object": float(mask[int(point[1]), int(point[0])]),
        "pixels_share": float(mask.mean()),
        "pixels_any_object": float(mask.sum() / np.logical_or.reduce(list(masks.values())).sum()),
        "box_iou": iou(found),
        "iou_whole_image": iou(image),
        "iou_anywhere": iou(anywhere),
        "iou_any_object": iou(boxes),
        "best_on_grid": best_grid_iou(right, over.cell, (width, height)),
    }


# --- numbers ---


def _resamples(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """How often each row is drawn, `(RESAMPLES, rows)`, where whole scenes are drawn with replacement (bootstrap)."""
    scenes, place = np.unique([row["scene"] for row in rows], return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), RESAMPLES)
    return drawn[:, place].astype(float)


def _row(rows: Sequence[Mapping[str, Any]], value: float, resampled: np.ndarray, **more: Any) -> dict[str, Any]:
    """A row of scores: a value with its 95% interval, `resampled` `(RESAMPLES,)`, NaN where a resample has none."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    counts = {"phrases": len(rows), "scenes": len({row["scene"] for row in rows})}
    return {"score": value, "low": float(low), "high": float(high), **more, **counts}


def _mean_row(rows: Sequence[Mapping[str, Any]], name: str, chances: Mapping[str, str]) -> dict[str, Any]:
    """The mean of a score, against the largest of the means of its chances."""
    drawn = _resamples(rows)
    drawn /= drawn.sum(1, keepdims=True)
    values = np.array([row[name] for row in rows], float)
    known = np.array([[row[column] for row in rows] for column in chances.values()], float)
    beyond = drawn @ values - (drawn @ known.T).max(1)
    return _row(
        rows,
        float(values.mean()),
        drawn @ values,
        chance=float(known.mean(1).max()),
        chances=dict(zip(chances, known.mean(1).tolist(), strict=True)),
        above_chance=bool(np.percentile(beyond, 2.5) > 0),
    )


def _auroc_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from torchmetrics.functional.classification import binary_auroc

    confidence = np.array([row["confidence"] for row in rows])
    there = np.array([row["is_there"] for row in rows])
    drawn = _resamples(rows)
    # Of all pairs of one that is there and one that is not, the share in the right order; equal ones count half.
    order = (np.sign(confidence[there][:, None] - confidence[~there]) + 1) / 2
    present, absent = drawn[:, there], drawn[:, ~there]
    pairs = present.sum(1) * absent.sum(1)
    resampled = np.divide(((present @ order) * absent).sum(1), pairs, out=np.full(len(drawn), np.nan), where=pairs > 0)
    return _row(
        rows,
        float(binary_auroc(torch.from_numpy(confidence), torch.from_numpy(there).long())),
        resampled,
        chance=0.5,
        above_chance=bool(np.nanpercentile(resampled, 2.5) > 0.5),
        accuracy=float(((confidence >= 0.5) == there).mean()),
        absent=int((~there).sum()),
    )


def _calibration_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The expected calibration error, and the bins of a reliability diagram: mean confidence, share there, phrases."""
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = np.array([row["confidence"] for row in rows])
    there = np.array([row["is_there"] for row in rows])
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = np.eye(BINS)[number]

    def errors(drawn: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Of each resample; `labels` `(rows,)` or `(RESAMPLES, rows)`."""
        return np.abs((drawn * (confidence - labels)) @ inside).sum(1) / drawn.sum(1)

    flips = np.random.default_rng(0).random((RESAMPLES, len(rows))) < confidence
    value = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(there).long(), n_bins=BINS)
    return _row(
        rows,
        float(value),
        errors(_resamples(rows), there),
        if_calibrated=float(np.percentile(errors(np.ones_like(flips, float), flips), 97.5)),
        bins=[
            [float(confidence[number == n].mean()), float(there[number == n].mean()), int((number == n).sum())]
            for n in np.unique(number)
        ],
    )
