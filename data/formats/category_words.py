# SPDX-License-Identifier: Apache-2.0
"""Words of captions that name one of COCO's 80 categories.

A caption is searched for the longest phrases of a table: names of categories, their synonyms and plurals, and phrases that contain such a word
and name something else, such as "train station". A few rules read the words around. The aim is precision: a doubtful word is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# The first synonym is the category's name. Plurals are made by `_plural`.
_SYNONYMS = {
    "person": "person, man, woman, boy, girl, child, kid, toddler, baby, infant, guy, lady, gentleman, adult, teenager, male, female, pedestrian, "
    "passenger, player, batter, catcher, pitcher, umpire, surfer, skier, snowboarder, skateboarder, rider, cyclist, bicyclist, motorcyclist, biker, "
    "skater, cowboy, policeman, fireman, fisherman, businessman, soldier, officer, chef, waiter, waitress, bride, groom, worker, driver, tourist, "
    "spectator, student, teacher, farmer, swimmer, jockey, police officer, baseball player, tennis player, soccer player",
    "bicycle": "bicycle, bycicle, bike",
    "car": "car, automobile, sedan, taxi, taxi cab, suv, police car, van",
    "motorcycle": "motorcycle, motor cycle, motorbike, motor bike, dirt bike, moped, bike",
    "airplane": "airplane, aeroplane, plane, air plane, jet, jetliner, airliner, passenger jet, passenger plane, jet plane, jet airplane, aircraft",
    "bus": "bus, minibus, passenger bus",
    "train": "train, locomotive, train car, train engine, passenger train, freight train, subway train, subway car",
    "truck": "truck, pickup, pick up truck, pickup truck, fire truck, firetruck, fire engine, food truck, tow truck, dump truck, lorry, van",
    "boat": "boat, ship, sailboat, sail boat, rowboat, row boat, canoe, kayak, yacht, ferry, motorboat, speedboat",
    "traffic light": "traffic light, traffic signal, stop light, stoplight",
    "fire hydrant": "fire hydrant, hydrant",
    "stop sign": "stop sign",
    "parking meter": "parking meter",
    "bench": "bench, park bench",
    "bird": "bird, seagull, sea gull, gull, duck, duckling, goose, pigeon, owl, parrot, penguin, ostrich, peacock, flamingo, swan, heron, eagle, pelican",
    "cat": "cat, kitten, kitty",
    "dog": "dog, puppy, pup",
    "horse": "horse, pony, foal",
    "sheep": "sheep, lamb, ewe",
    "cow": "cow, bull, ox, cattle",
    "elephant": "elephant",
    "bear": "bear, polar bear, grizzly bear, panda bear, bear cub",
    "zebra": "zebra",
    "giraffe": "giraffe",
    "backpack": "backpack, back pack, rucksack, knapsack",
    "umbrella": "umbrella, parasol",
    "handbag": "handbag, hand bag, purse",
    "tie": "tie, necktie, neck tie, bow tie, bowtie",
    "suitcase": "suitcase, suit case, luggage, baggage",
    "frisbee": "frisbee, frizbee",
    "skis": "skis, snow skis",
    "snowboard": "snowboard, snow board",
    "sports ball": "sports ball, ball, tennis ball, soccer ball",
    "kite": "kite",
    "baseball bat": "baseball bat, bat",
    "baseball glove": "baseball glove, baseball mitt, catcher s mitt, catchers mitt",
    "skateboard": "skateboard, skate board",
    "surfboard": "surfboard, surf board",
    "tennis racket": "tennis racket, tennis racquet, racket, racquet",
    "bottle": "bottle, wine bottle, water bottle, beer bottle",
    "wine glass": "wine glass, wineglass, glass of wine",
    "cup": "cup, mug, coffee cup, tea cup, teacup, coffee mug",
    "fork": "fork",
    "knife": "knife",
    "spoon": "spoon",
    "bowl": "bowl",
    "banana": "banana",
    "apple": "apple",
    "sandwich": "sandwich, hamburger, cheeseburger, burger",
    "orange": "orange",
    "broccoli": "broccoli, brocolli, brocoli",
    "carrot": "carrot",
    "hot dog": "hot dog, hotdog",
    "pizza": "pizza",
    "donut": "donut, doughnut",
    "cake": "cake, cupcake, birthday cake, wedding cake",
    "chair": "chair, armchair, arm chair, lawn chair, high chair",
    "couch": "couch, sofa, loveseat, love seat",
    "potted plant": "potted plant, houseplant, house plant",
    "bed": "bed, bunk bed",
    "dining table": "dining table, dining room table, dinner table, kitchen table, table",
    "toilet": "toilet",
    "tv": "tv, television, television set, tv set, flat screen tv, monitor, computer monitor",
    "laptop": "laptop, laptop computer, apple laptop",
    "mouse": "mouse, computer mouse",
    "remote": "remote, remote control, remote controller, wii remote, tv remote",
    "keyboard": "keyboard, computer keyboard",
    "cell phone": "cell phone, cellphone, mobile phone, smartphone, smart phone, iphone, phone",
    "microwave": "microwave, microwave oven",
    "oven": "oven, stove, stove top oven, pizza oven",
    "toaster": "toaster",
    "sink": "sink, kitchen sink, bathroom sink",
    "refrigerator": "refrigerator, fridge",
    "book": "book",
    "clock": "clock, alarm clock",
    "vase": "vase",
    "scissors": "scissors",
    "teddy bear": "teddy bear, teddy, stuffed bear, stuffed teddy bear, bear",
    "hair drier": "hair drier, hair dryer, hairdryer, blow dryer",
    "toothbrush": "toothbrush, tooth brush",
}
"""A synonym of several categories ("bike", "van", "bear") is of the one that the image has."""

_OTHERS = (
    # what is there is a part, a place or another thing
    "airplane hangar, apple cider, apple computer, apple juice, apple logo, apple pie, apple product, apple sauce, apple tree, at bat, to bat, "
    "baggage claim, ball cap, ball field, ball game, ball gown, ball park, banana bread, banana leaf, banana split, banana tree, bat boy, bath tub, "
    "bear with me, bed frame, bed room, bed sheet, bed side, bed spread, bird bath, bird cage, bird feeder, bird house, bird s eye, boat dock, boat house, "
    "boat ramp, book bag, book case, book end, book shelf, book store, bottle cap, bottle opener, bowl game, bus depot, bus lane, bus shelter, "
    "bus station, bus stop, bus terminal, cable car, cake pan, cake plate, cake stand, car door, car mirror, car park, car seat, car show, "
    "car wash, car window, cat bed, cat food, cat nap, cat tail, cat tree, chair lift, chili dog, clock face, clock tower, coffee table, corn dog, "
    "crab cake, cup cake, cup holder, disc golf, dog bed, dog bowl, dog food, dog house, dog park, dog show, dog sled, dog treat, end table, "
    "fire ball, pitcher of, baby carriage, baby stroller, flower bed, folding table, fork lift, frisbee golf, gravy boat, hair bow, horse back, horse drawn, horse race, horse track, "
    "horse trailer, ice cream sandwich, jet engine, jet ski, jet stream, kite board, kite boarder, kite boarding, kite surfer, "
    "kite surfing, knife block, luggage cart, luggage rack, luggage tag, meat ball, men s room, mickey mouse, microwave dinner, "
    "mouse pad, mousepad, mouse trap, night table, orange juice, orange peel, orange tree, oven door, oven mitt, pan cake, pay phone, phone book, phone booth, "
    "phone call, phone line, phone number, phone pole, picnic table, pit bull, pizza box, pizza cutter, pizza dough, pizza joint, "
    "pizza pan, pizza parlor, pizza place, pizza restaurant, pizza sauce, pizza shop, plane ticket, pool table, rail car, "
    "refrigerator magnet, remote area, rocking horse, rubber duck, saw horse, sea horse, serving table, ship yard, ship wreck, side car, side table, "
    "sink hole, skateboard park, skateboard ramp, snow ball, soft ball, stove top, street car, super bowl, table cloth, table lamp, "
    "table tennis, table top, taxi stand, tie down, tie dye, tie dyed, to bear, toaster oven, toilet bowl, toilet brush, toilet lid, toilet paper, "
    "toilet seat, toilet stall, toilet tank, tooth brush holder, toothbrush holder, traffic light pole, train bridge, train conductor, train depot, "
    "train line, train platform, train ride, train set, train station, train stop, train terminal, train track, train yard, trolley car, "
    "truck bed, truck stop, tv dinner, tv dish, tv show, tv stand, tv tray, umbrella stand, water ski, water skis, women s room, world cup"
)

_IRREGULAR = {
    "child": "children",
    "person": "people, persons",
    "mouse": "mice",
    "knife": "knives",
    "goose": "geese",
    "ox": "oxen",
    "bus": "buses, busses",
    "leaf": "leaves",
    "sheep": "sheep",
    "aircraft": "aircraft",
    **dict.fromkeys(("skis", "scissors", "broccoli", "brocolli", "brocoli", "luggage", "baggage", "cattle"), ""),
}
_WORD = re.compile(r"[^\W_]+")
_EITHER = {"sheep", "aircraft"}
"""Words for one or several."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NUMBERS = {"a": 1, "an": 1, "one": 1, "single": 1, "lone": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}  # fmt: skip
_VERBS = _set("bats bears books skateboards skis snowboards ties trains")
_LIKENESSES = _set(
    "statue statues sculpture sculptures painting paintings drawing drawings figurine figurines mural cartoon silhouette shadow"
)
_UNREAL_BEFORE = _set("toy stuffed fake inflatable lego origami model no without")
_UNREAL_BEHIND = _LIKENESSES | _set("shaped print printed themed costume toy toys logo poster sticker magnet magnets")
_COLORS = _set("black white red blue green yellow brown gray grey pink purple silver gold tan beige orange bright")
_BEHIND_NOUNS = _set(
    "and or is are was in on at with by of to from for near next beside behind under over sitting sits laying lying lays that which while has "
    "as inside into onto hanging sliced cut between"
)
"""Words that can follow a noun. Any other makes "orange" and "remote" adjectives."""


