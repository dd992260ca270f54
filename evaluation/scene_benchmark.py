# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes as a benchmark: for any saved image-text-to-text model, and such that a run that was stopped goes on.

[`~agevlm.evaluation.scenes.evaluate_scenes`] asks the same of a model in memory.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from .attention import cross_attention_layers
from .benchmark import Question, answer_benchmark, digest, first_of_each, read_lines, reply_greedily, save_results
from .scenes import SceneQuestion, answer_questions, phrase_scores, scene_questions, score_questions

if TYPE_CHECKING:
    from datasets import Dataset


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


def evaluate_scene_benchmark(
    model: str,
    out: str | os.PathLike,
    data: str | os.PathLike,
    *,
    split: str = "test",
    limit: int | None = None,
    prompt_suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: str | None = "questions",
) -> tuple[dict[str, dict[str, Any]], Table]:
    """Evaluate a model on grounded scenes, and write `answers.jsonl`, `results.json` and `report.md` to the folder `out`.

    The answers of an AGE-VLM come with the scores of its attention maps (`maps`, see [`phrase_scores`]).

    Args:
        model: folder or Hub id of an image-text-to-text model.
        out: folder; with the answers of a run of the same settings that was stopped, the run goes on.
        data, split: see [`read_scenes`].
        limit: the first questions of each kind; all by default.
        prompt_suffix: a line to add to each question; none by default, as the scenes' own answers are trained.
        batch_size, max_new_tokens, progress: see [`answering.answer`].
        device, dtype: see [`answering.load_model`].

    Returns:
        the scores ([`score_questions`]), and a table of them.
    """
    dataset = read_scenes(data, split)
    numbered = enumerate(scene_questions(dataset), 1)
    kept = first_of_each(numbered, limit, lambda pair: pair[1].kind)
    questions = {f"{question.kind}/{number}": question for number, question in kept}
    if not questions:
        raise ValueError(f"the split {split} of {data} has no questions")
    images = dataset.select_columns(["images"])
    first: dict[int, int] = {}
    for row, scene in enumerate(dataset["scene"]):
        first.setdefault(scene, row)
    layers = cross_attention_layers(AutoConfig.from_pretrained(model))

    _, settings = answer_benchmark(
        [
            Question(key, partial(_image, images, first[question.scene]), question.text)
            for key, question in questions.items()
        ],
        out,
        reply=partial(_reply, questions),
        benchmark="grounded scenes",
        data=str(data),
        split=split,
        limit=limit,
        # Scenes that were built anew, as with objects of another size, may come with the same questions.
        scenes=digest((question.expected, question.spans, question.masks) for question in questions.values()),
        cross_attention_before_layers=layers or None,
        model=model,
        prompt_suffix=prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    # Whatever was answered by which run is read back from the file of them all.
    for entry in read_lines(Path(out) / "answers.jsonl", ())[1:]:
        question = questions[entry["key"]]
        question.answer, question.map_scores = entry["answer"], entry.get("maps")
    scores = score_questions(list(questions.values()))
    return scores, save_results(out, settings, scores, *_answer_table(scores), *_map_tables(scores, layers))


def _image(images: "Dataset", row: int) -> Image.Image:
    return images[row]["images"][0].convert("RGB")


def _reply(
    scene_questions: Mapping[str, SceneQuestion],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Sequence[Question],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Answers, and of an AGE-VLM the scores of the maps of the questions' phrases. Images that a batch has several
    questions about go through its tower once."""
    if not isinstance(model, AgeVlmForConditionalGeneration):
        return reply_greedily(model, processor, batch, max_new_tokens)
    images: dict[int, Image.Image] = {}
    asked: list[SceneQuestion] = []
    for question in batch:
        scene_question = scene_questions[question.key]
        if scene_question.scene not in images:
            images[scene_question.scene] = question.open_image()
        # With the suffix, which moves no phrase.
        asked.append(replace(scene_question, text=question.text))
    answer_questions(
        model, processor, asked, images, batch_size=len(batch), max_new_tokens=max_new_tokens, progress=None
    )
    return [
        {"answer": question.answer, **({} if question.maps is None else {"maps": phrase_scores(question)})}
        for question in asked
    ]


def _answer_table(scores: Mapping[str, Mapping[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    columns = {"score": "score", "chance": "chance", "f1": "F1", "yes_ratio": "yes ratio"}
    rows = [
        [
            kind.replace("_", " "),
            str(row["questions"]),
            *(f"{row[column]:.4f}" if column in row else "–" for column in columns),
            str(row.get("neither", "–")),
        ]
        for kind, row in scores.items()
        if kind != "pointing"
    ]
    return ("kind", "questions", *columns.values(), "neither"), rows


def _map_tables(
    scores: Mapping[str, Mapping[str, Any]], layers: Sequence[int]
) -> list[tuple[Sequence[str], list[list[str]]]]:
    """One table of a row for each block and one for the mean of the blocks' maps; none where there are no maps."""
    if (row := scores.get("pointing")) is None:
        return []
    blocks = zip(row["by_block"], row["mass_by_block"], row["iou_by_block"], strict=True)
    named = {f"before layer {layer}": values for layer, values in zip(layers, blocks, strict=True)}
    named["mean of all"] = (row["score"], row["mass"], row["iou"])
    rows = [
        [name, str(row["questions"]), *(f"{value:.4f}" for value in (*values, row["chance"]))]
        for name, values in named.items()
    ]
    return [(("attention maps", "phrases", "pointing", "mass", "IoU", "object's share"), rows)]
