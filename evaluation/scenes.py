# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes as an examination: answers against their chance level, and where the asked phrase looks."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from research.rivals import ConcatenationForConditionalGeneration, expand_image_tokens

from ..data.scene_builder import EXISTENCE_KINDS, KINDS
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from ..processing.processing_agevlm import AgeVlmProcessor
from ..processing.rows import mask_from_rle
from ..trainer.losses import attention_iou
from .attention import crop_to_image
from .benchmark import GREEDY, render_question
from .pope import yes_no_scores

if TYPE_CHECKING:
    from datasets import Dataset
from ..data.features import image_features, scene_images, select_features

# Kinds of question whose answers are scored as POPE's are.
YES_NO_KINDS = (*EXISTENCE_KINDS, "negation")


@dataclass
class SceneQuestion:
    """One question about a scene, asked in a conversation of its own.

    `spans` are the characters of the phrases in `text` that name something in the image, `masks` the COCO RLE of each.
    `answer` and `maps` `(blocks, rows, columns)` are filled in by [`evaluate_scenes`], the maps those of the first phrase
    and only where there is one and the model has cross-attention. `map_scores` stand for the maps where only these have
    been kept ([`phrase_scores`]).
    """

    scene: int
    kind: str
    text: str
    expected: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    masks: list[dict[str, Any]] = field(default_factory=list)
    answer: str | None = None
    maps: np.ndarray | None = None
    map_scores: dict[str, list[float]] | None = None


def scene_questions(dataset: "Dataset") -> list[SceneQuestion]:
    """The questions of a split of grounded scenes, in order."""
    questions = []
    for row in dataset.remove_columns("images"):
        for turn, expected in enumerate(row["answers"]):
            message = 2 * turn
            text = "".join(part["text"] or "" for part in row["messages"][message]["content"])
            named = [
                phrase
                for phrase in row["grounding"]
                if phrase["message"] == message and mask_from_rle(phrase["mask"]).any()
            ]
            questions.append(
                SceneQuestion(
                    scene=row["scene"],
                    kind=row["kind"],
                    text=text,
                    expected=expected,
                    spans=[(phrase["start"], phrase["end"]) for phrase in named],
                    masks=[phrase["mask"] for phrase in named],
                )
            )
    return questions


