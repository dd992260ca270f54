# SPDX-License-Identifier: Apache-2.0
"""Do a model's hidden states tell a matching image from a random one (paper, section on matching and random pairs)?

The same text is read three times: with the image that it is about, with a random other one, and without any. What is
compared are the hidden states of the text's tokens after the last self-attention layer, before its FFN, which every
decoder has, whichever way images reach it. In a model that hardly looks, all three are alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from research.rivals import ConcatenationForConditionalGeneration, expand_image_tokens

from ..data.features import select_features
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from ..processing.processing_agevlm import AgeVlmProcessor
from ..processing.rows import mask_from_rle, message_text

if TYPE_CHECKING:
    from datasets import Dataset


_BINS = 30


@dataclass(frozen=True)
class Pair:
    """A text about an image: what is asked about it, and the answer, whose tokens are compared.

    `image` is a number; `names` are the phrases that are grounded in the image, if the data has grounding.
    """

    image: int
    prompt: str
    text: str
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Similarity:
    """Cosine similarities of texts' hidden states, each a mean over the text's tokens; `(pairs,)` each.

    Args:
        matching: between the states with the image that the text is about, and those without an image.
        random: between the states with a random other image, and those without an image.
        between: between the states with one image and with the other.
    """

    matching: np.ndarray
    random: np.ndarray
    between: np.ndarray

    @property
    def auroc(self) -> float:
        """The probability that a matching image moves a text's hidden states further than a random one moves another's."""
        from torchmetrics.functional.classification import binary_auroc

        moved = torch.from_numpy(1 - np.concatenate([self.matching, self.random]))
        matches = torch.arange(len(moved)) < len(self.matching)
        return float(binary_auroc((moved / 2).double(), matches.long()))  # from 0 to 1, as it wants them

    @property
    def overlap(self) -> float:
        """The area that the histograms of matching and random pairs share, from 0 to 1."""
        edges = np.histogram_bin_edges(np.concatenate([self.matching, self.random]), _BINS)
        shares = [np.histogram(values, edges)[0] / len(values) for values in (self.matching, self.random)]
        return float(np.minimum(*shares).sum())

    def summary(self) -> dict[str, float]:
        """`auroc`, `overlap`, the means of the three similarities, and the number of `pairs`."""
        return {
            "auroc": self.auroc,
            "overlap": self.overlap,
            "matching_mean": float(self.matching.mean()),
            "random_mean": float(self.random.mean()),
            "between_mean": float(self.between.mean()),
            "pairs": len(self.matching),
        }


def text_pairs(dataset: "Dataset", limit: int | None = None) -> tuple[list[Pair], Callable[[int], Image.Image]]:
    """The first question and answer of each row that has one image, and what gives an image by its number.

    Of grounded scenes, the rows that name all objects, and an image's number is the scene's. Of other data, rows.

    Args:
        dataset: with the columns `images` and `messages`.
        limit: only so many pairs, the first.

    Raises:
        ValueError: if there are fewer than two such rows.
    """
    light = dataset.remove_columns("images")
    numbers = range(len(dataset))
    if "kind" in dataset.column_names:
        numbers = [number for number, kind in enumerate(dataset["kind"]) if kind == "objects"]  # type: ignore[assignment]
    pairs, rows = [], {}
    for number in numbers:
        row = light[number]
        texts = [(message["role"], message_text(message)) for message in row["messages"]]
        roles = [role for role, _ in texts]
        if "assistant" not in roles[1:]:
            continue
        place = roles.index("assistant", 1)
        image = row.get("scene", number)
        rows[image] = number
        pairs.append(
            Pair(image, texts[place - 1][1], texts[place][1], _grounded_names(row, [text for _, text in texts]))
        )
        if len(pairs) == limit:
            break
    if len({pair.text for pair in pairs}) < 2:
        raise ValueError(
            "Matching and random pairs need at least two images with different texts: rows with `images`, and "
            f"`messages` of a question and an answer. Found {len(pairs)}."
        )
    return pairs, lambda image: dataset[rows[image]]["images"][0].convert("RGB")


def _grounded_names(row: dict[str, Any], texts: Sequence[str]) -> frozenset[str]:
    return frozenset(
        texts[entry["message"]][entry["start"] : entry["end"]].lower()
        for entry in row.get("grounding") or []
        if entry["mask"] is None or mask_from_rle(entry["mask"]).any()  # an empty one is of what is not there
    )


def other_images(pairs: Sequence[Pair], seed: int = 0) -> list[int]:
    """A random image for each pair that does not match its text: of another text and, where the data is grounded, with
    nothing in it that is grounded in the pair's own, unless each has something."""
    rng = np.random.default_rng(seed)
    chosen = []
    for pair in pairs:
        strangers = [other for other in pairs if other.text != pair.text and other.image != pair.image]
        apart = [other for other in strangers if not other.names & pair.names] or strangers
        chosen.append(apart[rng.integers(len(apart))].image)
    return chosen


