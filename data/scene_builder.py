"""Grounded scenes: a data set of composed photographs that comes with exact masks and questions.

Cut-outs are pasted on photographs, so every object's visible mask is known to the pixel, and several kinds of
conversation are held about each scene (`KINDS`). A model that does not look at the image stays at chance on them:
the way the answers are drawn gives away nothing (see `build_scenes`).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..files import new_folder
from ..processing.rows import mask_to_rle, quiet_datasets, row_features

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
# Objects this near a border between two of the nine fields (in parts of the image's side) have no clear position.
_POSITION_MARGIN = 0.02
_MIN_MASK_PIXELS = 16
# Objects whose centroids are nearer to each other than this along an axis have no clear order along it.
_RELATION_MARGIN = 0.12
# Classes that like to appear together, where they do.
_COMPANY = 5
_PAIRS_ASKED = 2
_PLACEMENTS = 200


def position_word(mask: np.ndarray, margin: float = 0.0) -> str | None:
    """Name the ninth of the image, one of `POSITIONS`, that holds the centroid of a mask, bool `(height, width)`.

    Returns None where the mask is empty, or its centroid lies within `margin` (in parts of the image's side) of a
    border between two ninths.
    """
    if not mask.any():
        return None
    centre = (np.argwhere(mask).mean(0) + 0.5) / mask.shape
    if np.abs(np.subtract.outer(centre, (1 / 3, 2 / 3))).min() < margin:
        return None
    row, column = np.minimum((centre * 3).astype(int), 2)
    return POSITIONS[row][column]


# --- reading ---


def _read_image(path: Path) -> Image.Image:
    """Read and decode an image, turned upright; every way for it to be unreadable is a ValueError with its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is too large: {error}; scale it down") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); repair or remove it") from error


def _image_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """The image files of a folder and all below it, sorted; hidden files are left out."""
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
        raise ValueError(f"{path} gives no usable class name ({name!r}); rename it, without commas")
    return name


def load_cutouts(
    folder: str | Path, classes: Sequence[str] | None = None, max_side: int = 512
) -> dict[str, list[Image.Image]]:
    """Read a folder of cut-outs: PNG or WebP images with transparency.

    The class of a cut-out is the name of its file, or of the sub-folder it is in, with spaces for `_` and `-`. It
    should read well after "a": a singular noun.

    Args:
        folder: where the cut-outs are.
        classes: the classes to read; all by default.
        max_side: cut-outs with a longer side, in pixels, are scaled down to it.

    Returns:
        the RGBA cut-outs of each class, cropped to what is visible, the classes in alphabetical order.

    Raises:
        FileNotFoundError: if the folder is missing or has no cut-outs.
        ValueError: if a cut-out is not a readable image, or has no transparency, or a class has no cut-outs.
    """
    folder = Path(folder)
    files: dict[str, list[Path]] = {}
    for path in _image_files(folder, _CUTOUT_SUFFIXES):
        files.setdefault(_class_name(path, folder), []).append(path)
    if not files:
        raise FileNotFoundError(f"no cut-outs in {folder}: expected .png or .webp images with transparency")
    for name in classes or ():
        if name not in files:
            near = difflib.get_close_matches(name, files) or sorted(files)[:10]
            raise ValueError(f"no cut-out of the class {name!r} in {folder}; did you mean: {', '.join(near)}?")

    cutouts: dict[str, list[Image.Image]] = {}
    for name in sorted(set(classes or files)):
        cutouts[name] = []
        for path in files[name]:
            image = _read_image(path)
            if not image.has_transparency_data:
                raise ValueError(f"{path} has no transparency, so it is no cut-out; remove its ground or the file")
            image = image.convert("RGBA")
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
            if box is None:
                raise ValueError(f"{path} is transparent all over; remove it")
            image = image.crop(box)
            image.thumbnail((max_side, max_side))
            cutouts[name].append(image)
    return cutouts


