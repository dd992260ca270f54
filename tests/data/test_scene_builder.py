# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes: masks, questions, chance answers, splits, co-occurrence and the command."""

import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import load_from_disk
from PIL import Image, ImageDraw
from scipy import ndimage

from agevlm import cli
from agevlm.data import scene_builder as scenes
from agevlm.data.scene_builder import KINDS, POSITIONS, build_scenes, load_cutouts, position_word
from agevlm.processing.rows import mask_from_rle

COLORS = {
    "apple": (255, 0, 0),
    "dog": (0, 255, 0),
    "hot_dog": (0, 0, 255),
    "umbrella": (255, 255, 0),
    "unicycle": (255, 0, 255),
    "hour-glass": (0, 255, 255),
    "key": (255, 255, 255),
}
WORDS = [word for row in POSITIONS for word in row]
SIZES = {"num_train": 60, "num_validation": 11, "num_test": 10}


def disc(color, size=96):
    """A disc of one color on a transparent background."""
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((4, 4, size - 5, size - 5), fill=(*color, 255))
    return image


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Seven cut-outs (discs of one color each) and eight photographs, of different grays and widths."""
    folder = tmp_path_factory.mktemp("inputs")
    cutouts, backgrounds = folder / "cutouts", folder / "backgrounds"
    cutouts.mkdir()
    backgrounds.mkdir()
    for name, color in COLORS.items():
        disc(color).save(cutouts / f"{name}.png")
    for i in range(8):
        Image.new("RGB", (150 + i, 130), (40 + 5 * i,) * 3).save(backgrounds / f"{i}.jpg")
    return cutouts, backgrounds


def build(inputs, output_dir, **options):
    options = {"image_size": 96, "max_objects": 3, "progress": False, **SIZES} | options
    return build_scenes(*inputs, output_dir, **options)


@pytest.fixture(scope="session")
def built(inputs, tmp_path_factory):
    """A small data set without occlusion, so that each object's mask is a whole disc."""
    return build(inputs, tmp_path_factory.mktemp("built") / "scenes", min_visible=1.0)


def text_of(message):
    return "".join(part["text"] or "" for part in message["content"])


def rows_of(splits, kind=None):
    for split in splits.values():
        for row in split:
            if kind in (None, row["kind"]):
                yield row


# --- masks ---


def test_position_word():
    for row, words in enumerate(POSITIONS):
        for column, word in enumerate(words):
            mask = np.zeros((90, 60), dtype=bool)
            mask[30 * row + 10 : 30 * row + 20, 20 * column + 5 : 20 * column + 15] = True
            assert position_word(mask, margin=0.1) == word
    border = np.zeros((90, 90), dtype=bool)
    border[10:20, 26:36] = True
    assert position_word(border) == "top"
    assert position_word(border, margin=0.02) is None
    assert position_word(np.zeros((9, 9), dtype=bool)) is None


# --- pictures ---


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_exactly_the_visible_pixels(seed):
    # One object to each color channel of a black image: a channel's brightness is then the share of its object.
    objects = [disc(COLORS[name]) for name in ("apple", "dog", "hot_dog")]
    rng = np.random.default_rng(seed)
    image, masks = scenes._compose(rng, Image.new("RGB", (96, 96)), objects, (0.4, 0.5), 0.5)
    for channel, mask in enumerate(masks):
        brightness = image[..., channel].astype(float)
        clear = np.abs(brightness - 127.5) > 1
        np.testing.assert_array_equal(mask[clear], brightness[clear] > 127.5)
        assert mask.sum() > 100
    assert (np.sum(masks, axis=0) <= 1).all()