def scene_similarity(
    model: AgeVlmForConditionalGeneration | ConcatenationForConditionalGeneration,
    processor: AgeVlmProcessor,
    dataset: "Dataset",
    *,
    features: AgeVlmImageFeatures,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Similarity:
    """[`similarity`] on a split of grounded scenes, with ready-made image features, in the order of the scenes' numbers."""
    pairs, _ = text_pairs(dataset, limit)
    order = {scene: row for row, scene in enumerate(sorted(set(dataset["scene"])))}

    def prepare(texts: list[str], images: list[int] | None) -> dict[str, Any]:
        inputs = processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if images is not None:
            selected = select_features(features, [order[image] for image in images])
            if isinstance(model, ConcatenationForConditionalGeneration):
                tokens = selected.last_hidden_state.shape[1]
                batch = expand_image_tokens(batch, model.config.image_token_id, tokens, "left")
            batch["mm_encoder_outputs"] = {"image": selected}
        return batch

    return _compare(model, processor, pairs, prepare, batch_size, seed)


def similarity(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: "Dataset",
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = "pairs",
) -> Similarity:
    """Compares matching and random pairs of texts and images.

    Args:
        model: an AGE-VLM, or another image-text-to-text model whose decoder's layers are Llama's in form, such as a LLaVA.
        dataset: rows with `images` and `messages`; see [`text_pairs`].
        limit: only so many texts, the first.
        seed: of the random images.

    Raises:
        ValueError: if the model's decoder is of another form, or there are too few rows.
    """
    pairs, load = text_pairs(dataset, limit)

    def prepare(texts: list[str], images: list[int] | None) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "padding": True,
            "padding_side": "left",
            "add_special_tokens": False,  # the chat template has written them
            "return_tensors": "pt",
        }
        if images is None:
            return dict(processor.tokenizer(texts, **settings))
        return dict(processor(images=[[load(image)] for image in images], text=texts, **settings))

    return _compare(model, processor, pairs, prepare, batch_size, seed, progress)


@torch.no_grad()
def _compare(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[Pair],
    prepare: Callable[[list[str], list[int] | None], dict[str, Any]],
    batch_size: int,
    seed: int,
    progress: str | None = None,
) -> Similarity:
    """The similarities of all pairs; `prepare` makes the model's inputs of texts and of the numbers of their images."""
    others = other_images(pairs, seed)
    found: list[list[float]] = []
    cosine = partial(nn.functional.cosine_similarity, dim=-1)
    model.eval()
    with Progress(disable=progress is None) as bar:
        for start in bar.track(range(0, len(pairs), batch_size), description=progress or ""):
            chosen, strangers = pairs[start : start + batch_size], others[start : start + batch_size]
            plain = [_render(processor, pair, image=False) for pair in chosen]
            shown = [_render(processor, pair, image=True) for pair in chosen]
            places = [_places_from_end(processor, text, pair.text) for text, pair in zip(plain, chosen, strict=True)]
            states = [
                list(_states(model, prepare(texts, images), places))
                for texts, images in (
                    (shown, [pair.image for pair in chosen]),
                    (shown, list(strangers)),
                    (plain, None),
                )
            ]
            for right, wrong, without in zip(*states, strict=True):
                compared = ((right, without), (wrong, without), (right, wrong))
                found.append([float(cosine(a, b).mean()) for a, b in compared])
    matching, random, between = np.array(found).T
    return Similarity(matching, random, between)


def _render(processor: ProcessorMixin, pair: Pair, image: bool) -> str:
    content: list[dict[str, Any]] = [{"type": "text", "text": pair.prompt}]
    if image:
        content.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": pair.text}]},
    ]
    return processor.apply_chat_template(messages, tokenize=False)


def _places_from_end(processor: ProcessorMixin, rendered: str, text: str) -> list[int]:
    """Where the text's tokens are, counted from the end, which is the same with an image and without."""
    start = rendered.rfind(text.strip())
    if start < 0 or not text.strip():
        raise ValueError(
            f"The chat template does not write the answer {text!r} as it is, so its tokens cannot be found."
        )
    end = start + len(text.strip())
    offsets = processor.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [place - len(offsets) for place, (a, b) in enumerate(offsets) if a < end and b > start]


def _states(model: PreTrainedModel, inputs: dict[str, Any], places: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Hidden states `(tokens, D)` of each row at its places, float32, after the last self-attention layer."""
    layer = model.get_decoder().layers[-1]
    norm = getattr(layer, "post_attention_layernorm", None)
    if norm is None:
        raise ValueError(
            f"{type(layer).__name__} has no post_attention_layernorm, before which the hidden states are read: this "
            "needs a model whose decoder is a Llama in form."
        )
    captured = []
    hook = norm.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        model.base_model(
            **{name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()},
            use_cache=False,
        )
    finally:
        hook.remove()
    for row, chosen in zip(captured[0], places, strict=True):
        yield row[list(chosen)].float().cpu()