def _load_backgrounds(folder: Path, image_size: int) -> dict[str, Image.Image]:
    """The photographs of a folder, RGB, by their path in it, the short side at most twice the image size."""
    files = _image_files(folder, _PHOTOGRAPH_SUFFIXES)
    if len(files) < 3:
        raise ValueError(
            f"{len(files)} background photographs in {folder}, but at least 3 are needed:"
            " train, validation and test share none; add more .jpg, .png or .webp files"
        )
    backgrounds = {}
    for path in files:
        image = _read_image(path).convert("RGB")
        scale = 2 * image_size / min(image.size)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        backgrounds[path.relative_to(folder).as_posix()] = image
    return backgrounds


def _split_backgrounds(names: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Deal out the photographs: a sixth (at least one) each to validation and test, all others to train."""
    held_out = max(1, len(names) // 6)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    return [shuffled[2 * held_out :], shuffled[:held_out], shuffled[held_out : 2 * held_out]]


# --- composing ---


def _ground(rng: np.random.Generator, photograph: Image.Image, size: int) -> Image.Image:
    """A random square of a photograph, at `size` pixels, perhaps mirrored, its brightness and colour a bit changed."""
    side = rng.uniform(0.5, 1) * min(photograph.size)
    left, top = rng.uniform(0, np.subtract(photograph.size, side))
    ground = photograph.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        ground = ImageOps.mirror(ground)
    ground = ImageEnhance.Brightness(ground).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Color(ground).enhance(rng.uniform(0.7, 1.3))


def _place(
    rng: np.random.Generator, cutout: Image.Image, size: int, side: float
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]]:
    """Turn, perhaps mirror and scale a cut-out to a longer side of `side` pixels, and choose where it goes.

    Returns its colours `(h, w, 3)` and its alpha `(h, w)` in [0, 1], and the `h x w` box of the image it covers.
    """
    if rng.random() < 0.5:
        cutout = ImageOps.mirror(cutout)
    cutout = cutout.reduce(max(1, int(max(cutout.size) / (1.5 * side))))  # turning costs by the pixel
    cutout = cutout.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    scale = side / max(cutout.size)
    cutout = cutout.resize([max(1, round(length * scale)) for length in cutout.size], Image.Resampling.BICUBIC)
    pixels = np.asarray(cutout, dtype=np.float32)
    # First one of the nine fields, then a place in it: so all position words are about equally frequent.
    starts = []
    for length in pixels.shape[:2]:
        low, high = np.array([0, size / 3]) + rng.integers(3) * size / 3
        centre = rng.uniform(max(low, length / 2), min(high, size - length / 2))
        starts.append(int(np.clip(round(centre - length / 2), 0, size - length)))
    (top, left), (height, width) = starts, pixels.shape[:2]
    return pixels[..., :3], pixels[..., 3] / 255, (slice(top, top + height), slice(left, left + width))


def _compose(
    rng: np.random.Generator,
    ground: Image.Image,
    objects: Sequence[Image.Image],
    object_size: tuple[float, float],
    min_visible: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paste objects, back to front, on a square ground.

    Returns the image, uint8 `(size, size, 3)`, and each object's visible mask, bool `(size, size)`: the pixels of
    which more than half is this object's colour. Of each object, `min_visible` of its pixels stay visible.
    """
    image = np.asarray(ground, dtype=np.float32).copy()
    size = len(image)
    shares: list[np.ndarray] = []  # how much of each pixel is this object's colour, in [0, 1]
    areas: list[int] = []
    scale = 1.0
    for cutout in objects:
        for _ in range(_PLACEMENTS):
            colours, alpha, box = _place(rng, cutout, size, rng.uniform(*object_size) * size * scale)
            area = int(np.count_nonzero(alpha > 0.5))
            left = [share.copy() for share in shares]
            for share in left:
                share[box] *= 1 - alpha
            if area >= _MIN_MASK_PIXELS and all(
                np.count_nonzero(share > 0.5) >= max(min_visible * whole, _MIN_MASK_PIXELS)
                for share, whole in zip(left, areas, strict=True)
            ):
                break
            scale *= 0.98  # a crowded scene gets smaller objects
        else:
            raise ValueError(
                f"{len(objects)} objects do not fit in {size} x {size} pixels:"
                " lower max_objects or min_visible, or raise image_size"
            )
        own = np.zeros((size, size), dtype=np.float32)
        own[box] = alpha
        shares = [*left, own]
        areas.append(area)
        image[box] += (colours - image[box]) * alpha[..., None]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), [share > 0.5 for share in shares]