def test_each_object_keeps_its_visible_part():
    occluded = 0
    for seed in range(30):
        objects = [disc(COLORS["apple"])] * 5
        _, masks = scenes._compose(np.random.default_rng(seed), Image.new("RGB", (96, 96)), objects, (0.35, 0.35), 0.6)
        for mask in masks:
            rows, columns = np.nonzero(mask)
            side = max(np.ptp(rows), np.ptp(columns)) + 1  # of at least the visible part's disc
            part = mask.sum() / (np.pi * side**2 / 4)
            occluded += part < 0.95
            assert part > 0.5
    assert occluded > 5


def test_objects_that_do_not_fit():
    with pytest.raises(ValueError, match="lower max_objects"):
        scenes._compose(
            np.random.default_rng(0), Image.new("RGB", (64, 64)), [disc(COLORS["dog"])] * 90, (0.4, 0.5), 1.0
        )


def test_positions_are_spread_over_the_image():
    rng = np.random.default_rng(0)
    words = Counter()
    for _ in range(900):
        _, (mask,) = scenes._compose(rng, Image.new("RGB", (96, 96)), [disc(COLORS["dog"])], (0.2, 0.4), 1.0)
        words[position_word(mask)] += 1
    assert min(words[word] for word in WORDS) > 60  # 100 each expected


# --- rows ---


def test_splits_and_columns(built):
    assert list(built) == ["train", "validation", "test"]
    for split, number in zip(built.values(), SIZES.values(), strict=True):
        assert split.features == scenes.scene_features()
        assert set(split["scene"]) == set(range(number))
        assert set(split["kind"]) == set(KINDS) - {"existence_popular", "existence_adversarial"}
        assert len({(row["scene"], row["kind"]) for row in split}) == len(split)
        for row in split:
            (image,) = row["images"]
            assert image.size == (96, 96)
            assert image.mode == "RGB"
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * len(row["answers"])
            parts = [[part["type"] for part in message["content"]] for message in row["messages"]]
            assert parts == [["image", "text"]] + [["text"]] * (len(parts) - 1)
            assert [text_of(message) for message in row["messages"][1::2]] == row["answers"]


def test_rows_of_a_scene_share_the_image(built):
    encoded = built["test"].cast_column("images", [ImageFeature(decode=False)])
    images = defaultdict(set)
    for row in encoded:
        images[row["scene"]].add(row["images"][0]["bytes"])
    assert all(len(same) == 1 for same in images.values())
    assert len(set.union(*images.values())) == SIZES["num_test"]


def test_spans_and_masks_point_to_the_named_objects(built):
    colors = {name.replace("_", " ").replace("-", " "): color for name, color in COLORS.items()}
    grounded = absent = 0
    for row in rows_of(built):
        image = np.asarray(row["images"][0], dtype=float)
        for entry in row["grounding"]:
            phrase = text_of(row["messages"][entry["message"]])[entry["start"] : entry["end"]]
            mask = mask_from_rle(entry["mask"])
            assert entry["image"] == 0
            assert mask.shape == image.shape[:2]
            assert entry["score"] is None
            if not mask.any():  # see `test_existence_rows`
                assert phrase in colors
                assert row["kind"] in ("existence", "negation")
                absent += 1
                continue
            # JPEG blurs the colors at the rim
            inner = ndimage.binary_erosion(mask, iterations=3)
            assert inner.any()
            assert np.abs(image[inner].mean(0) - colors[phrase]).max() < 25
            grounded += 1
    assert grounded > 300
    assert absent > 100


def test_existence_rows(built):
    present = {(id(split), row["scene"]): row for split in built.values() for row in split if row["kind"] == "objects"}
    for split in built.values():
        for row in split:
            if row["kind"] != "existence":
                continue
            names = present[id(split), row["scene"]]["answers"][0].split(", ")
            grounded = {entry["message"]: entry for entry in row["grounding"]}
            for i, answer in enumerate(row["answers"]):
                question = text_of(row["messages"][2 * i])
                article, name = question.removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)
                assert article == ("an" if name in ("apple", "umbrella", "hour glass") else "a")
                assert answer == ("Yes" if name in names else "No")
                assert question[grounded[2 * i]["start"] : grounded[2 * i]["end"]] == name
                assert mask_from_rle(grounded[2 * i]["mask"]).any() == (answer == "Yes")
            assert len(row["answers"]) <= 8


