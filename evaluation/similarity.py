# SPDX-License-Identifier: Apache-2.0
"""Whether a model's hidden states distinguish a matching image from a random one (paper: matching and random pairs).

A model reads the same text three times: with the image that it is about, with a random other one, and without any. The
hidden states of the text's tokens are compared after the last self-attention layer, before its FFN. Every decoder has them,
whichever way images reach it. In a model that hardly uses its image, all three are alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..data.readers import count_images
from ..inference.generation import adds_special_tokens, check_finite, read_batch, render_chat
from ..plots import HISTOGRAM_BINS
from ..processing.image_processing_agevlm import to_rgb
from ..processing.rows import mask_from_rle, message_text

if TYPE_CHECKING:
    from datasets import Dataset

_NEEDED = (
    "Matching and random pairs need at least two rows with one image each in `images`, and `messages` of a question and "
    "an answer, with different answers."
)


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
        edges = np.histogram_bin_edges(np.concatenate([self.matching, self.random]), HISTOGRAM_BINS)
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
        limit: number of pairs to take, the first ones; all by default.

    Raises:
        ValueError: if there are fewer than two such rows, no such columns, or a row of another form.
    """
    if missing := [name for name in ("images", "messages") if name not in dataset.column_names]:
        raise ValueError(
            f"{_NEEDED} The data lacks {' and '.join(missing)}; it has {', '.join(dataset.column_names)}."
        )
    counts = count_images(dataset, "images")
    light = dataset.remove_columns("images")
    numbers = [number for number, count in enumerate(counts) if count == 1]
    if "kind" in dataset.column_names:
        kinds = dataset["kind"]
        numbers = [number for number in numbers if kinds[number] == "objects"]
    pairs, rows = [], {}
    for number in numbers:
        row = light[number]
        try:
            texts = [(message["role"], message_text(message)) for message in row["messages"]]
            names = _grounded_names(row, [text for _, text in texts])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"row {number} of the data is not in the row format ({type(error).__name__}: {error}); `agevlm data check` "
                "says more"
            ) from error
        roles = [role for role, _ in texts]
        if "assistant" not in roles[1:]:
            continue
        place = roles.index("assistant", 1)
        image = row.get("scene", number)
        rows[image] = number
        pairs.append(Pair(image, texts[place - 1][1], texts[place][1], names))
        if len(pairs) == limit:
            break
    if len({pair.text for pair in pairs}) < 2:
        raise ValueError(
            f"{_NEEDED} Found {len(pairs)} rows with {len({pair.text for pair in pairs})} different answers; add others."
        )
    return pairs, lambda image: to_rgb(dataset[rows[image]]["images"][0])


def _grounded_names(row: dict[str, Any], texts: Sequence[str]) -> frozenset[str]:
    return frozenset(
        texts[entry["message"]][entry["start"] : entry["end"]].lower()
        for entry in row.get("grounding") or []
        if entry["mask"] is None or mask_from_rle(entry["mask"]).any()  # an empty mask means an absent object
    )


def other_images(pairs: Sequence[Pair], seed: int = 0) -> list[int]:
    """A random image for each pair that does not match its text: of another text and, where the data is grounded, with
    nothing in it that is grounded in the pair's own, unless each has something."""
    rng = np.random.default_rng(seed)
    chosen = []
    for pair in pairs:
        others = [other for other in pairs if other.text != pair.text and other.image != pair.image]
        disjoint = [other for other in others if not other.names & pair.names] or others
        chosen.append(disjoint[rng.integers(len(disjoint))].image)
    return chosen


@torch.no_grad()
def measure_similarity(
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
        processor: the model's own.
        dataset: rows with `images` and `messages`; see [`text_pairs`].
        limit: number of texts to take, the first ones; all by default.
        batch_size: texts that are read together.
        seed: of the random images.
        progress: the label of the progress bar; None for none.

    Raises:
        ValueError: if the model's decoder is of another form, there are too few rows, or hidden states are not finite.
    """
    pairs, load = text_pairs(dataset, limit)
    others = other_images(pairs, seed)
    found: list[list[float]] = []
    model.eval()
    with Progress(disable=progress is None) as bar:
        for start in bar.track(range(0, len(pairs), batch_size), description=progress or ""):
            chosen, other = pairs[start : start + batch_size], others[start : start + batch_size]
            alone = [_render(processor, pair, image=False) for pair in chosen]
            shown = [_render(processor, pair, image=True) for pair in chosen]
            places = [_places_from_end(processor, text, pair.text) for text, pair in zip(alone, chosen, strict=True)]
            inputs = (
                read_batch(model, processor, shown, [load(pair.image) for pair in chosen]).inputs,
                read_batch(model, processor, shown, [load(image) for image in other]).inputs,
                read_batch(model, processor, alone).inputs,
            )
            asked = [f"the question {pair.prompt!r}" for pair in chosen]
            for matching, random, without in zip(
                *(_states(model, batch, places, asked) for batch in inputs), strict=True
            ):
                compared = ((matching, without), (random, without), (matching, random))
                found.append([float(nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in compared])
    return Similarity(*np.array(found).T)


def _render(processor: ProcessorMixin, pair: Pair, image: bool) -> str:
    content: list[dict[str, Any]] = [{"type": "text", "text": pair.prompt}]
    if image:
        content.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": pair.text}]},
    ]
    return render_chat(processor, messages)


def _places_from_end(processor: ProcessorMixin, rendered: str, text: str) -> list[int]:
    """Where the text's tokens are, counted from the end, which is the same with an image and without."""
    start = rendered.rfind(text.strip())
    if start < 0 or not text.strip():
        raise ValueError(
            f"The chat template changes the answer {text!r}, so its tokens cannot be found: use a template that writes contents unchanged."
        )
    end = start + len(text.strip())
    special = adds_special_tokens(processor, rendered)
    offsets = processor.tokenizer(rendered, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    return [place - len(offsets) for place, (a, b) in enumerate(offsets) if a < end and b > start]


def _states(
    model: PreTrainedModel, inputs: Mapping[str, Any], places: Sequence[Sequence[int]], asked: Sequence[str]
) -> Iterator[torch.Tensor]:
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
        model.base_model(**inputs, use_cache=False)
    finally:
        hook.remove()
    states = [row[list(chosen)].float() for row, chosen in zip(captured[0], places, strict=True)]
    check_finite(model, torch.stack([state.isfinite().all() for state in states]), asked)
    for state in states:
        yield state.cpu()
