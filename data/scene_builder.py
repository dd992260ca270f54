# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes: a data set of composed photographs with exact masks and questions.

Cut-outs are pasted on photographs, so the visible mask of every object is exact. Each scene has conversations of several
kinds (`KINDS`). A model that ignores the image stays at chance on them, because the answers are drawn at random
(see `build_scenes`).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..files import new_folder
from ..hub_cards.dataset import tell_step
from ..processing.rows import mask_to_rle, quiet_datasets, row_features
from ..provenance import describe

if TYPE_CHECKING:
    from datasets import DatasetDict, Features


EXISTENCE_KINDS = ("existence", "existence_popular", "existence_adversarial")
KINDS = (*EXISTENCE_KINDS, "negation", "objects", "count", "position", "relation")
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

_MAX_COUNT = 3
_JPEG_QUALITY = 92
_CUTOUT_SUFFIXES = {".png", ".webp"}
_PHOTOGRAPH_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# Objects within this distance of a border between two of the nine fields have no clear position. Relative to the image's side.
_POSITION_MARGIN = 0.02
_MIN_MASK_PIXELS = 16
# Objects whose centroids are closer than this along an axis have no clear order along it. Relative to the image's side.
_RELATION_MARGIN = 0.12
# The size of a group of classes that appear together.
_GROUP_SIZE = 5
_MAX_RELATION_QUESTIONS = 2
_MAX_PLACEMENTS = 200


def position_word(mask: np.ndarray, margin: float = 0.0) -> str | None:
    """The ninth of the image, one of `POSITIONS`, that contains the centroid of a mask, bool `(height, width)`.

    Returns None if the mask is empty, or its centroid lies within `margin` (relative to the image's side) of a border between
    two ninths.
    """
    if not mask.any():
        return None
    center = (np.argwhere(mask).mean(0) + 0.5) / mask.shape
    if np.abs(np.subtract.outer(center, (1 / 3, 2 / 3))).min() < margin:
        return None
    row, column = np.minimum((center * 3).astype(int), 2)
    return POSITIONS[row][column]


# --- reading ---