def test_object_rows(built):
    orders = Counter()
    for row in rows_of(built, "objects"):
        assert text_of(row["messages"][0]) == "Which objects are in the image?"
        names = row["answers"][0].split(", ")
        assert len(set(names)) == len(names) == len(row["grounding"])
        orders[names == sorted(names)] += len(names) > 1
    assert min(orders[True], orders[False]) > 10


def test_count_rows(built):
    for split in built.values():
        counts = Counter(answer for row in split if row["kind"] == "count" for answer in row["answers"])
        assert set(counts) == {"1", "2", "3"}
        assert max(counts.values()) - min(counts.values()) <= 1
    right = []
    for row in rows_of(built, "count"):
        (entry,) = row["grounding"]
        _, pieces = ndimage.label(mask_from_rle(entry["mask"]))
        assert pieces <= int(row["answers"][0])  # discs that touch are one piece
        right.append(pieces == int(row["answers"][0]))
    assert np.mean(right) > 0.8


def test_position_rows(built):
    asked = 0
    for row in rows_of(built, "position"):
        for i, (entry, answer) in enumerate(zip(row["grounding"], row["answers"], strict=True)):
            mask = mask_from_rle(entry["mask"])
            assert entry["message"] == 2 * i
            name = text_of(row["messages"][2 * i])[entry["start"] : entry["end"]]
            assert text_of(row["messages"][2 * i]) == f"Where is the {name}?"
            assert ndimage.label(mask)[1] == 1  # questions are about classes that appear once
            row_index, column_index = (int(3 * (center + 0.5) / 96) for center in ndimage.center_of_mass(mask))
            assert answer == POSITIONS[row_index][column_index]
            asked += 1
    assert asked > 60


# --- what the answers give away ---


@pytest.fixture(scope="session")
def plans():
    rng = np.random.default_rng(0)
    cooccurrence = scenes._Cooccurrence.draw(rng, [f"class {i}" for i in range(20)], strength=0.0)
    return scenes._plan_scenes(rng, cooccurrence, 6000, 4, 8)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("questions", [2, 8])
def test_yes_and_no_are_balanced_in_any_split(number, questions):
    for seed in range(20):
        for max_objects in (1, 3):
            rng = np.random.default_rng(seed)
            cooccurrence = scenes._Cooccurrence.draw(rng, ["a", "b", "c", "d"], strength=0.5 * (seed % 2))
            some = scenes._plan_scenes(rng, cooccurrence, number, max_objects, questions)
            answers = Counter(answer for plan in some for _, answer in plan.questions["existence"])
            assert answers[True] == answers[False] > 0
            for plan in some:
                asked = plan.questions["existence"]
                assert 1 <= len(asked) <= questions
                assert len({name for name, _ in asked}) == len(asked)
                assert all((name in plan.objects) == answer for name, answer in asked)
                assert 1 <= len(set(plan.objects)) <= max_objects


def test_yes_and_no_are_balanced_in_a_built_split(built):
    for split in built.values():
        answers = Counter(answer for row in split if row["kind"] == "existence" for answer in row["answers"])
        assert answers["Yes"] == answers["No"] > 0


def within_chance(answers):
    """Whether a share of yes is within four standard deviations of a half."""
    return abs(np.mean(answers) - 0.5) < 4 * 0.5 / np.sqrt(len(answers))


def test_class_place_and_history_do_not_tell_the_answer(plans):
    by_class, by_place, by_lead, by_last = (defaultdict(list) for _ in range(4))
    for plan in plans:
        lead, last = 0, None
        for place, (name, answer) in enumerate(plan.questions["existence"]):
            by_class[name].append(answer)
            by_place[place].append(answer)
            by_lead[lead].append(answer)
            by_last[last].append(answer)
            lead, last = lead + (1 if answer else -1), answer
    assert len(by_class) == 20
    assert len(by_place) == 8
    for groups in (by_class, by_place, by_lead, by_last):
        for key, answers in groups.items():
            assert within_chance(answers), (key, len(answers), np.mean(answers))


