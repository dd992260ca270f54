# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes as an examination: answers against their chance levels, and whether phrases point at their objects."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..attention.coverage import token_coverage
from ..attention.losses import attention_iou, pointing_chances, pointing_hits
from ..data.scene_builder import EXISTENCE_KINDS, KINDS
from ..inference.attention import find_question
from ..inference.replies import Reply, cross_attention_layers
from ..processing.rows import mask_from_rle, message_text
from .answers import Question
from .benchmark_data import first_of_each
from .pope import yes_no_scores

if TYPE_CHECKING:
    from datasets import Dataset

# Kinds of question whose answers are scored as POPE's are.
YES_NO_KINDS = (*EXISTENCE_KINDS, "negation")


def read_scenes(data: str | os.PathLike, split: str = "test") -> "Dataset":
    """A split of grounded scenes, as `build_scenes` has written them to a folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else, or has no such split.
        ImportError: if `datasets` is not installed.
    """
    from ..data.readers import read_rows
    from ..data.scene_builder import scene_features

    if not Path(data).is_dir():
        raise FileNotFoundError(f"no such folder: {data}; name one that `agevlm scenes` has written")
    dataset = read_rows(data, split)
    if missing := [name for name in scene_features() if name not in dataset.column_names]:
        raise ValueError(
            f"{data} is not a data set of grounded scenes, it lacks the columns {', '.join(missing)}: name one that "
            "`agevlm scenes` has written"
        )
    return dataset