@dataclass(frozen=True)
class Naming:
    """Characters `start` to `end` of a text that name things.

    Args:
        categories: that the words may mean: one, or several of which an image decides.
        count: how many things the text says that they are; None for an unknown number.
    """

    start: int
    end: int
    categories: tuple[str, ...]
    count: int | None


def _plurals(phrase: str) -> list[str]:
    """The plurals of a phrase: of the word before "of" ("glass of wine"), or of its last."""
    head, of, rest = phrase.partition(" of ")
    before, space, noun = head.rpartition(" ")
    if noun in _IRREGULAR:
        nouns = [word for word in _IRREGULAR[noun].split(", ") if word]
    elif noun.endswith("man"):
        nouns = [f"{noun[:-2]}en"]
    elif noun.endswith(("s", "x", "z", "ch", "sh")):
        nouns = [f"{noun}es"]
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        nouns = [f"{noun[:-1]}ies"]
    else:
        nouns = [f"{noun}s"]
    return [f"{before}{space}{word}{of}{rest}" for word in nouns]


@dataclass(frozen=True)
class _Match:
    """Words `first` to before `last` of a text that stand in the table."""

    first: int
    last: int
    categories: tuple[str, ...]
    several: bool

    @property
    def is_person(self) -> bool:
        return self.categories == ("person",) and not self.several