# --- asking ---


@dataclass
class _Company:
    """How often classes appear, and which appear together.

    With a `strength` of 0 all classes are alike. Otherwise the n-th most popular class is drawn with a weight of
    `n ** -strength`, and with the probability `strength` the next class is a companion of one that is there already.
    """

    weights: dict[str, float]  # sum to 1
    companions: dict[str, list[str]]
    strength: float

    @classmethod
    def found(cls, rng: np.random.Generator, classes: Sequence[str], strength: float) -> _Company:
        ranked = [classes[i] for i in rng.permutation(len(classes))]
        weights = np.arange(1, len(ranked) + 1.0) ** -strength
        dealt = [classes[i] for i in rng.permutation(len(classes))]
        circles = [dealt[start : start + _COMPANY] for start in range(0, len(dealt), _COMPANY)]
        companions = {name: [other for other in circle if other != name] for circle in circles for name in circle}
        return cls(dict(zip(ranked, weights / weights.sum(), strict=True)), companions, strength)

    def draw(self, rng: np.random.Generator, number: int) -> list[str]:
        """Different classes, in the order in which they join."""
        present: list[str] = []
        while len(present) < number:
            known = [name for friend in present for name in self.companions[friend] if name not in present]
            if known and rng.random() < self.strength:
                present.append(known[rng.integers(len(known))])
                continue
            weights = np.array([0.0 if name in present else weight for name, weight in self.weights.items()])
            present.append(list(self.weights)[rng.choice(len(weights), p=weights / weights.sum())])
        return present

    def absentees(self, rng: np.random.Generator, present: Sequence[str], number: int) -> list[str]:
        """Some of the other classes, to be asked for: by chance, popular ones and companions of those present, a third
        each, so that neither popularity nor company alone tells that a class is there."""
        absent = [name for name in self.weights if name not in present]
        orders = [[absent[i] for i in rng.permutation(len(absent))]]
        if self.strength:
            popular = rng.exponential(size=len(absent)) / [self.weights[name] for name in absent]
            known = {name for friend in present for name in self.companions[friend]}.difference(present)
            orders += [[absent[i] for i in np.argsort(popular)], sorted(known, key=lambda name: rng.random())]
        merged: dict[str, None] = {}
        while len(merged) < min(number, len(absent)):
            order = orders[rng.integers(len(orders))]
            merged.update(dict.fromkeys([name for name in order if name not in merged][:1]))
        return list(merged)


@dataclass
class _Plan:
    """What is in a scene and what is asked about it, before anything is drawn."""

    objects: list[str]  # the class of each object, back to front
    counted: str  # the class to be counted
    asked: dict[str, list[tuple[str, bool]]]  # by kind of existence question: class and whether it is there


def _plan_scenes(
    rng: np.random.Generator, company: _Company, number: int, max_objects: int, questions: int
) -> list[_Plan]:
    plans = []
    for count in rng.permutation(np.arange(number) % _MAX_COUNT + 1):
        present = company.draw(rng, int(rng.integers(1, max_objects + 1)))
        absent = company.absentees(rng, present, questions)
        counted = present[0]
        objects = present + [counted] * (count - 1)
        rng.shuffle(objects)
        # The answers are fair coins, and the questions stop, before the coin is thrown, once one of the two kinds has
        # run out. So nothing in the conversation so far tells the next answer; with as many of each in every scene,
        # counting the answers given so far would be right two times out of three.
        left = {True: present[::-1], False: absent[::-1]}
        asked: list[tuple[str, bool]] = []
        while len(asked) < questions and left[True] and left[False]:
            answer = bool(rng.random() < 0.5)
            asked.append((left[answer].pop(), answer))
        plans.append(_Plan(objects, counted, {"existence": asked}))
    _balance(rng, plans, list(company.weights))
    return plans