def _image_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """The image files of a folder and its subfolders, sorted, without hidden files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _class_name(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts
    name = " ".join(re.split(r"[\s_-]+", parts[0] if len(parts) > 1 else path.stem)).strip()
    if not name or "," in name:
        raise ValueError(f"{path} gives an invalid class name ({name!r}); rename it, without commas")
    return name


def load_cutouts(
    folder: str | Path, classes: Sequence[str] | None = None, max_side: int = 512
) -> dict[str, list[Image.Image]]:
    """Read a folder of cut-outs: PNG or WebP images with transparency.

    The class of a cut-out is the name of its file, or of its subfolder, with spaces for `_` and `-`. The class should be a
    singular noun, because questions put it after "a".

    Args:
        folder: the folder of the cut-outs.
        classes: the classes to read; by default all.
        max_side: larger cut-outs are scaled down to this number of pixels on their longer side.

    Returns:
        the RGBA cut-outs of each class, cropped to their visible part. The classes are in alphabetical order.

    Raises:
        FileNotFoundError: if the folder is missing or has no cut-outs.
        ValueError: if a cut-out is not a readable image, or has no transparency, or a class has no cut-outs.
    """
    # With torch, so not for those who import `KINDS` only.
    from ..processing.image_processing_agevlm import load_image, to_8_bits

    folder = Path(folder)
    files: dict[str, list[Path]] = {}
    for path in _image_files(folder, _CUTOUT_SUFFIXES):
        files.setdefault(_class_name(path, folder), []).append(path)
    if not files:
        raise FileNotFoundError(f"no cut-outs in {folder}; add .png or .webp images with transparency")
    for name in classes or ():
        if name not in files:
            near = difflib.get_close_matches(name, files) or sorted(files)[:10]
            raise ValueError(f"no cut-out of the class {name!r} in {folder}; did you mean: {', '.join(near)}?")

    cutouts: dict[str, list[Image.Image]] = {}
    for name in sorted(set(classes or files)):
        cutouts[name] = []
        for path in files[name]:
            image = load_image(path)
            if not image.has_transparency_data:
                raise ValueError(f"{path} has no transparency; remove its background or the file")
            image = to_8_bits(image).convert("RGBA")
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
            if box is None:
                raise ValueError(f"{path} is completely transparent; remove it")
            image = image.crop(box)
            image.thumbnail((max_side, max_side))
            cutouts[name].append(image)
    return cutouts


def _load_backgrounds(folder: Path, image_size: int) -> dict[str, Image.Image]:
    """The photographs of a folder, RGB, by their path in it. Their shorter side is at most twice the image size."""
    from ..processing.image_processing_agevlm import load_image, to_rgb  # see `load_cutouts`

    files = _image_files(folder, _PHOTOGRAPH_SUFFIXES)
    if len(files) < 3:
        raise ValueError(
            f"{len(files)} background photographs in {folder}, but at least 3 are needed, because train, validation and"
            " test share none; add more .jpg, .png or .webp files"
        )
    backgrounds = {}
    for path in files:
        image = to_rgb(load_image(path))
        scale = 2 * image_size / min(image.size)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        backgrounds[path.relative_to(folder).as_posix()] = image
    return backgrounds


def _split_backgrounds(names: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Divide the photographs at random: a sixth (at least one) each for validation and test, all others for train."""
    held_out = max(1, len(names) // 6)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    return [shuffled[2 * held_out :], shuffled[:held_out], shuffled[held_out : 2 * held_out]]


# --- composing ---


def _draw_background(rng: np.random.Generator, photograph: Image.Image, size: int) -> Image.Image:
    """A random square of a photograph, at `size` pixels, randomly mirrored and changed in brightness and color."""
    side = rng.uniform(0.5, 1) * min(photograph.size)
    left, top = rng.uniform(0, np.subtract(photograph.size, side))
    background = photograph.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        background = ImageOps.mirror(background)
    background = ImageEnhance.Brightness(background).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Color(background).enhance(rng.uniform(0.7, 1.3))


def _place(
    rng: np.random.Generator, cutout: Image.Image, size: int, side: float
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]]:
    """Mirror and rotate a cut-out at random, scale it to a longer side of `side` pixels, and choose its place.

    Returns its colors `(h, w, 3)` and its alpha `(h, w)` in [0, 1], and the `h x w` box of the image that it covers.
    """
    if rng.random() < 0.5:
        cutout = ImageOps.mirror(cutout)
    cutout = cutout.reduce(max(1, int(max(cutout.size) / (1.5 * side))))  # fewer pixels to rotate
    cutout = cutout.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    scale = side / max(cutout.size)
    cutout = cutout.resize([max(1, round(length * scale)) for length in cutout.size], Image.Resampling.BICUBIC)
    pixels = np.asarray(cutout, dtype=np.float32)
    # First one of the nine fields, then a place in it, so that all position words are about equally frequent.
    starts = []
    for length in pixels.shape[:2]:
        low, high = np.array([0, size / 3]) + rng.integers(3) * size / 3
        center = rng.uniform(max(low, length / 2), min(high, size - length / 2))
        starts.append(int(np.clip(round(center - length / 2), 0, size - length)))
    (top, left), (height, width) = starts, pixels.shape[:2]
    return pixels[..., :3], pixels[..., 3] / 255, (slice(top, top + height), slice(left, left + width))


