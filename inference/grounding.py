# SPDX-License-Identifier: Apache-2.0
"""Grounded answers: for what a question and its answer name, a point, a box and whether it is in the image.

All of it is read from the maps of the pass that answered. How they are read, and how likely a thing is there, is chosen on
validation data: the [`Calibration`] in a checkpoint's folder, which `agevlm calibrate` makes.
"""

import itertools
import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from ..data.phrases import find_phrases
from ..parts import fingerprint_trained
from ..plots import draw_grounding
from .attention import Attention, Phrase, ask_or_read, show_reply
from .replies import Reply, cross_attention_layers, inner_model, is_agevlm, map_layers

CALIBRATION_FILE = "grounding.json"
"""The name of the calibration in a checkpoint's folder."""

MAP_FEATURES = ("image_share", "peak", "order", "region_share", "agreement")
FEATURES = (*MAP_FEATURES, "in_answer")
"""What the confidence is computed from: [`map_features`], and 1 for a phrase of an answer, 0 for one of a question. Words that the
model has read attend otherwise than words that it has written, and what it says is there more often than what it is asked for."""


# --- reading maps ---


def find_regions(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """The connected region around the strongest cell of each map: cells of at least `threshold` times its attention, side by
    side or at a corner.

    Args:
        maps: float32 `(n, rows, columns)`.

    Returns:
        bool `(n, rows, columns)`.
    """
    strongest = maps.flatten(1).argmax(1)
    region = torch.zeros_like(maps, dtype=torch.bool)
    region.flatten(1)[torch.arange(len(maps)), strongest] = True
    above = maps >= threshold * maps.amax((1, 2), keepdim=True)
    while True:
        grown = (torch.nn.functional.max_pool2d(region[:, None].float(), 3, 1, 1)[:, 0] > 0) & above
        if torch.equal(grown, region):
            return region
        region = grown


def find_boxes(regions: torch.Tensor, cell: tuple[float, float], size: tuple[int, int]) -> torch.Tensor:
    """The box around each region, float64 `(n, 4)`: left, top, right, bottom in pixels of an image of `size` `(width, height)`.

    Args:
        regions: bool `(n, rows, columns)`, none empty.
        cell: width and height of a cell in pixels.
    """
    sides = []
    for axis, length, end in (
        (1, cell[0], size[0]),
        (2, cell[1], size[1]),
    ):  # over rows: which columns; and the reverse
        used = regions.any(axis).byte()
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        sides.append([(edge.double() * length).clamp(max=end) for edge in (first, last)])
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1)