def _tempt(plans: Sequence[_Plan], seen: Sequence[_Plan], classes: Sequence[str], most: int) -> None:
    """Add POPE's popular and adversarial questions to scenes (arXiv 2305.10355, section 5.1).

    As many absent classes as present ones are asked for, at most `most` of each: the most frequent ones of the scenes
    `seen`, and those most frequently seen together with the ones present.
    """
    frequent = Counter(name for plan in seen for name in set(plan.objects))
    together = Counter(pair for plan in seen for pair in itertools.permutations(set(plan.objects), 2))
    for plan in plans:
        present = sorted(set(plan.objects))
        absent = [name for name in classes if name not in present]
        ranks = {
            "existence_popular": lambda name: (-frequent[name], name),
            "existence_adversarial": lambda name: (
                -sum(together[name, other] for other in present),  # noqa: B023  # sorted below, in this turn
                -frequent[name],
                name,
            ),
        }
        for kind, rank in ranks.items():
            number = min(len(present), len(absent), most)
            plan.asked[kind] = [(name, True) for name in present[:number]]
            plan.asked[kind] += [(name, False) for name in sorted(absent, key=rank)[:number]]


def _balance(rng: np.random.Generator, plans: list[_Plan], classes: Sequence[str]) -> None:
    """Make the split's existence answers exactly half "Yes": drop a few questions here and there (of n, some √n)."""
    surplus = sum(1 if answer else -1 for plan in plans for _, answer in plan.asked["existence"])
    answer = surplus > 0
    surplus = abs(surplus)
    questions = [(plan, question) for plan in plans for question in plan.asked["existence"] if question[1] == answer]
    rng.shuffle(questions)
    for plan, question in questions:
        if surplus and len(plan.asked["existence"]) > 1:
            plan.asked["existence"].remove(question)
            surplus -= 1
    # Small splits only: the surplus is now in scenes of one question, which can take a second one.
    for plan, _ in questions:
        asked = plan.asked["existence"]
        if surplus and len(asked) == 1 and asked[0][1] == answer:
            pool = [name for name in classes if (name in plan.objects) != answer]
            asked.append((pool[rng.integers(len(pool))], not answer))
            surplus -= 1


def _article(noun: str) -> str:
    """ "a" or "an", as the noun's sound asks for."""
    spoken_as_consonant = re.match(r"(uni(?!n)|us[ae]|uk|ut[ei]|eu|ewe|one\b)", noun, re.IGNORECASE)
    spoken_as_vowel = re.match(r"[aeiou]|hour|hono|heir", noun, re.IGNORECASE)
    return "an" if spoken_as_vowel and not spoken_as_consonant else "a"