class CategoryWords:
    """Finds the words of texts that name some categories.

    Args:
        names: of the categories. COCO's have the synonyms of this module, others their name and its plural.
    """

    def __init__(self, names: Collection[str]):
        self._table: dict[str, tuple[tuple[str, ...], bool]] = {}  # by phrase: its categories, whether it is a plural
        for phrase in _OTHERS.split(", "):
            self._table |= dict.fromkeys([phrase, *_plurals(phrase)], ((), False))
        for name in names:
            key = " ".join(_WORD.findall(name.lower()))
            for phrase in filter(None, _SYNONYMS.get(key, key).split(", ")):
                plurals = _plurals(phrase)
                self._add(phrase, name, phrase in plurals or not plurals)
                for plural in plurals:
                    self._add(plural, name, True)
        self._longest = max(phrase.count(" ") + 1 for phrase in self._table)

    def _add(self, phrase: str, name: str, several: bool) -> None:
        categories = self._table.get(phrase, ((), False))[0]
        self._table[phrase] = categories if name in categories else (*categories, name), several

    def find(self, text: str) -> list[Naming]:
        """The phrases of a text that name a category, in their order."""
        places = [match.span() for match in _WORD.finditer(text)]
        words = [text[start:end].lower() for start, end in places]
        # Whether a word goes on where the one before ends: with a space, a hyphen or an apostrophe between them.
        joined = [False] + [text[a:b].strip() in ("", "-", "'", "’") for (_, a), (b, _) in itertools.pairwise(places)]
        matches: list[_Match] = []
        i = 0
        while i < len(words):
            longest = range(min(self._longest, len(words) - i), 0, -1)
            match = next(filter(None, (self._match(words, joined, i, i + length) for length in longest)), None)
            matches += [match] if match else []
            i = match.last if match else i + 1
        namings = []
        for last, match, following in zip([None, *matches], matches, [*matches[1:], None], strict=False):
            # The words around that belong to it: no mark is between, and in front no other match.
            before = [words[j] for j in _run(joined, match.first, -1, max(last.last if last else 0, match.first - 4))]
            behind = [words[j] for j in _run(joined, match.last - 1, 1, min(match.last + 2, len(words)))]
            if last and not (last.last == match.first and joined[match.first]):
                last = None
            if following and not (match.last == following.first and joined[match.last]):
                following = None
            word = words[match.last - 1]
            verb = following is not None and words[following.last - 1] in _VERBS
            if (
                match.categories
                and not _is_other(word, before, behind)
                and not (
                    word in _VERBS and ((last and last.is_person) or before[:1] in (["he"], ["she"], ["who"]))
                )  # "a man skis"
                and not (match.is_person and following and following.categories and not verb)  # "a baby elephant"
            ):
                count = next(filter(None, map(_number, before[:2])), None)
                if not match.several:
                    count = 1
                elif count == 1 and word not in _EITHER:  # "a few dogs"
                    count = None
                namings.append(Naming(places[match.first][0], places[match.last - 1][1], match.categories, count))
        return namings

    def _match(self, words: list[str], joined: list[bool], first: int, last: int) -> _Match | None:
        found = self._table.get(" ".join(words[first:last])) if all(joined[first + 1 : last]) else None
        return None if found is None else _Match(first, last, *found)