def test_classes_and_counts_are_equally_frequent(plans):
    present = Counter(name for plan in plans for name in set(plan.objects))
    counted = Counter(plan.counted for plan in plans)
    counts = Counter(plan.objects.count(plan.counted) for plan in plans)
    kinds = Counter(len(set(plan.objects)) for plan in plans)
    assert counts == {1: 2000, 2: 2000, 3: 2000}
    for counter, options in ((present, 20), (counted, 20), (kinds, 4)):
        expected = counter.total() / options
        assert len(counter) == options
        assert all(abs(number - expected) < 5 * np.sqrt(expected) for number in counter.values())
    # the number of classes, which the other objects show, does not predict the count
    for count in counts:
        mean = np.mean([len(set(plan.objects)) for plan in plans if plan.objects.count(plan.counted) == count])
        assert abs(mean - 2.5) < 0.12


@pytest.mark.parametrize(
    ("noun", "article"),
    [
        ("apple", "an"),
        ("dog", "a"),
        ("umbrella", "an"),
        ("unicorn", "a"),
        ("user", "a"),
        ("ukulele", "a"),
        ("utensil", "a"),
        ("euro", "a"),
        ("hour glass", "an"),
        ("honey", "a"),
        ("house", "a"),
        ("Eagle", "an"),
        ("onion", "an"),
    ],
)
def test_article(noun, article):
    assert scenes._article(noun) == article


# --- splits, seeds, files ---


@pytest.mark.parametrize("number", [3, 4, 14, 40])
def test_photographs_are_dealt_out_without_overlap(number):
    names = [str(i) for i in range(number)]
    parts = scenes._split_backgrounds(names, np.random.default_rng(number))
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert len(parts[0]) >= len(parts[1]) == len(parts[2]) >= 1


def test_splits_are_drawn_on_different_photographs(inputs, tmp_path, monkeypatch):
    used = []
    draw_background = scenes._draw_background
    monkeypatch.setattr(
        scenes,
        "_draw_background",
        lambda rng, photograph, size: used.append(photograph.width) or draw_background(rng, photograph, size),
    )
    build(inputs, tmp_path / "scenes", image_size=64)
    ends = np.cumsum(list(SIZES.values()))
    train, validation, test = (set(part) for part in np.split(used, ends[:-1]))
    assert (len(train), len(validation), len(test)) == (6, 1, 1)
    assert len(train | validation | test) == 8


def read_all(folder):
    """The content of all files; the card, which has the folder's name, with another name."""
    files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        path: data.replace(folder.name.encode(), b"NAME") if path.suffix == ".md" else data
        for path, data in files.items()
    }


def test_plans_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "import numpy as np; from agevlm.data import scene_builder as scenes; rng = np.random.default_rng(0);"
        "names = [f'class {i}' for i in range(12)];"
        "print(scenes._plan_scenes(rng, scenes._Cooccurrence.draw(rng, names, 0.5), 50, 3, 8))"
    )
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in "012"
    }
    assert len(plans) == 1
    assert "_Plan" in plans.pop()


def test_same_seed_same_bytes(inputs, tmp_path):
    first = build(inputs, tmp_path / "first", seed=3)
    build(inputs, tmp_path / "second", seed=3)
    other = build(inputs, tmp_path / "third", seed=4)
    assert read_all(tmp_path / "first") == read_all(tmp_path / "second")
    assert first["train"]["messages"] != other["train"]["messages"]
    texts = [[text_of(row["messages"][0]) for row in split][:20] for split in first.values()]
    assert texts[0] != texts[1] != texts[2]