@torch.no_grad()
def answer_questions(
    model: AgeVlmForConditionalGeneration | ConcatenationForConditionalGeneration,
    processor: AgeVlmProcessor,
    questions: list[SceneQuestion],
    images: dict[int, Image.Image],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    features: AgeVlmImageFeatures | None = None,
    progress: str | None = "questions",
) -> None:
    """Answers each question with greedy `generate`, and maps the first phrase of those that have one. In place.

    `features` are those of all `images`, in the order of their numbers, if they are ready made.
    """
    tokenizer = processor.tokenizer
    scenes = sorted(images)
    if features is None:
        scenes = sorted({question.scene for question in questions})
        features = image_features(model, processor, [images[n] for n in scenes], progress=progress and "images")
    row_of = {scene: row for row, scene in enumerate(scenes)}
    concatenates = isinstance(model, ConcatenationForConditionalGeneration)
    order = sorted(questions, key=lambda question: (question.kind, len(question.text)))
    model.eval()
    with Progress(disable=progress is None) as bar:
        for start in bar.track(range(0, len(order), batch_size), description=progress or ""):
            batch = order[start : start + batch_size]
            texts = [render_question(processor, question.text) for question in batch]
            inputs = tokenizer(
                texts,
                add_special_tokens=False,  # the chat template has written them
                padding=True,
                padding_side="left",
                return_offsets_mapping=True,
                return_tensors="pt",
            )
            offsets = inputs.pop("offset_mapping")
            inputs.pop("token_type_ids", None)
            selected = select_features(features, [row_of[question.scene] for question in batch])
            selected.pooler_output = model.model._project(selected.last_hidden_state, selected.grid)
            prompt = dict(inputs)
            if concatenates:
                prompt = expand_image_tokens(
                    prompt, model.config.image_token_id, selected.last_hidden_state.shape[1], "left"
                )
                selected.pooler_output = list(selected.pooler_output)
            prompt = {name: tensor.to(model.device) for name, tensor in prompt.items()}
            tokens = model.generate(
                **prompt,
                **GREEDY,
                mm_encoder_outputs={"image": selected},
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = processor.batch_decode(tokens[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            for question, answer in zip(batch, answers, strict=True):
                question.answer = answer.strip()
            if concatenates:
                continue

            spans = []
            for question, text in zip(batch, texts, strict=True):
                shift = text.rfind(question.text)
                spans.append([(shift + start, shift + end) for start, end in question.spans[:1]])
            if any(spans):
                map_queries = processor.get_map_queries(offsets, spans, inputs["attention_mask"].cpu(), text=texts)
                outputs = model.model(
                    **prompt,
                    mm_encoder_outputs={"image": selected},
                    map_queries=map_queries.to(model.device),
                    use_cache=False,
                )
                for row, question in enumerate(batch):
                    if question.spans:
                        maps = outputs.cross_attention_maps[:, row, 0]
                        question.maps = crop_to_image(maps, selected, processor, images[question.scene].size)


def points_at(maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whether the middle of the strongest cell of each map `(..., rows, columns)` lies in the mask `(height, width)`."""
    rows, columns = maps.shape[-2:]
    best = maps.reshape(*maps.shape[:-2], -1).argmax(-1)
    y = ((best // columns + 0.5) * mask.shape[0] / rows).astype(int)
    x = ((best % columns + 0.5) * mask.shape[1] / columns).astype(int)
    return mask[y, x]


def score_maps(maps: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """How well attention maps `(n, rows, columns)`, each summing to 1, lie on a mask, bool `(height, width)`.

    Returns:
        float `(n,)` each: `pointing`, 1 where the strongest cell's middle lies in the mask ([`points_at`]); `iou`, the soft
        intersection over union ([`~agevlm.trainer.losses.attention_iou`]); `mass`, the attention inside the mask, whose
        chance level is the mask's share of the image.
    """
    coverage = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), maps.shape[-2:]).flatten()
    flat = torch.from_numpy(maps).flatten(1)
    return {
        "pointing": points_at(maps, mask).astype(float),
        "iou": np.array([float(attention_iou(m[None], coverage)) for m in flat]),
        "mass": (flat @ coverage).numpy(),
    }


def phrase_scores(question: SceneQuestion) -> dict[str, list[float]]:
    """[`score_maps`] of each block's map of the question's phrase, and last of the mean of all blocks' maps."""
    if question.map_scores is not None:
        return question.map_scores
    maps = np.concatenate([question.maps, question.maps.mean(0, keepdims=True)])
    return {name: values.tolist() for name, values in score_maps(maps, mask_from_rle(question.masks[0])).items()}


def evaluate_scenes(
    model: AgeVlmForConditionalGeneration | ConcatenationForConditionalGeneration,
    processor: AgeVlmProcessor,
    dataset: "Dataset",
    *,
    max_questions: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    features: AgeVlmImageFeatures | None = None,
    progress: str | None = "questions",
) -> tuple[dict[str, dict[str, Any]], list[SceneQuestion]]:
    """Asks a split of grounded scenes and scores the answers.

    Args:
        processor: AGE-VLM's, for a concatenating model as well.
        dataset: a split as `build_scenes` writes it, images included.
        max_questions: of each kind, drawn with `seed`; all by default.
        features: [`image_features`] of the split's images ([`scene_images`]), if they are ready made.

    Returns:
        A row of numbers for each kind of question and one for pointing, and the questions with their answers.

        - The kinds of existence and `negation`: the accuracy (`score`), and POPE's other numbers ([`yes_no_scores`]).
        - `count`, `position`, `relation`: the share of exactly right answers.
        - `objects`: the mean F1 of the named classes against those there. Chance is the mean F1 of the same answers
          against other scenes.
        - `pointing`: the share of phrases whose map is strongest inside their object, for the mean of all blocks (`score`)
          and by block (`by_block`); and the same for `iou` and `mass` (see [`score_maps`]). Chance is the mean share of the
          image that the object covers, which is that of `mass` too. Only of models with cross-attention.

        Where not said otherwise, chance is the best answer that ignores the image: the most frequent one.

    Raises:
        ValueError: if the split has no question.
    """
    questions = scene_questions(dataset)
    if not questions:
        raise ValueError("The data set has no questions: is it a split of grounded scenes, with the column `answers`?")
    rng = random.Random(seed)
    if max_questions is not None:
        by_kind = defaultdict(list)
        for question in questions:
            by_kind[question.kind].append(question)
        questions = [q for kind in by_kind.values() for q in rng.sample(kind, min(max_questions, len(kind)))]
    images = scene_images(dataset)
    answer_questions(model, processor, questions, images, batch_size=batch_size, features=features, progress=progress)
    return score_questions(questions), questions


def score_questions(questions: list[SceneQuestion]) -> dict[str, dict[str, Any]]:
    """The numbers of [`evaluate_scenes`], from answered questions."""
    results: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        asked = [question for question in questions if question.kind == kind]
        if not asked:
            continue
        chance = Counter(question.expected for question in asked).most_common(1)[0][1] / len(asked)
        row: dict[str, Any] = {"score": float(np.mean([question.answer == question.expected for question in asked]))}
        if kind in YES_NO_KINDS:
            scores = yes_no_scores([q.answer or "" for q in asked], [q.expected.lower() for q in asked])
            row = {"score": scores.pop("accuracy"), **scores}
        if kind == "objects":
            given, expected = (
                [_names(text) for text in texts]
                for texts in zip(*((q.answer, q.expected) for q in asked), strict=True)
            )
            others = expected[1:] + expected[:1]
            row = {"score": float(np.mean([_f1(a, b) for a, b in zip(given, expected, strict=True)]))}
            chance = float(np.mean([_f1(a, b) for a, b in zip(given, others, strict=True)]))
        results[kind] = {**row, "chance": chance, "questions": len(asked)}
    mapped = [question for question in questions if question.maps is not None or question.map_scores is not None]
    if mapped:
        masks = [mask_from_rle(question.masks[0]) for question in mapped]
        scored = [phrase_scores(question) for question in mapped]
        means = {name: np.mean([row[name] for row in scored], axis=0).tolist() for name in scored[0]}
        results["pointing"] = {
            "score": means["pointing"][-1],
            "chance": float(np.mean([mask.mean() for mask in masks])),
            "questions": len(mapped),
            "by_block": means["pointing"][:-1],
            **{name: means[name][-1] for name in ("iou", "mass")},
            **{f"{name}_by_block": means[name][:-1] for name in ("iou", "mass")},
        }
    return results


def _names(answer: str | None) -> set[str]:
    return {name.strip() for name in (answer or "").split(",") if name.strip()}


def _f1(given: set[str], expected: set[str]) -> float:
    return 2 * len(given & expected) / max(1, len(given) + len(expected))