def _run(joined: list[bool], start: int, step: int, stop: int) -> Iterator[int]:
    """The words behind word `start` (`step` 1, to before `stop`) or in front of it (-1, to `stop`), as far as they are joined."""
    places = range(start + 1, stop) if step > 0 else range(start - 1, stop - 1, -1)
    return itertools.takewhile(lambda place: joined[place if step > 0 else place + 1], places)


def _is_other(word: str, before: list[str], behind: list[str]) -> bool:
    """Whether a word of the table means something else between these words, the nearest first."""
    previous, following = before[0] if before else "", behind[0] if behind else ""
    if following in _UNREAL_BEHIND or previous in _UNREAL_BEFORE:  # "a dog statue", "a toy train"
        return True
    if any(of == "of" and thing in _LIKENESSES for of, thing in itertools.pairwise(before)):  # "a statue of a man"
        return True
    adjective = bool(following) and following not in _BEHIND_NOUNS
    if word == "orange":  # "an orange and white cat", "dressed in orange"
        return adjective or (following == "and" and behind[-1] in _COLORS) or previous in _COLORS or previous == "in"
    return word == "remote" and adjective


def _number(word: str) -> int | None:
    return _NUMBERS.get(word) or (int(word) if word.isascii() and word.isdigit() and len(word) < 4 else None)