def test_reads_back_from_disk(inputs, tmp_path):
    built = build(inputs, tmp_path / "new" / "scenes", attribution="by me\n")
    read = load_from_disk(tmp_path / "new" / "scenes")
    assert read["test"][:] == built["test"][:]
    assert (tmp_path / "new" / "scenes" / "ATTRIBUTION.md").read_text() == "by me\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scenes"]


def test_an_empty_output_folder_is_used(inputs, tmp_path):
    (tmp_path / "scenes").mkdir()
    build(inputs, tmp_path / "scenes", num_train=3, num_validation=1, num_test=1)
    assert (tmp_path / "scenes" / "dataset_dict.json").is_file()


def test_classes_are_chosen(inputs, tmp_path):
    chosen = ["hot dog", "key", "apple", "dog"]
    built = build(inputs, tmp_path / "scenes", classes=chosen, num_train=20)
    names = {name for row in rows_of(built, "objects") for name in row["answers"][0].split(", ")}
    assert names == set(chosen)


def test_transparent_backgrounds_are_composited_on_white(tmp_path):
    for i in range(3):
        Image.new("RGBA", (30, 20), (200, 0, 0, 0)).save(tmp_path / f"{i}.png")
    for image in scenes._load_backgrounds(tmp_path, 64).values():
        assert image.getcolors() == [(30 * 20, (255, 255, 255))]


def test_sub_folders_are_classes(tmp_path):
    (tmp_path / "red_fruit").mkdir()
    disc((255, 0, 0)).save(tmp_path / "red_fruit" / "1.png")
    disc((250, 0, 0)).save(tmp_path / "red_fruit" / "2.webp")
    disc((0, 0, 0), size=2000).save(tmp_path / "ball.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no cut-out")
    read = load_cutouts(tmp_path)
    assert {name: len(images) for name, images in read.items()} == {"ball": 1, "red fruit": 2}
    assert max(read["ball"][0].size) == 512
    assert read["red fruit"][0].getchannel("A").getbbox() == (0, 0, *read["red fruit"][0].size)


# --- what goes wrong leaves nothing behind ---