@dataclass(frozen=True)
class Scenes:
    """Grounded scenes, a [`~agevlm.evaluation.benchmark.Benchmark`].

    Args:
        data: the folder that `build_scenes` has written, or one of its splits in memory.
        split: of the folder.
    """

    data: "str | os.PathLike | Dataset"
    split: str = "test"

    title = "grounded scenes"
    prompt_suffix = ""  # the scenes' own answers are trained with the question alone
    max_new_tokens = 32
    draw = None

    @property
    def _is_folder(self) -> bool:
        return isinstance(self.data, (str, os.PathLike))

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Which scenes are asked about, and where the model has cross-attention blocks; None for no blocks."""
        place = {"data": str(self.data), "split": self.split} if self._is_folder else {"data": "in memory"}
        return {**place, "cross_attention_before_layers": cross_attention_layers(config) or None}

    def questions(self, limit: int | None = None) -> list[Question]:
        """The questions by kind, each asked in a separate conversation; `source` is the number of the scene.

        Answers of one kind are about as long as each other, which saves time: a batch waits for its longest answer.

        `span` is the first phrase that names something in the image, if there is one, `mask` is what it names,
        `objects` and `names` are the masks and the classes of all that any conversation about the scene names, and `choices` are
        the classes of all scenes, asked for or there.

        Args:
            limit: the first questions of each kind; all by default.
        """
        dataset = read_scenes(self.data, self.split) if self._is_folder else self.data  # type: ignore[arg-type]
        images = dataset.select_columns(["images"])
        rows = list(dataset.remove_columns("images"))
        first: dict[int, int] = {}
        objects: dict[str, dict[str, Mapping[str, Any]]] = {}
        classes: set[str] = set()
        questions: list[Question] = []
        place = self.data if self._is_folder else "the data"
        for number, row in enumerate(rows):
            try:
                first.setdefault(row["scene"], number)
                found = objects.setdefault(str(row["scene"]), {})
                named = {_name(row, phrase): phrase["mask"] for phrase in row["grounding"]}
                classes |= named.keys()
                found |= {name: mask for name, mask in named.items() if _mask(mask).any()}
                questions += self._questions_of(
                    row, len(questions), functools.partial(_image, images, first[row["scene"]])
                )
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{place}, row {number}: is not a grounded scene ({type(error).__name__}: {error}); build the scenes anew "
                    "with `agevlm scenes`"
                ) from error
        choices = tuple(sorted(classes))
        questions = [
            replace(q, objects=tuple(found.values()), names=tuple(found), choices=choices)
            for q in questions
            for found in [objects[q.source]]
        ]
        questions.sort(key=lambda question: KINDS.index(question.kind))
        return first_of_each(questions, limit, lambda question: question.kind)

    def _questions_of(self, row: Mapping[str, Any], asked: int, load: Callable[[], Image.Image]) -> list[Question]:
        """The questions of a conversation, numbered from `asked` on."""
        if row["kind"] not in KINDS:
            raise ValueError(f"its kind is {row['kind']!r}, none of {', '.join(KINDS)}")
        questions = []
        for turn, expected in enumerate(row["answers"]):
            message = 2 * turn
            named = [p for p in row["grounding"] if p["message"] == message and _is_there(p)]
            text = message_text(row["messages"][message])
            if not (isinstance(expected, str) and text):
                raise ValueError(f"its question {turn} or the answer to it is no text")
            if row["kind"] in YES_NO_KINDS and expected.lower() not in ("yes", "no"):
                raise ValueError(f"the answer to its question {turn} must be yes or no, got {expected!r}")
            questions.append(
                Question(
                    key=f"{row['kind']}/{asked + turn + 1}",
                    load_image=load,
                    text=text,
                    expected=expected,
                    kind=row["kind"],
                    source=str(row["scene"]),
                    span=(named[0]["start"], named[0]["end"]) if named else None,
                    mask=named[0]["mask"] if named else None,
                )
            )
        return questions

    def inspect(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        questions: Sequence[Question],
        replies: Sequence[Reply],
    ) -> list[dict[str, Any]]:
        """The scores of the maps of the questions' phrases, as `maps`; see [`score_maps`]."""
        found: list[dict[str, Any]] = []
        for question, given in zip(questions, replies, strict=True):
            if question.span is None or given.maps is None:
                found.append({})
                continue
            start = find_question(processor, given.prompt, question.text)
            maps = given.maps.of_span(start + question.span[0], start + question.span[1])
            found.append({"maps": score_maps(maps, question, processor, given.maps.grid)})
        return found

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """A row of numbers for each kind of question and one for pointing.

        Returns:
            Each row has a `score`, its `chance` level and the number of `questions`.

            - The kinds of existence and `negation`: the accuracy, and POPE's other numbers ([`yes_no_scores`]).
            - `count`, `position`, `relation`: the share of exactly right answers.
            - `objects`: the mean F1 of the named classes against those there. Chance is the mean F1 of the same answers
              against other scenes.
            - `pointing`: the share of phrases that point at their object, for the mean of all blocks' maps (`score`) and by
              block (`by_block`); and the same for `iou` and `mass`, see [`score_maps`]. Chance is the object's share of the
              image, and `chance_any_object` that of pointing at some object of the scene. Only of models with
              cross-attention.

            Where not said otherwise, chance is the best answer that ignores the image: the most frequent one.
        """
        results: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            asked = [question for question in questions if question.kind == kind]
            if not asked:
                continue
            given, expected = [answers[q.key]["answer"] for q in asked], [q.expected for q in asked]
            chance = Counter(expected).most_common(1)[0][1] / len(asked)
            row: dict[str, Any] = {"score": float(np.mean([a == b for a, b in zip(given, expected, strict=True)]))}
            if kind in YES_NO_KINDS:
                scores = yes_no_scores(given, [text.lower() for text in expected])
                row = {"score": scores.pop("accuracy"), **scores}
            if kind == "objects":
                said, there = [_names(text) for text in given], [_names(text) for text in expected]
                row = {"score": float(np.mean([_f1(a, b) for a, b in zip(said, there, strict=True)]))}
                others = there[1:] + there[:1]
                chance = float(np.mean([_f1(a, b) for a, b in zip(said, others, strict=True)]))
            results[kind] = {**row, "chance": chance, "questions": len(asked)}
        if mapped := [answers[q.key]["maps"] for q in questions if "maps" in answers[q.key]]:
            means = {name: np.mean([maps[name] for maps in mapped], axis=0).tolist() for name in mapped[0]}
            results["pointing"] = {
                "score": means["pointing"][-1],
                "chance": means["object_share"],
                "chance_any_object": means["any_object"],
                "questions": len(mapped),
                "by_block": means["pointing"][:-1],
                **{name: means[name][-1] for name in ("iou", "mass")},
                **{f"{name}_by_block": means[name][:-1] for name in ("iou", "mass")},
            }
        return results

    def tables(self, scores: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> list[list[list[str]]]:
        """One table of the answers. Of a model with maps another one of them: a row for each block, and one for the mean of the
        blocks' maps."""
        columns = {"score": "score", "chance": "chance", "f1": "F1", "yes_ratio": "yes ratio"}
        answers = [
            [
                kind.replace("_", " "),
                str(row["questions"]),
                *(f"{row[column]:.4f}" if column in row else "–" for column in columns),
                str(row.get("neither", "–")),
            ]
            for kind, row in scores.items()
            if kind != "pointing"
        ]
        tables = [[["kind", "questions", *columns.values(), "neither"], *answers]]
        if (row := scores.get("pointing")) is not None:
            blocks = zip(row["by_block"], row["mass_by_block"], row["iou_by_block"], strict=True)
            layers = settings["cross_attention_before_layers"]
            # Of another model the layers that attend to the image, in order.
            names = [f"before layer {layer}" for layer in layers or ()] or [
                f"map {n}" for n in range(len(row["by_block"]))
            ]
            named = dict(zip(names, blocks, strict=True))
            named["mean of all"] = (row["score"], row["mass"], row["iou"])
            chances = (row["chance"], row["chance_any_object"])
            maps = [
                [name, str(row["questions"]), *(f"{value:.4f}" for value in (*values, *chances))]
                for name, values in named.items()
            ]
            header = ["attention maps", "phrases", "pointing", "mass", "IoU", "object's share", "any object"]
            tables.append([header, *maps])
        return tables


def score_maps(
    maps: torch.Tensor, question: Question, processor: ProcessorMixin, grid: tuple[int, int] | None
) -> dict[str, list[float] | float]:
    """How well the attention maps of a question's phrase match its object.

    Args:
        maps: float32 `(blocks, V)`, the attention on each of the image's `V` tokens.
        processor: the one that made the pixels, whose padding no mask covers.
        grid: as for [`~agevlm.attention.token_coverage`].

    Returns:
        Of each block's map, and last of the mean of all blocks' maps: `pointing`, 1 where it points at the object
        ([`~agevlm.attention.losses.pointing_hits`]); `iou`, its soft intersection over union with the object
        ([`~agevlm.attention.losses.attention_iou`]); `mass`, the attention inside the object. And the chances of pointing
        ([`~agevlm.attention.losses.pointing_chances`]): `object_share` of the image, and `any_object`.
    """

    def coverage(mask: np.ndarray) -> torch.Tensor:
        return token_coverage(processor, mask[None], grid=grid)[0]

    mask = _mask(question.mask)
    target, objects = coverage(mask), torch.stack([coverage(_mask(rle)) for rle in question.objects])
    object_share, any_object = pointing_chances(target, objects, visible=coverage(np.ones_like(mask)) > 0)
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    as_phrases, targets = maps[None, None], target.expand(1, len(maps), -1)
    return {
        "pointing": pointing_hits(as_phrases, targets)[0].float().tolist(),
        "iou": attention_iou(as_phrases, targets)[0].tolist(),
        "mass": (maps @ target).tolist(),
        "object_share": object_share,
        "any_object": any_object,
    }


def _image(images: "Dataset", row: int) -> Image.Image:
    return images[row]["images"][0]


def _name(row: Mapping[str, Any], phrase: Mapping[str, Any]) -> str:
    return message_text(row["messages"][phrase["message"]])[phrase["start"] : phrase["end"]]


def _is_there(phrase: Mapping[str, Any]) -> bool:
    return bool(_mask(phrase["mask"]).any())


def _mask(rle: Mapping[str, Any] | None) -> np.ndarray:
    assert rle is not None
    return _decode(*rle["size"], rle["counts"])


@functools.lru_cache(maxsize=256)  # a scene's masks occur in many of its conversations
def _decode(height: int, width: int, counts: str) -> np.ndarray:
    return mask_from_rle({"size": [height, width], "counts": counts})


def _names(answer: str) -> set[str]:
    return {name.strip() for name in answer.split(",") if name.strip()}


def _f1(given: set[str], expected: set[str]) -> float:
    return 2 * len(given & expected) / max(1, len(given) + len(expected))