def find_points(
    maps: torch.Tensor, regions: torch.Tensor, kind: str, cell: tuple[float, float], size: tuple[int, int]
) -> torch.Tensor:
    """A point of each map, float64 `(n, 2)`: x and y in pixels.

    Args:
        maps: `(n, rows, columns)`.
        regions: of [`find_regions`].
        kind: `peak`, the middle of the strongest cell, or `center`, the mean of the middles of the region's cells, weighted by
            their attention. Of cells that reach beyond the image, the middle of what is inside.
        cell, size: as for [`find_boxes`].
    """
    maps = maps.double()
    if kind == "peak":
        strongest = maps.flatten(1).argmax(1)
        regions = torch.zeros_like(regions)
        regions.flatten(1)[torch.arange(len(maps)), strongest] = True
    weights = torch.where(regions, maps.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    weights = weights / weights.sum((1, 2), keepdim=True)
    place = []
    for count, length, end in ((maps.shape[2], cell[0], size[0]), (maps.shape[1], cell[1], size[1])):
        edges = (torch.arange(count + 1).double() * length).clamp(max=end)
        place.append((edges[:-1] + edges[1:]) / 2)
    return torch.stack([(weights.sum(1) * place[0]).sum(1), (weights.sum(2) * place[1]).sum(1)], 1)


def map_features(blocks: torch.Tensor, threshold: float) -> torch.Tensor:
    """What a map says about whether its phrase has found something, float64 `(n, 5)`.

    They do not depend on the size of the grid. `image_share`: the log odds of the attention on the image against that
    elsewhere, on a sink or other images; the same for all phrases where there is neither. Of the mean map's part on the image: `peak`, the log of the strongest cell
    in multiples of an even spread; `order`, 1 less the entropy relative to that of an even spread; `region_share`, what
    is in the region ([`find_regions`]). `agreement`: the mean of what each block has in that region of its part on the image.

    Args:
        blocks: float32 `(blocks, n, rows, columns)`, the maps of the chosen blocks.
    """
    blocks = blocks.double()
    tiny = torch.finfo(torch.float64).tiny
    mean = blocks.mean(0)
    share = mean.sum((1, 2))
    mean = (mean / share.clamp(min=tiny)[:, None, None]).flatten(1)
    region = find_regions(mean.unflatten(1, blocks.shape[2:]), threshold)
    cells = mean.shape[1]
    entropy = -(mean * mean.clamp(min=tiny).log()).sum(1)
    each = blocks / blocks.sum((2, 3), keepdim=True).clamp(min=tiny)
    found = {
        "image_share": ((share.clamp(0, 1) + 1e-3) / (1 - share.clamp(0, 1) + 1e-3)).log(),
        "peak": (mean.amax(1) * cells).clamp(min=1e-3).log(),
        "order": 1 - entropy / max(math.log(cells), tiny) if cells > 1 else torch.ones_like(share),
        "region_share": (mean * region.flatten(1)).sum(1),
        "agreement": (each * region).sum((2, 3)).mean(0),
    }
    return torch.stack([found[name] for name in MAP_FEATURES], 1)


def phrase_features(blocks: torch.Tensor, threshold: float, phrases: Sequence[Phrase]) -> torch.Tensor:
    """[`FEATURES`] of phrases, float64 `(n, 6)`, from their maps `(blocks, n, rows, columns)`."""
    in_answer = torch.tensor([[float(phrase.source == "answer")] for phrase in phrases], dtype=torch.float64)
    return torch.cat([map_features(blocks, threshold), in_answer], 1)


# --- calibration ---


@dataclass(frozen=True)
class Calibration:
    """How a model's maps are read; of a checkpoint, `grounding.json` in its folder.

    Args:
        weights: the trained weights that it was made for, as [`trained_fingerprint`] names them.
        layers: the Llama layers before which the blocks stand whose maps are averaged; None for all.
        threshold: of the box's region, relative to the strongest cell ([`find_regions`]).
        point: `peak` or `center` ([`find_points`]).
        features: of each of [`FEATURES`] its `mean` and `scale` on validation data, and its `weight` in the log odds. Without
            them there is no confidence.
        bias: of the log odds.
        data: what it was made from.
        reason: why there is no confidence, and what to do about it.
    """

    weights: str = ""
    layers: tuple[int, ...] | None = None
    threshold: float = 0.5
    point: Literal["peak", "center"] = "center"
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    bias: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def probability(self, features: torch.Tensor) -> torch.Tensor | None:
        """How likely each phrase's thing is there, float64 `(n,)`, from its [`phrase_features`]; None without a calibration."""
        if not self.features:
            return None
        mean, scale, weight = (
            torch.tensor([self.features[name][key] for name in FEATURES], dtype=torch.float64)
            for key in ("mean", "scale", "weight")
        )
        return torch.sigmoid((features - mean) / scale @ weight + self.bias)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `grounding.json` into a checkpoint's folder."""
        from ..files import new_file

        content = {key: value for key, value in asdict(self).items() if key != "reason"}
        with new_file(Path(folder) / CALIBRATION_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: str | os.PathLike) -> "Calibration":
        """
        Raises:
            ValueError: if it is no file of a calibration.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            layers = content["layers"]
            found = cls(
                **{part.name: content[part.name] for part in fields(cls) if part.name not in ("layers", "reason")},
                layers=None if layers is None else tuple(int(layer) for layer in layers),
            )
            if found.layers == () or not (0 < found.threshold <= 1 and found.point in ("peak", "center")):
                raise ValueError("its layers, threshold or point are none that a calibration has")
            probability = found.probability(torch.zeros(1, len(FEATURES), dtype=torch.float64))
            if probability is None or not probability.isfinite().all():
                raise ValueError("its features have numbers that are not finite, or are missing")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}: {error}): make it again with `agevlm calibrate`, or delete it"
            ) from error
        return found


_fingerprints: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def trained_fingerprint(model: torch.nn.Module) -> str:
    """The fingerprint ([`~agevlm.parts.fingerprint_trained`]) of an AGE-VLM's adapter and cross-attention blocks, which every
    training changes. That of its folder is the same ([`~agevlm.parts.read_fingerprint`]).

    Weights are read again when PyTorch has counted a change of them, which it does not for what is written through `Tensor.data`.
    """
    inner = inner_model(model)
    parts = {"adapter": inner.multi_modal_projector, "cross_attention": inner.language_model.cross_attn}
    weights = [weight for part in parts.values() for weight in itertools.chain(part.parameters(), part.buffers())]
    state = None
    if not any(weight.is_inference() for weight in weights):  # whose changes are not counted
        state = [(id(weight), weight.data_ptr(), weight.dtype, weight._version) for weight in weights]
        known, found = _fingerprints.get(inner, (None, ""))
        if known == state:
            return found
    found = fingerprint_trained(
        {f"{part} {name}": weight for part, module in parts.items() for name, weight in module.state_dict().items()}
    )
    if state is not None:
        _fingerprints[inner] = state, found
    return found


def find_calibration(model: PreTrainedModel, name: str | os.PathLike | None = None) -> Calibration:
    """The calibration of a model's checkpoint, if it is that of the model's weights.

    Args:
        name: the checkpoint's folder or Hub id; by default where the model was loaded from.

    Returns:
        It. Without one, or where the weights have changed since, default settings and the `reason` why there is no confidence.

    Raises:
        ValueError: if the file is damaged.
    """
    if not is_agevlm(model):
        return Calibration(reason=f"only an AGE-VLM can be calibrated, and the model is a {type(model).__name__}")
    place = os.fspath(name or model.name_or_path or "")
    how = f"run `agevlm calibrate {place or 'MODEL'} --data SCENES` with validation scenes"
    file = None
    if os.path.isdir(place):
        file = Path(place) / CALIBRATION_FILE
    elif place:
        try:
            found = cached_file(place, CALIBRATION_FILE, _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False)  # fmt: skip
            file = Path(found) if found else None
        except (OSError, ValueError):  # a name that is none of a repository
            file = None
    if file is None or not file.is_file():
        return Calibration(reason=f"the checkpoint has no {CALIBRATION_FILE}: {how}")
    calibration = Calibration.read(file)
    if calibration.weights != trained_fingerprint(model):
        return Calibration(reason=f"its {CALIBRATION_FILE} was made for other weights: {how}")
    unknown = set(calibration.layers or ()) - set(cross_attention_layers(model.config))
    if unknown:
        raise ValueError(f"{file} is damaged (the model has no block before layer {min(unknown)}): {how}")
    return calibration


# --- grounded answers ---


@dataclass(frozen=True)
class GroundedPhrase(Phrase):
    """Where what a phrase names is in the image: a point `[x, y]` and a box `[left, top, right, bottom]` in its pixels, upright.

    They are where the phrase attends most, also where the thing is not there; None for words that see no image.
    `confidence`, from 0 to 1, is how likely the thing is there, and `there` whether that is at least a half; both None without a calibration.
    """

    point: list[float] | None
    box: list[float] | None
    confidence: float | None
    there: bool | None


@dataclass
class Grounded:
    """An answer, and what it and its question name in the image. `reason` says why phrases have no confidence, if they have none."""

    image: Image.Image
    question: str
    answer: str
    phrases: list[GroundedPhrase]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but the image, for JSON."""
        return {
            "question": self.question,
            "answer": self.answer,
            "image_size": {"width": self.image.width, "height": self.image.height},
            "phrases": [asdict(phrase) for phrase in self.phrases],
            "reason": self.reason,
        }

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: the image with the point and the box of each phrase, and a legend of the phrases."""
        draw_grounding(
            self.image, [asdict(phrase) for phrase in self.phrases], path, f"{self.question}\n{self.answer.strip()}"
        )


@torch.no_grad()
def ground(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    text: str,
    answer: str | None = None,
    phrases: Sequence[str | Phrase] | None = None,
    *,
    calibration: Calibration | None = None,
    max_new_tokens: int = 64,
) -> Grounded:
    """Asks about an image, and says where it is what question and answer name, and whether it is there.

    Args:
        image: before any resizing.
        text: the question.
        answer: by default, the model's own (greedy decoding), whose maps are of the pass that wrote it.
        phrases: words of the question or the answer; by default the noun phrases of both ([`~agevlm.data.phrases.find_phrases`]).
        calibration: by default that of the checkpoint ([`find_calibration`]).
        max_new_tokens: longest answer of the model, in tokens.

    Raises:
        ValueError: if the model has no maps, a phrase does not occur or has no token, the calibration is damaged, or
            the model's outputs are not finite.
    """
    found = ask_or_read(model, processor, image, text, answer, max_new_tokens)
    return ground_reply(model, processor, found, text, phrases, calibration=calibration)


def ground_reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    found: Reply,
    question: str,
    phrases: Sequence[str | Phrase] | None = None,
    *,
    image: int = 0,
    calibration: Calibration | None = None,
) -> Grounded:
    """As [`ground`], from the maps of a reply, without another pass.

    Args:
        found: a reply with maps.
        question: text of the conversation's last turn, or of another; spaces at its ends do not count.
        phrases: as for [`ground`].
        image: number of the image in the conversation.
        calibration: by default that of the checkpoint ([`find_calibration`]).

    Raises:
        ValueError: if the conversation has no such image, or as for [`ground`].
    """
    if not 0 <= image < len(found.images):
        raise ValueError(f"the conversation has {len(found.images)} images, and none with the number {image}")
    calibration = find_calibration(model) if calibration is None else calibration
    question = question.strip()
    wanted = noun_phrases(question, found.text) if phrases is None else phrases
    if not wanted:
        return Grounded(found.images[image], question, found.text, [], calibration.reason)
    return ground_attention(
        show_reply(model, processor, found, question, wanted, image=image),
        calibration,
        map_layers(model),
    )


def noun_phrases(question: str, answer: str) -> list[Phrase]:
    """The noun phrases of a question and of its answer, in order; "yes", "no" and "the image" are none."""
    return [
        Phrase(text[start:end], source, start, end)
        for source, text in (("question", question), ("answer", answer))
        for start, end in find_phrases(text)
    ]


def ground_attention(attention: Attention, calibration: Calibration, layers: Sequence[int]) -> Grounded:
    """Grounded phrases of maps; `layers` are the Llama layers before which the blocks of the maps stand."""
    chosen = [
        number for number, layer in enumerate(layers) if calibration.layers is None or layer in calibration.layers
    ]
    blocks = torch.from_numpy(np.ascontiguousarray(attention.maps[chosen]))
    mean, size = blocks.mean(0), attention.image.size
    regions = find_regions(mean, calibration.threshold)
    boxes = find_boxes(regions, attention.cell, size)
    points = find_points(mean, regions, calibration.point, attention.cell, size)
    likely = calibration.probability(phrase_features(blocks, calibration.threshold, attention.phrases))
    phrases = []
    for number, phrase in enumerate(attention.phrases):
        place = (phrase.text, phrase.source, phrase.start, phrase.end)
        if not mean[number].any():  # it is before the image
            phrases.append(GroundedPhrase(*place, None, None, None, None))
            continue
        point = [round(value, 2) for value in points[number].tolist()]
        box = [round(side, 2) for side in boxes[number].tolist()]
        confidence = None if likely is None else round(float(likely[number]), 4)
        phrases.append(
            GroundedPhrase(*place, point, box, confidence, None if confidence is None else confidence >= 0.5)
        )
    return Grounded(attention.image, attention.question, attention.answer, phrases, calibration.reason)