def damage_photograph(cutouts, backgrounds, monkeypatch):
    data = (backgrounds / "3.jpg").read_bytes()
    (backgrounds / "3.jpg").write_bytes(data[: len(data) // 2])


def damage_cutout(cutouts, backgrounds, monkeypatch):
    (cutouts / "dog.png").write_bytes(b"no image")


def remove_alpha(cutouts, backgrounds, monkeypatch):
    Image.open(cutouts / "dog.png").convert("RGB").save(cutouts / "dog.png")


def remove_object(cutouts, backgrounds, monkeypatch):
    Image.new("RGBA", (9, 9)).save(cutouts / "dog.png")


def remove_files(of):
    def remove(cutouts, backgrounds, monkeypatch):
        for path in (cutouts if of == "cutouts" else backgrounds).iterdir():
            path.unlink()

    return remove


def remove_folder(of):
    def remove(cutouts, backgrounds, monkeypatch):
        (cutouts if of == "cutouts" else backgrounds).rename(cutouts.parent / "elsewhere")

    return remove


def keep_two_photographs(cutouts, backgrounds, monkeypatch):
    for path in sorted(backgrounds.iterdir())[2:]:
        path.unlink()


def lower_pixel_limit(times):
    def lower(cutouts, backgrounds, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 130 * 150 // times)
        for path in cutouts.iterdir():
            disc((0, 0, 0), size=16).save(path)

    return lower


def add_name(name):
    def add(cutouts, backgrounds, monkeypatch):
        disc((0, 0, 0)).save(cutouts / name)

    return add


def stop_while_drawing(cutouts, backgrounds, monkeypatch):
    compose = scenes._compose
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) > 30:
            raise KeyboardInterrupt("stopped")
        return compose(*args)

    monkeypatch.setattr(scenes, "_compose", stop)


def nothing(cutouts, backgrounds, monkeypatch):
    pass


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (damage_photograph, {}, ValueError, "Cannot read image .*3.jpg"),
        (damage_cutout, {}, ValueError, "Cannot read image .*dog.png"),
        (remove_alpha, {}, ValueError, "dog.png has no transparency"),
        (remove_object, {}, ValueError, "dog.png is completely transparent"),
        (remove_files("cutouts"), {}, FileNotFoundError, "no cut-outs in .*cutouts"),
        (remove_files("backgrounds"), {}, ValueError, "0 background photographs .* at least 3"),
        (remove_folder("cutouts"), {}, FileNotFoundError, "no such folder: .*cutouts"),
        (remove_folder("backgrounds"), {}, FileNotFoundError, "no such folder: .*backgrounds"),
        (keep_two_photographs, {}, ValueError, "2 background photographs .* at least 3"),
        (lower_pixel_limit(1), {}, ValueError, r"\.jpg'.*(exceed the limit|exceeds limit)"),
        (lower_pixel_limit(4), {}, ValueError, r"\.jpg'.*(exceed the limit|exceeds limit)"),
        (add_name("_.png"), {}, ValueError, "_.png gives an invalid class name"),
        (add_name("a,b.png"), {}, ValueError, "a,b.png gives an invalid class name"),
        (stop_while_drawing, {}, KeyboardInterrupt, "stopped"),
        (nothing, {"classes": ["hotdog", "dog"]}, ValueError, "class 'hotdog' .* did you mean: hot dog"),
        (nothing, {"classes": ["xyz"]}, ValueError, "class 'xyz' .* did you mean: apple, dog"),
        (nothing, {"classes": ["dog", "apple", "key"]}, ValueError, "3 classes for max_objects=3"),
        (nothing, {"max_objects": 7}, ValueError, "7 classes for max_objects=7"),
        (nothing, {"num_test": 0}, ValueError, "num_test is 0, but must be at least 1"),
        (nothing, {"image_size": 8}, ValueError, "image_size is 8"),
        (nothing, {"max_objects": 0}, ValueError, "max_objects is 0"),
        (nothing, {"questions_per_scene": 1}, ValueError, "questions_per_scene is 1"),
        (nothing, {"object_size": (0.4, 0.2)}, ValueError, "object_size is"),
        (nothing, {"object_size": (0.4, 0.9)}, ValueError, "object_size is"),
        (nothing, {"min_visible": 0}, ValueError, "min_visible is 0"),
        (nothing, {"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_bad_input_leaves_nothing_behind(inputs, tmp_path, monkeypatch, spoil, options, error, message):
    copies = []
    for folder in inputs:
        copies.append(tmp_path / "in" / folder.name)
        copies[-1].mkdir(parents=True)
        for path in folder.iterdir():
            (copies[-1] / path.name).write_bytes(path.read_bytes())
    spoil(*copies, monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        build(copies, tmp_path / "out" / "scenes", **options)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_output_is_kept(inputs, tmp_path, kind):
    output = tmp_path / "scenes"
    kept = output / "kept" if kind == "folder" else output
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another output folder or delete it"):
        build(inputs, output)
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [output]


# --- libraries ---


@pytest.mark.parametrize("module", ["datasets", "pycocotools.mask"])
def test_missing_library(inputs, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install datasets pycocotools"):
        build(inputs, tmp_path / "scenes")
    assert not list(tmp_path.iterdir())


def test_import_is_light():
    code = (
        "import sys, agevlm.data.scene_builder;print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_are_jpeg(built):
    encoded = built["test"].cast_column("images", [ImageFeature(decode=False)])[0]["images"][0]["bytes"]
    assert Image.open(io.BytesIO(encoded)).format == "JPEG"


# --- co-occurrence: frequent classes and companions ---


@pytest.fixture(scope="session")
def cooccurrence(inputs, tmp_path_factory):
    """Scenes whose classes are not equally frequent, and of classes that no other split shows."""
    return build_scenes(
        *inputs,
        tmp_path_factory.mktemp("cooccurrence") / "scenes",
        num_train=150,
        num_validation=20,
        num_test=40,
        num_zero_shot=20,
        image_size=96,
        max_objects=2,
        zero_shot_classes=3,
        cooccurrence=0.5,
        progress=False,
    )


def classes_shown(split):
    """By scene: the answer to "Which objects are in the image?"."""
    return {row["scene"]: set(row["answers"][0].split(", ")) for row in split if row["kind"] == "objects"}


def existence_questions(split, kind):
    """By scene: the classes of the questions, and the answers."""
    return {
        row["scene"]: [
            (re.fullmatch(r"Is there an? (.*) in the image\?", text_of(question))[1], answer)
            for question, answer in zip(row["messages"][::2], row["answers"], strict=True)
        ]
        for row in split
        if row["kind"] == kind
    }


@pytest.mark.parametrize("kind", ["existence_popular", "existence_adversarial"])
def test_pope_questions_are_about_frequent_and_cooccurring_absent_classes(cooccurrence, kind):
    shown = list(classes_shown(cooccurrence["train"]).values())
    frequency = Counter(name for names in shown for name in names)
    pair_frequency = Counter(pair for names in shown for pair in itertools.permutations(names, 2))
    known = {name for names in shown for name in names}
    assert kind not in cooccurrence["train"]["kind"]
    for split in (cooccurrence["validation"], cooccurrence["test"]):
        present = classes_shown(split)
        for scene, questions in existence_questions(split, kind).items():
            classes = present[scene]
            assert {name for name, answer in questions if answer == "Yes"} == classes
            absent = [name for name, answer in questions if answer == "No"]
            assert len(absent) == min(len(classes), len(known - classes))
            score = {
                "existence_popular": lambda name: frequency[name],
                "existence_adversarial": lambda name: sum(pair_frequency[name, other] for other in classes),  # noqa: B023
            }[kind]
            others = known - classes - set(absent)
            assert not others or min(map(score, absent)) >= max(map(score, others))


def test_negation_is_the_reverse_of_existence(cooccurrence):
    existence = {
        (scene, name): answer
        for scene, asked in existence_questions(cooccurrence["test"], "existence").items()
        for name, answer in asked
    }
    turned = {"Yes": "No", "No": "Yes"}
    asked = 0
    for row in cooccurrence["test"]:
        if row["kind"] == "negation":
            for question, answer, entry in zip(row["messages"][::2], row["answers"], row["grounding"], strict=True):
                name = re.fullmatch(r"Is there no (.*) in the image\?", text_of(question))[1]
                assert existence[row["scene"], name] == turned[answer]
                assert text_of(question)[entry["start"] : entry["end"]] == name
                assert mask_from_rle(entry["mask"]).any() == (answer == "No")
                asked += 1
    assert asked == len(existence) > 0


def test_relations_are_those_of_the_masks(cooccurrence):
    answers = Counter()
    for row in cooccurrence["train"]:
        for message, answer in (
            zip(row["messages"][::2], row["answers"], strict=True) if row["kind"] == "relation" else ()
        ):
            number = row["messages"].index(message)
            first, second = (
                np.argwhere(mask_from_rle(entry["mask"])).mean(0)
                for entry in row["grounding"]
                if entry["message"] == number
            )
            axis = 0 if "above" in text_of(message) else 1
            assert answer == (("above", "below"), ("left", "right"))[axis][int(first[axis] > second[axis])]
            answers[answer] += 1
    assert set(answers) == {"above", "below", "left", "right"}


def test_zero_shot_classes_are_in_no_other_split(cooccurrence):
    zero_shot = set().union(*classes_shown(cooccurrence["zero_shot"]).values())
    zero_shot |= {
        name for asked in existence_questions(cooccurrence["zero_shot"], "existence").values() for name, _ in asked
    }
    assert len(zero_shot) == 3
    for name in ("train", "validation", "test"):
        split = cooccurrence[name]
        known = set().union(*classes_shown(split).values())
        for kind in ("existence", "existence_popular", "existence_adversarial"):
            known |= {name for asked in existence_questions(split, kind).values() for name, _ in asked}
        assert len(known) == len(COLORS) - 3
        assert not known & zero_shot


def test_classes_are_unequally_frequent_and_companions_appear_together():
    rng = np.random.default_rng(1)
    names = [f"class {i}" for i in range(30)]
    cooccurrence = scenes._Cooccurrence.draw(rng, names, strength=0.6)
    drawn = [cooccurrence.draw_present(rng, 3) for _ in range(3000)]
    frequencies = Counter(name for names in drawn for name in names).most_common()
    assert frequencies[0][1] > 2 * frequencies[-1][1]
    with_companion = np.mean([bool(set(names[1:]) & set(cooccurrence.companions[names[0]])) for names in drawn])
    assert with_companion > 0.6  # by chance 4 of 29, twice: about a quarter
    assert all(len(set(names)) == 3 for names in drawn)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cooccurrence": 1.5}, "cooccurrence is 1.5"),
        ({"zero_shot_classes": 2, "num_zero_shot": 5}, "zero-shot classes"),
    ],
)
def test_impossible_cooccurrence_is_refused(inputs, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        build_scenes(*inputs, tmp_path / "out", num_train=2, num_validation=1, num_test=1, image_size=96, **wrong)


# --- the command ---


def run_command(monkeypatch, inputs, out, *options):
    folders = {"--cutouts": inputs[0], "--backgrounds": inputs[1], "--out": out}
    named = [str(part) for pair in folders.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["agevlm", "scenes", *named, *options])
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(cli.main())
    return exit_info.value.code or 0


def test_command_builds_what_the_function_builds(inputs, tmp_path, monkeypatch):
    options = {
        "num_train": 6,
        "num_validation": 2,
        "num_test": 2,
        "num_zero_shot": 2,
        "image_size": 96,
        "max_objects": 2,
        "questions_per_scene": 4,
        "zero_shot_classes": 3,
        "cooccurrence": 0.5,
        "object_size": (0.3, 0.45),
        "min_visible": 1.0,
        "seed": 3,
    }
    command = [
        text
        for name, value in options.items()
        for text in (
            f"--{name.removeprefix('num_').replace('_', '-')}",
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
        )
    ]
    assert run_command(monkeypatch, inputs, tmp_path / "command", *command) == 0
    build_scenes(*inputs, tmp_path / "function", **options, progress=False)
    assert read_all(tmp_path / "command") == read_all(tmp_path / "function")
    assert set(load_from_disk(tmp_path / "command")) == {"train", "validation", "test", "zero_shot"}
    for name in ("cooccurrence", "object_size", "min_visible"):  # each of them matters
        fewer = {key: value for key, value in options.items() if key != name}
        build_scenes(*inputs, tmp_path / name, **fewer, progress=False)
        assert read_all(tmp_path / name) != read_all(tmp_path / "function"), name


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--object-size", "0.3", "--object-size must be two numbers, as 0.18,0.38, got '0.3'"),
        ("--object-size", "0.3,big", "--object-size must be numbers with commas between them"),
        ("--object-size", "0.4,0.3", "object_size is (0.4, 0.3), but must be two increasing numbers"),
        ("--min-visible", "0", "min_visible is 0.0, but must be in (0, 1]"),
        ("--cooccurrence", "2", "cooccurrence is 2.0, but must be in [0, 1]"),
        ("--zero-shot", "3", "0 zero-shot classes for max_objects=4"),
    ],
)
def test_mistakes_in_the_options(inputs, tmp_path, monkeypatch, capsys, option, value, message):
    assert run_command(monkeypatch, inputs, tmp_path / "out", option, value) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())