def _compose(
    rng: np.random.Generator,
    background: Image.Image,
    objects: Sequence[Image.Image],
    object_size: tuple[float, float],
    min_visible: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paste objects on a square background, from back to front.

    Returns the image, uint8 `(size, size, 3)`, and each object's visible mask, bool `(size, size)`: the pixels whose color
    is for more than half the object's. Each object keeps a share of `min_visible` of its pixels visible.
    """
    image = np.asarray(background, dtype=np.float32).copy()
    size = len(image)
    shares: list[np.ndarray] = []  # of each object: its share of the color of each pixel, in [0, 1]
    areas: list[int] = []
    scale = 1.0
    for cutout in objects:
        for _ in range(_MAX_PLACEMENTS):
            colors, alpha, box = _place(rng, cutout, size, rng.uniform(*object_size) * size * scale)
            area = int(np.count_nonzero(alpha > 0.5))
            covered_shares = [share.copy() for share in shares]
            for share in covered_shares:
                share[box] *= 1 - alpha
            if area >= _MIN_MASK_PIXELS and all(
                np.count_nonzero(share > 0.5) >= max(min_visible * full_area, _MIN_MASK_PIXELS)
                for share, full_area in zip(covered_shares, areas, strict=True)
            ):
                break
            scale *= 0.98  # smaller objects in a crowded scene
        else:
            raise ValueError(
                f"{len(objects)} objects do not fit in {size} x {size} pixels;"
                " lower max_objects or min_visible, or raise image_size"
            )
        own = np.zeros((size, size), dtype=np.float32)
        own[box] = alpha
        shares = [*covered_shares, own]
        areas.append(area)
        image[box] += (colors - image[box]) * alpha[..., None]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), [share > 0.5 for share in shares]


# --- asking ---


@dataclass
class _Cooccurrence:
    """How often classes appear, and which of them appear together.

    With a `strength` of 0 all classes are equally frequent and independent. Otherwise the n-th most frequent class has the
    weight `n ** -strength`, and with the probability `strength` the next class is a companion of a present one.
    """

    weights: dict[str, float]  # sum to 1
    companions: dict[str, list[str]]
    strength: float

    @classmethod
    def draw(cls, rng: np.random.Generator, classes: Sequence[str], strength: float) -> _Cooccurrence:
        """Random frequencies, and random groups of classes that are companions of each other."""
        ranked = [classes[i] for i in rng.permutation(len(classes))]
        weights = np.arange(1, len(ranked) + 1.0) ** -strength
        shuffled = [classes[i] for i in rng.permutation(len(classes))]
        groups = [shuffled[start : start + _GROUP_SIZE] for start in range(0, len(shuffled), _GROUP_SIZE)]
        companions = {name: [other for other in group if other != name] for group in groups for name in group}
        return cls(dict(zip(ranked, weights / weights.sum(), strict=True)), companions, strength)

    def draw_present(self, rng: np.random.Generator, number: int) -> list[str]:
        """The classes of a scene, all different, in the order in which they are drawn."""
        present: list[str] = []
        while len(present) < number:
            companions = [name for other in present for name in self.companions[other] if name not in present]
            if companions and rng.random() < self.strength:
                present.append(companions[rng.integers(len(companions))])
                continue
            weights = np.array([0.0 if name in present else weight for name, weight in self.weights.items()])
            present.append(list(self.weights)[rng.choice(len(weights), p=weights / weights.sum())])
        return present

    def draw_absent(self, rng: np.random.Generator, present: Sequence[str], number: int) -> list[str]:
        """Absent classes to ask about. A third each are uniformly random, frequent, and companions of present classes, so that
        neither frequency nor companions alone predict that a class is present."""
        absent = [name for name in self.weights if name not in present]
        orders = [[absent[i] for i in rng.permutation(len(absent))]]
        if self.strength:
            keys = rng.exponential(size=len(absent)) / [self.weights[name] for name in absent]
            companions = {name for other in present for name in self.companions[other]}.difference(present)
            # Sorted first, because the order of a set of strings differs between processes.
            shuffled = sorted(sorted(companions), key=lambda name: rng.random())
            orders += [[absent[i] for i in np.argsort(keys)], shuffled]
        merged: dict[str, None] = {}
        while len(merged) < min(number, len(absent)):
            order = orders[rng.integers(len(orders))]
            merged.update(dict.fromkeys([name for name in order if name not in merged][:1]))
        return list(merged)


@dataclass
class _Plan:
    """The objects of a scene and its existence questions, before it is composed."""

    objects: list[str]  # the class of each object, from back to front
    counted: str  # the class of the counting question
    questions: dict[str, list[tuple[str, bool]]]  # by kind of existence question: class, and whether it is present


def _plan_scenes(
    rng: np.random.Generator, cooccurrence: _Cooccurrence, number: int, max_objects: int, max_questions: int
) -> list[_Plan]:
    """Plan the scenes of a split. Exactly half of its existence answers are "Yes"."""
    plans = []
    for count in rng.permutation(np.arange(number) % _MAX_COUNT + 1):
        present = cooccurrence.draw_present(rng, int(rng.integers(1, max_objects + 1)))
        absent = cooccurrence.draw_absent(rng, present, max_questions)
        counted = present[0]
        objects = present + [counted] * (count - 1)
        rng.shuffle(objects)
        # Each answer is a fair coin toss. The questions end before the toss after which one answer would be impossible. So the
        # earlier answers do not predict the next one. With equally many "Yes" and "No" in every scene, to count the earlier
        # answers would predict two of three.
        remaining = {True: present[::-1], False: absent[::-1]}
        questions: list[tuple[str, bool]] = []
        while len(questions) < max_questions and remaining[True] and remaining[False]:
            answer = bool(rng.random() < 0.5)
            questions.append((remaining[answer].pop(), answer))
        plans.append(_Plan(objects, counted, {"existence": questions}))
    _balance(rng, plans, list(cooccurrence.weights))
    return plans


def _add_pope_questions(
    plans: Sequence[_Plan], train: Sequence[_Plan], classes: Sequence[str], max_classes: int
) -> None:
    """Add POPE's popular and adversarial questions to scenes (arXiv 2305.10355, section 5.1).

    They ask about equally many present and absent classes, at most `max_classes` of each. The absent ones are the most
    frequent classes of the scenes `train`, and those that appear most often together with the present ones in `train`.
    """
    frequency = Counter(name for plan in train for name in set(plan.objects))
    pair_frequency = Counter(pair for plan in train for pair in itertools.permutations(set(plan.objects), 2))
    for plan in plans:
        present = sorted(set(plan.objects))
        absent = [name for name in classes if name not in present]
        ranks = {
            "existence_popular": lambda name: (-frequency[name], name),
            "existence_adversarial": lambda name: (
                -sum(pair_frequency[name, other] for other in present),  # noqa: B023  # called in this iteration only
                -frequency[name],
                name,
            ),
        }
        for kind, rank in ranks.items():
            number = min(len(present), len(absent), max_classes)
            plan.questions[kind] = [(name, True) for name in present[:number]]
            plan.questions[kind] += [(name, False) for name in sorted(absent, key=rank)[:number]]


def _balance(rng: np.random.Generator, plans: list[_Plan], classes: Sequence[str]) -> None:
    """Make exactly half of the split's existence answers "Yes": of n questions, drop about √n at random."""
    surplus = sum(1 if answer else -1 for plan in plans for _, answer in plan.questions["existence"])
    answer = surplus > 0
    surplus = abs(surplus)
    candidates = [
        (plan, question) for plan in plans for question in plan.questions["existence"] if question[1] == answer
    ]
    rng.shuffle(candidates)
    for plan, question in candidates:
        if surplus and len(plan.questions["existence"]) > 1:
            plan.questions["existence"].remove(question)
            surplus -= 1
    # In small splits a surplus can remain in scenes of one question. They get a second one.
    for plan, _ in candidates:
        questions = plan.questions["existence"]
        if surplus and len(questions) == 1 and questions[0][1] == answer:
            pool = [name for name in classes if (name in plan.objects) != answer]
            questions.append((pool[rng.integers(len(pool))], not answer))
            surplus -= 1


def _article(noun: str) -> str:
    """ "a" or "an", by the first sound of the noun."""
    spoken_as_consonant = re.match(r"(uni(?!n)|us[ae]|uk|ut[ei]|eu|ewe|one\b)", noun, re.IGNORECASE)
    spoken_as_vowel = re.match(r"[aeiou]|hour|hono|heir", noun, re.IGNORECASE)
    return "an" if spoken_as_vowel and not spoken_as_consonant else "a"


@dataclass
class _Conversation:
    """The messages of a row, the grounded phrases in them, and the answers."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    grounding: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def ask(self, *parts: str | tuple[str, dict]) -> None:
        self._add_message("user", parts)

    def answer(self, *parts: str | tuple[str, dict]) -> None:
        self.answers.append(self._add_message("assistant", parts))

    def _add_message(self, role: str, parts: Sequence[str | tuple[str, dict]]) -> str:
        """Add a message of texts and of phrases with their masks. Returns its text."""
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            phrase, rle = part
            start, end = len(text), len(text) + len(phrase)
            span = {"message": len(self.messages), "start": start, "end": end, "image": 0}
            self.grounding.append(span | {"box": None, "mask": rle, "score": None})
            text += phrase
        # With `text: None`, because Arrow gives all parts the same keys.
        content = [] if self.messages else [{"type": "image", "text": None}]
        self.messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
        return text


def _converse(rng: np.random.Generator, plan: _Plan, masks: Sequence[np.ndarray]) -> dict[str, _Conversation]:
    """The conversations about a composed scene, by kind; `masks` are the visible masks of `plan.objects`."""
    names = sorted(set(plan.objects))
    unions = {
        name: np.logical_or.reduce([m for n, m in zip(plan.objects, masks, strict=True) if n == name])
        for name in names
    }
    rles = {name: mask_to_rle(mask) for name, mask in unions.items()}
    empty = mask_to_rle(np.zeros_like(masks[0]))
    rng.shuffle(names)
    conversations = {kind: _Conversation() for kind in KINDS}

    for kind, questions in plan.questions.items():
        for name, present in questions:
            conversations[kind].ask(f"Is there {_article(name)} ", (name, rles.get(name, empty)), " in the image?")
            conversations[kind].answer("Yes" if present else "No")
    for name, present in plan.questions["existence"]:
        conversations["negation"].ask("Is there no ", (name, rles.get(name, empty)), " in the image?")
        conversations["negation"].answer("No" if present else "Yes")

    conversations["objects"].ask("Which objects are in the image?")
    phrases = [part for name in names for part in (", ", (name, rles[name]))]
    conversations["objects"].answer(*phrases[1:])

    # One question a scene: answers to several ones could not be independent of each other and balanced. The wording needs no
    # plural.
    conversations["count"].ask(
        "How many objects of the class ", (plan.counted, rles[plan.counted]), " are in the image?"
    )
    conversations["count"].answer(str(plan.objects.count(plan.counted)))

    for name in names:
        word = position_word(unions[name], _POSITION_MARGIN)
        if plan.objects.count(name) == 1 and word:
            conversations["position"].ask("Where is the ", (name, rles[name]), "?")
            conversations["position"].answer(word)

    single = [name for name in names if plan.objects.count(name) == 1]
    centers = {name: np.argwhere(unions[name]).mean(0) / len(unions[name]) for name in single}
    pairs = list(itertools.combinations(single, 2))
    rng.shuffle(pairs)
    for pair in pairs:
        # The order of the two and the axis are random, so both answers are equally likely.
        one, other = pair if rng.random() < 0.5 else pair[::-1]
        axis = int(rng.integers(2))
        distance = centers[one][axis] - centers[other][axis]
        if abs(distance) >= _RELATION_MARGIN and len(conversations["relation"].answers) < _MAX_RELATION_QUESTIONS:
            words = (" above or below the ", " to the left or to the right of the ")[axis]
            conversations["relation"].ask("Is the ", (one, rles[one]), words, (other, rles[other]), "?")
            conversations["relation"].answer((("above", "left"), ("below", "right"))[int(distance > 0)][axis])
    return {kind: conversation for kind, conversation in conversations.items() if conversation.messages}


# --- writing ---


def scene_features() -> Features:
    """The columns of a grounded-scenes data set; see `build_scenes`."""
    from datasets import Features, List, Value

    return Features(
        {**row_features(), "scene": Value("int32"), "kind": Value("string"), "answers": List(Value("string"))}
    )


def _rows(
    seed: np.random.SeedSequence,
    plans: Sequence[_Plan],
    cutouts: dict[str, list[Image.Image]],
    backgrounds: Sequence[Image.Image],
    image_size: int,
    object_size: tuple[float, float],
    min_visible: float,
) -> Iterator[list[dict[str, Any]]]:
    """Compose the scenes of a split, and yield the rows of each."""
    for scene, (plan, scene_seed) in enumerate(zip(plans, seed.spawn(len(plans)), strict=True)):
        rng = np.random.default_rng(scene_seed)
        background = _draw_background(rng, backgrounds[int(rng.integers(len(backgrounds)))], image_size)
        objects = [cutouts[name][rng.integers(len(cutouts[name]))] for name in plan.objects]
        image, masks = _compose(rng, background, objects, object_size, min_visible)
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "JPEG", quality=_JPEG_QUALITY)
        yield [
            {
                "images": [{"bytes": encoded.getvalue(), "path": None}],
                "messages": conversation.messages,
                "grounding": conversation.grounding,
                "scene": scene,
                "kind": kind,
                "answers": conversation.answers,
            }
            for kind, conversation in _converse(rng, plan, masks).items()
        ]


def build_scenes(
    cutouts: str | Path,
    backgrounds: str | Path,
    output_dir: str | Path,
    *,
    num_train: int = 3000,
    num_validation: int = 300,
    num_test: int = 300,
    num_zero_shot: int = 0,
    image_size: int = 256,
    max_objects: int = 4,
    questions_per_scene: int = 8,
    classes: Sequence[str] | None = None,
    zero_shot_classes: int = 0,
    cooccurrence: float = 0.0,
    object_size: tuple[float, float] = (0.18, 0.38),
    min_visible: float = 0.8,
    seed: int = 0,
    attribution: str | None = None,
    progress: bool = True,
) -> DatasetDict:
    """Compose scenes from cut-outs and photographs, and write them as a data set with questions and exact masks.

    A scene is a random square of a photograph with pasted objects of up to `max_objects` classes. One of the classes, the one
    to be counted, appears one to three times. The splits share no photographs, except that `zero_shot` has the photographs of `test`. All
    splits but `zero_shot` share their classes and cut-outs; `zero_shot` has classes that no other split shows or asks about.
    The same arguments give the same data set, byte for byte (with the same versions of the libraries).

    Each scene gives a row for some of `KINDS`. Each row is a separate conversation, so that no row answers another:

    - `existence`: "Is there a dog in the image?", "Yes" or "No". Exactly half of a split's answers are "Yes". Neither the
      class, nor the question's place in the conversation, nor the earlier answers predict the answer: each one is a fair coin
      toss, and the questions end when only one answer would be possible.
    - `existence_popular`, `existence_adversarial` (with `cooccurrence`, in `validation` and `test`): the same about equally
      many present and absent classes. The absent ones are the most frequent classes of `train`, or those that appear there
      most often together with the present ones: the splits of POPE (arXiv 2305.10355), whose "random" is `existence`.
    - `negation`: "Is there no dog in the image?", about the classes of `existence`.
    - `objects`: "Which objects are in the image?", "dog, apple, car", in random order, each class once.
    - `count`: "How many objects of the class dog are in the image?", "1", "2" or "3", equally often.
    - `position`: "Where is the dog?", one of `POSITIONS`: the ninth of the image that contains the centroid of the visible mask.
      The questions are about classes that appear once and are clear of the borders between ninths. A scene without such a
      class has no such row.
    - `relation`: "Is the dog to the left or to the right of the car?", "Is the dog above or below the car?", about pairs of
      classes that appear once and are well separated along that axis; at most two questions a scene.

    The columns are `images` (one), `messages` (roles and content parts, the image part first), `grounding` (for each phrase
    that names a class: `message`, the index of the message; `start` and `end`, its characters in the message's text; `image`,
    always 0; `mask`, the COCO RLE of all visible pixels of the class, empty if the class is absent), `scene` (a number within
    the split, shared by the scene's rows), `kind` and `answers`.

    Args:
        cutouts: folder of cut-outs; see `load_cutouts`.
        backgrounds: folder of photographs (JPEG, PNG or WebP), at least three.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        num_train: number of scenes in the split `train`; `num_validation` and `num_test` likewise.
        num_zero_shot: number of scenes in the split `zero_shot`; by default there is no such split.
        image_size: side of the square images, in pixels.
        max_objects: most classes in a scene; it has up to two more objects than classes.
        questions_per_scene: most existence questions about a scene.
        classes: names of the classes; by default the classes of all cut-outs.
        zero_shot_classes: number of classes reserved for the split `zero_shot`, drawn with `seed`.
        cooccurrence: from 0, all classes equally frequent and independent, to 1: the inequality of the classes' frequencies,
            and the probability that an object comes with a companion, a class of the same small group.
        object_size: the least and greatest longer side of an object, relative to the image's side; objects of crowded scenes
            are smaller.
        min_visible: the share of its pixels that each object keeps visible.
        seed: a non-negative number. Each seed gives other scenes, and another division of the photographs.
        attribution: text for the data set's `ATTRIBUTION.md`; by default the files of this name in the two input
            folders, if any.
        progress: show a progress bar.

    Returns:
        the `DatasetDict` of `train`, `validation`, `test` and perhaps `zero_shot`, read from `output_dir`.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        FileNotFoundError: if a folder is missing or has no cut-outs.
        ValueError: if an image cannot be used, a class is unknown, there are too few classes or photographs, or a number
            is out of range.
        ImportError: if `datasets` or `pycocotools` is not installed.
    """
    try:
        import datasets
        import pycocotools.mask  # noqa: F401
        from datasets.arrow_writer import ArrowWriter
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(f"{error}; to build scenes: pip install datasets pycocotools rich") from error

    numbers = {"train": num_train, "validation": num_validation, "test": num_test}
    if num_zero_shot or zero_shot_classes:
        numbers["zero_shot"] = num_zero_shot
    least, greatest = object_size
    for name, value, valid, rule in (
        *((f"num_{split}", number, number >= 1, "at least 1") for split, number in numbers.items()),
        ("image_size", image_size, image_size >= 64, "at least 64"),
        ("max_objects", max_objects, max_objects >= 1, "at least 1"),
        ("questions_per_scene", questions_per_scene, questions_per_scene >= 2, "at least 2"),
        ("object_size", object_size, 0 < least <= greatest <= 0.5, "two increasing numbers in (0, 0.5]"),
        ("min_visible", min_visible, 0 < min_visible <= 1, "in (0, 1]"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("cooccurrence", cooccurrence, 0 <= cooccurrence <= 1, "in [0, 1]"),
        ("zero_shot_classes", zero_shot_classes, zero_shot_classes >= 0, "at least 0"),
    ):
        if not valid:
            raise ValueError(f"{name} is {value}, but must be {rule}")

    cutouts, backgrounds = Path(cutouts), Path(backgrounds)
    images = load_cutouts(cutouts, classes)
    for which, number in {"": len(images) - zero_shot_classes, "zero-shot ": zero_shot_classes}.items():
        if number <= max_objects and (not which or "zero_shot" in numbers):
            raise ValueError(
                f"{number} {which}classes for max_objects={max_objects}, but a scene must lack at least one class to ask"
                " about; add cut-outs, lower max_objects or change zero_shot_classes"
            )
    photographs = _load_backgrounds(backgrounds, image_size)
    if attribution is None:
        files = [folder / "ATTRIBUTION.md" for folder in (cutouts, backgrounds)]
        attribution = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    general_seed, *split_seeds = np.random.SeedSequence(seed).spawn(1 + len(numbers))
    rng = np.random.default_rng(general_seed)
    *photograph_names, test_names = _split_backgrounds(list(photographs), rng)
    photograph_names += [test_names, test_names]
    names = list(images)
    zero_shot_names = sorted(names[i] for i in rng.permutation(len(names))[:zero_shot_classes])
    seen = _Cooccurrence.draw(rng, [name for name in names if name not in zero_shot_names], cooccurrence)
    unseen = _Cooccurrence.draw(rng, zero_shot_names, 0.0)
    train_plans: list[_Plan] = []

    splits = datasets.DatasetDict()
    with new_folder(output_dir) as partial:
        with Progress(disable=not progress) as bar:
            for (split, number), split_seed, part in zip(numbers.items(), split_seeds, photograph_names, strict=False):
                planning, drawing = split_seed.spawn(2)
                plans = _plan_scenes(
                    np.random.default_rng(planning),
                    unseen if split == "zero_shot" else seen,
                    number,
                    max_objects,
                    questions_per_scene,
                )
                if split == "train":
                    train_plans = plans
                elif cooccurrence and split != "zero_shot":
                    _add_pope_questions(plans, train_plans, list(seen.weights), questions_per_scene // 2)
                split_photographs = [photographs[name] for name in part]
                scenes = _rows(drawing, plans, images, split_photographs, image_size, object_size, min_visible)
                table = partial.parent / f".{split}.arrow"
                with ArrowWriter(path=str(table), features=scene_features()) as writer:
                    for rows in bar.track(scenes, total=number, description=split):
                        for row in rows:
                            writer.write(row)
                    writer.finalize()
                with table.open("rb") as file:
                    fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
                # `datasets` would derive a fingerprint from the temporary path; this one depends on the rows.
                read = datasets.Dataset.from_file(str(table), split=datasets.NamedSplit(split))
                splits[split] = datasets.Dataset(read.data, read.info, read.split, fingerprint=fingerprint)
        with quiet_datasets(datasets):
            splits.save_to_disk(partial)
        if attribution:
            (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        sources = {"cut-outs": cutouts, "backgrounds": backgrounds}
        provenance = {
            "kind": "grounded scenes",
            "language": "en",
            "sources": [{"role": role, **describe(folder, "data set")} for role, folder in sources.items()],
        }
        settings = {
            "classes": len(images),
            "photographs": len(photographs),
            "image size": image_size,
            "most classes in a scene": max_objects,
            "most existence questions about a scene": questions_per_scene,
            "object size": list(object_size),
            "least visible share of an object": min_visible,
            "co-occurrence": cooccurrence,
            **({"zero-shot classes": zero_shot_names} if zero_shot_names else {}),
            "seed": seed,
        }
        tell_step(partial, provenance, "agevlm scenes", settings)
    return datasets.load_from_disk(output_dir)