@dataclass
class _Conversation:
    """One row's messages, the grounded phrases in them, and the answers."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    grounding: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def ask(self, *parts: str | tuple[str, dict]) -> None:
        self._say("user", parts)

    def answer(self, *parts: str | tuple[str, dict]) -> None:
        self.answers.append(self._say("assistant", parts))

    def _say(self, role: str, parts: Sequence[str | tuple[str, dict]]) -> str:
        """Add a message made up of text and of phrases with their masks."""
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            phrase, rle = part
            start, end = len(text), len(text) + len(phrase)
            where = {"message": len(self.messages), "start": start, "end": end, "image": 0}
            self.grounding.append(where | {"box": None, "mask": rle, "score": None})
            text += phrase
        # Arrow gives all parts the same keys, so the image part says `text: None` itself.
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
    nothing = mask_to_rle(np.zeros_like(masks[0]))
    rng.shuffle(names)
    talk = {kind: _Conversation() for kind in KINDS}

    for kind, asked in plan.asked.items():
        for name, present in asked:
            talk[kind].ask(f"Is there {_article(name)} ", (name, rles.get(name, nothing)), " in the image?")
            talk[kind].answer("Yes" if present else "No")
    for name, present in plan.asked["existence"]:
        talk["negation"].ask("Is there no ", (name, rles.get(name, nothing)), " in the image?")
        talk["negation"].answer("No" if present else "Yes")

    talk["objects"].ask("Which objects are in the image?")
    phrases = [part for name in names for part in (", ", (name, rles[name]))]
    talk["objects"].answer(*phrases[1:])

    # One question a scene: of several, only the first could be balanced and not told by the number of objects so far.
    # The wording needs no plural.
    talk["count"].ask("How many objects of the class ", (plan.counted, rles[plan.counted]), " are in the image?")
    talk["count"].answer(str(plan.objects.count(plan.counted)))

    for name in names:
        word = position_word(unions[name], _POSITION_MARGIN)
        if plan.objects.count(name) == 1 and word:
            talk["position"].ask("Where is the ", (name, rles[name]), "?")
            talk["position"].answer(word)

    single = [name for name in names if plan.objects.count(name) == 1]
    centres = {name: np.argwhere(unions[name]).mean(0) / len(unions[name]) for name in single}
    pairs = list(itertools.combinations(single, 2))
    rng.shuffle(pairs)
    for pair in pairs:
        # The order of the two and the axis are chance, so both answers are equally likely.
        one, other = pair if rng.random() < 0.5 else pair[::-1]
        axis = int(rng.integers(2))
        apart = centres[one][axis] - centres[other][axis]
        if abs(apart) >= _RELATION_MARGIN and len(talk["relation"].answers) < _PAIRS_ASKED:
            words = (" above or below the ", " to the left or to the right of the ")[axis]
            talk["relation"].ask("Is the ", (one, rles[one]), words, (other, rles[other]), "?")
            talk["relation"].answer((("above", "left"), ("below", "right"))[int(apart > 0)][axis])
    return {kind: conversation for kind, conversation in talk.items() if conversation.messages}


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
    """Draw the scenes of a split and yield the rows of each."""
    for scene, (plan, scene_seed) in enumerate(zip(plans, seed.spawn(len(plans)), strict=True)):
        rng = np.random.default_rng(scene_seed)
        ground = _ground(rng, backgrounds[int(rng.integers(len(backgrounds)))], image_size)
        objects = [cutouts[name][rng.integers(len(cutouts[name]))] for name in plan.objects]
        image, masks = _compose(rng, ground, objects, object_size, min_visible)
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

    A scene is a random square of a photograph with objects of up to `max_objects` classes pasted on it; one of the
    classes, the one to be counted, appears one to three times. The splits share no photographs, but `test` and
    `zero_shot` have theirs in common: `zero_shot` shows classes that no other split shows or asks for. The same
    arguments give the same data set, byte for byte (with the same versions of the libraries).

    Each scene gives a row for some of `KINDS`, each a conversation of its own so that none answers another:

    - `existence`: "Is there a dog in the image?", "Yes" or "No". Exactly half of a split's answers are "Yes". Neither
      the class, nor the question's place in the conversation, nor the answers before it tell the answer: each is a
      fair coin, and the questions end where the next could only be answered one way.
    - `existence_popular`, `existence_adversarial` (with `cooccurrence`, in `validation` and `test`): the same of as many
      present as absent classes, the absent ones being the most frequent of `train`, or those that go most often with the
      present ones there: the splits of POPE (arXiv 2305.10355), whose "random" is `existence`.
    - `negation`: "Is there no dog in the image?", of the classes of `existence`.
    - `objects`: "Which objects are in the image?", "dog, apple, car", in random order, each class once.
    - `count`: "How many objects of the class dog are in the image?", "1", "2" or "3", equally often.
    - `position`: "Where is the dog?", one of `POSITIONS`: the ninth of the image that holds the centroid of the visible
      mask. Asked of the classes that appear once and lie clear of the borders between ninths; a scene without any has
      has no such row.
    - `relation`: "Is the dog to the left or to the right of the car?", "Is the dog above or below the car?" of pairs of
      classes that appear once and lie well apart along that axis; at most two a scene.

    The columns are `images` (one), `messages` (roles and content parts, the image part first), `grounding` (for each
    phrase that names a class: `message`, the index of the message; `start` and `end`, its characters in the message's
    text; `image`, always 0; `mask`, the COCO RLE of all visible pixels of the class, which `mask_from_rle` decodes,
    empty where the class is not there), `scene` (a number within the split, shared by the scene's rows), `kind` and `answers`.

    Args:
        cutouts: folder of cut-outs; see `load_cutouts`.
        backgrounds: folder of photographs (JPEG, PNG or WebP), at least three.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        num_train: number of scenes in the split `train`; `num_validation` and `num_test` likewise.
        num_zero_shot: number of scenes in the split `zero_shot`; there is none without.
        image_size: side of the square images, in pixels.
        max_objects: most classes in a scene; there are up to two more objects than classes.
        questions_per_scene: most existence questions about a scene.
        classes: names of the classes to use; all cut-outs by default.
        zero_shot_classes: how many of them are kept for the split `zero_shot`, drawn with `seed`.
        cooccurrence: from 0, where all classes are equally frequent and independent, to 1: how much more frequent some
            classes are than others, and the probability that an object brings a companion of its small circle.
        object_size: the least and greatest longer side of an object, in parts of the image's side; crowded scenes go
            below.
        min_visible: the part of its pixels that each object keeps visible.
        seed: a non-negative number; other seeds give other scenes, and another split of the photographs.
        attribution: text for the data set's `ATTRIBUTION.md`; by default the files of this name in the two input
            folders, if any.
        progress: show a progress bar.

    Returns:
        the `DatasetDict` of `train`, `validation` and `test`, as read back from `output_dir`.

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
    for kept, number in {"": len(images) - zero_shot_classes, "zero-shot ": zero_shot_classes}.items():
        if number <= max_objects and (not kept or "zero_shot" in numbers):
            raise ValueError(
                f"{number} {kept}classes for max_objects={max_objects}: a scene must lack at least one class to ask"
                " about; add cut-outs, lower max_objects or change zero_shot_classes"
            )
    photographs = _load_backgrounds(backgrounds, image_size)
    if attribution is None:
        files = [folder / "ATTRIBUTION.md" for folder in (cutouts, backgrounds)]
        attribution = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    dealing, *split_seeds = np.random.SeedSequence(seed).spawn(1 + len(numbers))
    dealer = np.random.default_rng(dealing)
    *parts, last = _split_backgrounds(list(photographs), dealer)
    parts += [last, last]
    names = list(images)
    held_out = sorted(names[i] for i in dealer.permutation(len(names))[:zero_shot_classes])
    company = _Company.found(dealer, [name for name in names if name not in held_out], cooccurrence)
    strangers = _Company.found(dealer, held_out, 0.0)
    seen: list[_Plan] = []

    splits = datasets.DatasetDict()
    with new_folder(output_dir) as partial:
        with Progress(disable=not progress) as bar:
            for (split, number), split_seed, part in zip(numbers.items(), split_seeds, parts, strict=False):
                planning, drawing = split_seed.spawn(2)
                present = strangers if split == "zero_shot" else company
                plans = _plan_scenes(
                    np.random.default_rng(planning), present, number, max_objects, questions_per_scene
                )
                if split == "train":
                    seen = plans
                elif cooccurrence and split != "zero_shot":
                    _tempt(plans, seen, list(company.weights), questions_per_scene // 2)
                grounds = [photographs[name] for name in part]
                scenes = _rows(drawing, plans, images, grounds, image_size, object_size, min_visible)
                table = partial.parent / f".{split}.arrow"
                with ArrowWriter(path=str(table), features=scene_features()) as writer:
                    for rows in bar.track(scenes, total=number, description=split):
                        for row in rows:
                            writer.write(row)
                    writer.finalize()
                with table.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
                # The fingerprint that `datasets` would make up holds the temporary path; this one depends on the rows.
                read = datasets.Dataset.from_file(str(table), split=datasets.NamedSplit(split))
                splits[split] = datasets.Dataset(read.data, read.info, read.split, fingerprint=digest)
        with quiet_datasets(datasets):
            splits.save_to_disk(partial)
        if attribution:
            (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
    return datasets.load_from_disk(output_dir)
