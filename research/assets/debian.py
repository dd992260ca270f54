# SPDX-License-Identifier: Apache-2.0
"""Photographic cut-outs and backgrounds for grounded scenes, from two packages of Debian.

    python -m research.assets.debian photographs

writes `photographs/cutouts` from `tuxpaint-stamps-default` (photographs of animals, food, tools, vehicles and more) and
`photographs/backgrounds` from `gcompris-qt-data` (photographs of places), the inputs of `agevlm scenes`. Neither package is
on PyPI. Debian and systems based on it download them with apt, without installing them. On other systems download them by
hand and name their folder with `--packages`.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from agevlm.files import new_folder, unfinished_folder
from agevlm.processing.image_processing_agevlm import load_image, to_rgb

PACKAGES = ("tuxpaint-stamps-default", "gcompris-qt-data")

# The photographic stamps by class, as paths below `stamps/` without their suffix. The classes are nouns in the package's
# captions ("A pair of cherries.", "Eat your broccoli!"). No class is a kind of another, so that a question about a class has
# one right answer; ambiguous stamps are left out.
STAMPS = {
    "airplane": ["vehicles/flight/planes/747"],
    "almond": ["food/nuts/almond"],
    "anemone": ["plants/flowers/anemone_red"],
    "antelope": ["animals/mammals/bovines/indian_blackbuck"],
    "apple": [f"food/fruit/apple_{kind}" for kind in ("fuji", "granny_smith", "green", "red", "sierra_beauty")],
    "apricot": ["food/fruit/Apricot_whole", "food/fruit/apricot"],
    "astronaut": ["space/spacewalk"],
    "avocado": ["food/fruit/avocado"],
    "badger": ["animals/mammals/badger"],
    "banana": ["food/fruit/banana"],
    "bandage": ["medical/bandage_adhesive"],
    "basketball": ["sports/basketball"],
    "bassoon": ["hobbies/music/wind/bassoon"],
    "bear": ["animals/mammals/bears/bear", "animals/mammals/bears/european-bear"],
    "beaver": ["animals/mammals/rodents/beaver"],
    "bell pepper": ["food/vegetables/pepper", "food/vegetables/yellowpepper"],
    "bison": ["animals/mammals/bovines/bison"],
    "broccoli": ["food/vegetables/broccoli"],
    "bull": ["animals/mammals/bovines/bull"],
    "bunch of grapes": ["food/fruit/grapes"],
    "bus": ["vehicles/masstransit/green_korean_bus"],
    "butterflyfish": ["animals/fish/butterflyfish"],
    "camel": ["animals/mammals/camel/camel", "animals/mammals/camel/dromedary"],
    "camera": ["hobbies/camera_35mm"],
    "candle": ["seasonal/candle"],
    "candy cane": ["seasonal/christmas/Candy_cane_photo_1", "seasonal/christmas/Candy_cane_photo_2"],
    "capybara": ["animals/mammals/rodents/capybara"],
    "car": ["vehicles/auto/beetle", "vehicles/auto/sedan", "vehicles/auto/sportscar2"],
    "carrot": ["food/vegetables/carrot"],
    "cello": ["hobbies/music/string/cello"],
    "cement mixer": ["household/tools/cementmixer"],
    "chili": ["food/vegetables/chilepepper"],
    "chimpanzee": ["animals/mammals/apes/chimp"],
    "christmas tree": ["seasonal/christmas/Christmas_Tree_photo"],
    "clownfish": ["animals/fish/clownfish"],
    "corn cob": ["food/vegetables/corn"],
    "cow": ["animals/mammals/bovines/cow", "animals/mammals/bovines/cow_white"],
    "crane": ["animals/birds/crowned_crane"],
    "cricket ball": ["sports/cricketball"],
    "crow": ["animals/birds/crow"],
    "cymbal": ["hobbies/music/percussion/cymbal_crash"],
    "daffodil": ["plants/flowers/daffodil"],
    "deer": ["animals/mammals/deer/deer", "animals/mammals/deer/doe", "animals/mammals/deer/wapiti"],
    "dog": ["animals/mammals/dogs/dog"],
    "doll": ["people/toys/grannysmith"],
    "dolphin": ["animals/mammals/aquatic/dolphin"],
    "donkey": ["animals/mammals/equines/donkey", "animals/mammals/equines/donkey_eating"],
    "drum": ["hobbies/music/percussion/drum_tomtom_floor"],
    "duck": ["animals/birds/duck", "animals/birds/drake"],
    "eggplant": ["food/vegetables/eggplant"],
    "elephant": ["animals/mammals/elephant"],
    "ferret": ["animals/mammals/ferret"],
    "fighter jet": ["military/vehicles/f22_raptor"],
    "fire truck": ["vehicles/emergency/firetruck"],
    "flamingo": ["animals/birds/pink_flamingo"],
    "fly": ["animals/insects/fly"],
    "football": ["sports/football"],
    "fox": ["animals/mammals/dogs/fox"],
    "frog": ["animals/amphibians/frog-1", "animals/amphibians/frog"],
    "garbage can": ["household/garbagecan"],
    "garbage truck": ["vehicles/garbagetruck"],
    "garlic bulb": ["food/vegetables/garlic"],
    "gas cylinder": ["household/cylinder"],
    "giraffe": ["animals/mammals/giraffe"],
    "glass": ["household/dishes/glass"],
    "gnu": [f"animals/mammals/bovines/gnu-{kind}" for kind in ("baby-stand", "baby", "sitting", "stand")],
    "goat": ["animals/mammals/bovines/goat"],
    "goose": ["animals/birds/gander"],
    "gorilla": ["animals/mammals/apes/gorilla"],
    "grasshopper": ["animals/insects/grasshopper"],
    "guinea fowl": ["animals/birds/guineafowl", "animals/birds/helmeted_guineafowl"],
    "guitar": [f"hobbies/music/string/guitar{kind}" for kind in ("2", "_classical", "_electric", "_electric_bass")],
    "hammer": ["household/tools/hammer"],
    "hen": ["animals/birds/hen"],
    "heron": ["animals/birds/heron_greatblue", "animals/birds/heron_greatblue_flying"],
    "hibiscus": ["plants/flowers/chemparathi", "plants/flowers/flower10"],
    "hippopotamus": ["animals/mammals/hippopotamus"],
    "hornet": ["animals/insects/hornet"],
    "horse": ["animals/mammals/equines/horse"],
    "hot air balloon": ["vehicles/flight/balloon360"],
    "iguana": ["animals/lizards/iguana"],
    "iris": ["plants/flowers/iris"],
    "kangaroo": ["animals/marsupials/kangaroo"],
    "kettle": ["household/kettle"],
    "key": ["household/key"],
    "kiwi": ["food/fruit/kiwi"],
    "koala": ["animals/marsupials/koala"],
    "lark": ["animals/birds/lark"],
    "lemon": ["food/fruit/lemon"],
    "lettuce": ["food/vegetables/lettuce", "food/vegetables/redlettuce"],
    "light bulb": ["household/Lightbulb"],
    "lime": ["food/fruit/sliced_lime"],
    "lion": ["animals/mammals/cats/lion-2", "animals/mammals/cats/lion"],
    "lionfish": ["animals/fish/lionfish"],
    "lobster": ["animals/fish/lobster"],
    "magpie": ["animals/birds/magpie"],
    "mailbox": ["town/usps_mailbox", "town/uk_post_box"],
    "mango": ["food/fruit/mango"],
    "mantis": ["animals/insects/mantis"],
    "marigold": ["plants/flowers/marigold"],
    "marmot": ["animals/mammals/rodents/marmot"],
    "moth": ["animals/insects/xanthia"],
    "mouse": ["animals/mammals/rodents/mouse"],
    "mug": ["household/dishes/mug"],
    "mushroom": [
        "food/vegetables/mushroom",
        *(f"plants/mushrooms/cep{kind}" for kind in ("", "-1", "-2")),
    ],
    "nutcracker": ["household/dishes/utensils/nutcracker"],
    "onion": ["food/vegetables/onion"],
    "orange": ["food/fruit/mandarine", "food/fruit/orange"],
    "orca": ["animals/mammals/aquatic/orca"],
    "ostrich": ["animals/birds/ostrich"],
    "otter": ["animals/mammals/aquatic/otter"],
    "owl": ["animals/birds/owl"],
    "paintbrush": ["household/tools/paintbrush_large"],
    "pair of binoculars": ["hobbies/binoculars"],
    "pair of pliers": ["household/tools/plyers"],
    "pair of scissors": ["household/arttools/scissors_small_open"],
    "palm tree": ["plants/trees/liberia-palm"],
    "parachute": ["military/paratrooper"],
    "parrot": ["animals/birds/adelaide-rosella", "animals/birds/rainbow-lorikeet"],
    "peacock": ["animals/birds/peacock"],
    "pear": ["food/fruit/pear"],
    "pecan": ["food/nuts/pecan"],
    "pelican": ["animals/birds/pelican"],
    "penguin": [f"animals/birds/{kind}penguin" for kind in ("little-", "magellanic_", "")],
    "pepper mill": ["household/dishes/utensils/pepper_grinder"],
    "petunia": ["plants/flowers/whitestar-petunia"],
    "pickup truck": ["vehicles/auto/truck"],
    "pie": ["seasonal/christmas/Mince_Pie"],
    "pig": [f"animals/mammals/pig{kind}" for kind in ("", "_golden", "_golden2")],
    "pigeon": ["animals/birds/pigeon"],
    "pineapple": ["food/fruit/pineapple"],
    "pinecone": ["plants/trees/pinecone"],
    "pitcher": ["household/dishes/pitcher_small"],
    "pomegranate": ["food/fruit/pomegranate"],
    "potato": ["food/vegetables/potato"],
    "pudding": ["seasonal/christmas/Christmas_pudding"],
    "pumpkin": ["food/vegetables/pumpkin_small"],
    "quetzal": ["animals/birds/quetzal"],
    "rabbit": ["animals/mammals/rabbit_little", *(f"animals/mammals/rodents/rabbit{kind}" for kind in ("", "-2"))],
    "raspberry": ["food/fruit/raspberry"],
    "reindeer": ["animals/mammals/deer/caribou"],
    "rhinoceros": ["animals/mammals/rhino_black"],
    "rooster": ["animals/birds/rooster"],
    "rose": ["plants/flowers/rose"],
    "sailboat": ["vehicles/ship/walnutBoat", "vehicles/ship/chineseJunk"],
    "saw": ["household/tools/saw"],
    "seagull": ["animals/birds/seagull", "animals/birds/silver-gull"],
    "seahorse": ["animals/fish/seahorse"],
    "sheep": ["animals/mammals/bovines/sheep", "animals/mammals/bovines/sheep_lamb"],
    "shell": ["animals/shellfish/abalone", "animals/shellfish/murray-mussel"],
    "slug": ["animals/insects/Brown_slug"],
    "soccer ball": ["sports/soccer"],
    "spade": ["household/tools/spade"],
    "squirrel": ["animals/mammals/rodents/squirrel"],
    "stethoscope": ["medical/stethoscope"],
    "stop sign": ["town/roadsigns/stop"],
    "strawberry": ["food/fruit/Strawberry2", "food/fruit/strawberry"],
    "syringe": ["medical/syringe"],
    "tank": ["military/vehicles/bradley", "military/vehicles/infantry-stryker", "military/vehicles/ww2_german_gun"],
    "tape measure": ["household/tools/measuring_tape"],
    "teapot": ["household/dishes/teapot"],
    "tennis ball": ["sports/tennis_ball"],
    "tennis racket": ["sports/tennis_racket"],
    "thermometer": ["medical/mercurythermometer"],
    "tiger": ["animals/mammals/cats/tiger", "animals/mammals/cats/tiger_sumatran"],
    "toilet": ["household/toilet"],
    "tomato": ["food/vegetables/tomato"],
    "toolbox": ["household/tools/toolbox"],
    "toucan": ["animals/birds/tucan"],
    "traffic cone": ["town/roadsigns/traffic_cone"],
    "tricycle": ["vehicles/cycle/pink_tricycle"],
    "trophy": ["sports/trophy_cup"],
    "trumpet": ["hobbies/music/brass/trumpet"],
    "turkey": ["animals/birds/turkey"],
    "violin": ["hobbies/music/string/violin"],
    "vulture": ["animals/birds/vulture"],
    "walnut": ["food/nuts/walnut"],
    "whale": ["animals/mammals/aquatic/whale"],
    "wheel": ["vehicles/7spoke256", "vehicles/wheel_tractor"],
    "wild boar": ["animals/mammals/wildboar"],
    "wombat": ["animals/marsupials/wombat"],
    "woodlouse": ["animals/insects/Woodlouse"],
    "wreath": ["seasonal/christmas/xmaswreath"],
    "wrench": [f"household/tools/wrench{kind}" for kind in ("", "_adjustable", "_plumbers")],
    "yak": ["animals/mammals/bovines/yak"],
    "zebra": ["animals/mammals/equines/zebra"],
}

# The photographs of places, by the Qt resource file that holds them. None shows an object of a class above.
PHOTOGRAPHS = {
    "clickgame": ["sea1", "sea2", "sea3", "sea4", "sea5", "sea6"],
    "details": [
        *("Chenonceau", "EgeskovSlotSpejling", "EilanDonanCastle", "FanoeWindmill", "GizahPyramids", "NDP", "Nagoya"),
        *("Neuschwanstein", "OperaSidney", "TajMahal", "TowerBridgeLondon"),
    ],
    "explore_monuments": [
        *(
            "bentPyramid",
            "greatPyramidOfGiza",
            "meidumPyramid",
            "redPyramid",
            "arlesAmphitheater",
            "chateaudeChambord",
        ),
        *("chateaudeChenonceau", "citedeCarcassonne", "eiffelTower", "montStMichel", "palaisdesPapes", "pontduGard"),
        *("reimsCathedral", "rocamadour", "aulaPalatina", "berlinCathedral", "brandenburgGate", "schwerinPalace"),
        *(
            "trierImperialBaths",
            "wormsCathedral",
            "ajantaCave",
            "charminar",
            "goldenTemple",
            "greatStupa",
            "hawaMahal",
        ),
        *("konarkSunTemple", "mysorePalace", "qutubMinar", "rangGhar", "victoriaMemorial", "canyondeChelly"),
        *("castillodeSanMarcos", "fortSumter", "georgeWashingtonBirthplace", "lincolnMemorial", "mountRushmore"),
        *("navajo", "chichenItza", "christTheRedeemer", "colosseum", "greatWallofChina", "machuPicchu", "petra"),
    ],
}


def unpack_package(deb: str | Path, output_dir: str | Path) -> Path:
    """Unpack a Debian package.

    Args:
        deb: the `.deb` file.
        output_dir: folder to write; it appears only when complete.

    Returns:
        `output_dir`. The package's data are in its `usr/share`.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        FileNotFoundError: if there is no such file, or the program `dpkg-deb` is not installed.
        ValueError: if the file is not a Debian package.
    """
    if not Path(deb).is_file():
        raise FileNotFoundError(f"no such file: {deb}")
    program = shutil.which("dpkg-deb")
    if program is None:
        raise FileNotFoundError("dpkg-deb is not installed; install your system's package dpkg")
    with new_folder(output_dir) as partial:
        done = subprocess.run([program, "--extract", str(deb), str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{deb} cannot be unpacked: {done.stderr.strip()}")
    return Path(output_dir)


def read_resources(file: str | Path) -> Iterator[tuple[str, bytes]]:
    """The files in a compiled Qt resource file (`.rcc`, format versions 1 to 3), as paths and contents.

    Qt's `rcc` tool writes, in big-endian numbers: a header with the offsets of three tables; a tree of nodes (a folder has its
    number of children and the index of the first one, a file has its offset in the data); the data, in which each file
    follows its length; and the names in UTF-16.

    Raises:
        ValueError: if the file is not of this format, or a file in it is compressed by another method than zlib.
    """
    content = Path(file).read_bytes()
    if content[:4] != b"qres":
        raise ValueError(f"{file} is not a compiled Qt resource file")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_size = 14 if version == 1 else 22

    def walk(node: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags = struct.unpack_from(">IH", content, tree + node * node_size)
        path = parent
        if node:
            (length,) = struct.unpack_from(">H", content, names + name_at)
            start = names + name_at + 6  # after the length and the name's hash
            path = f"{parent}/{content[start : start + 2 * length].decode('utf-16-be')}"
        if flags & 2:  # a folder
            children, first = struct.unpack_from(">2I", content, tree + node * node_size + 6)
            for child in range(first, first + children):
                yield from walk(child, path)
            return
        (place,) = struct.unpack_from(">I", content, tree + node * node_size + 10)
        (length,) = struct.unpack_from(">I", content, data + place)
        start = data + place + 4
        packed = content[start : start + length]
        if flags & 4:
            raise ValueError(f"{path} in {file} is compressed with zstd, which is not supported")
        yield path, zlib.decompress(packed[4:]) if flags & 1 else packed  # after 4 bytes with the unpacked length

    try:
        yield from walk(0, "")
    except (struct.error, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def export_stamps(package: str | Path, output_dir: str | Path) -> dict[str, list[Path]]:
    """Write the photographic stamps as cut-outs for `build_scenes`: RGBA PNG files, `<class>/<number>.png`.

    Args:
        package: the folder in which `tuxpaint-stamps-default` was unpacked.
        output_dir: folder to write; it appears only when complete. Its `ATTRIBUTION.md` holds the package's terms.

    Returns:
        the files by class, a key of `STAMPS`.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        FileNotFoundError: if a stamp is missing.
    """
    root = Path(package) / "usr/share/tuxpaint/stamps"
    files: dict[str, list[Path]] = {}
    with new_folder(output_dir) as partial:
        for name, stamps in STAMPS.items():
            (partial / name).mkdir()
            for number, stamp in enumerate(stamps):
                source = root / f"{stamp}.png"
                if not source.is_file():
                    raise FileNotFoundError(f"{source} is missing; unpack the package's current version")
                with Image.open(source) as image:
                    image.convert("RGBA").save(partial / name / f"{number}.png")
                files.setdefault(name, []).append(Path(output_dir) / name / f"{number}.png")
        _write_attribution(partial, Path(package), "Objects: stamps of Tux Paint", PACKAGES[0])
    return files


def export_places(package: str | Path, output_dir: str | Path) -> list[Path]:
    """Write the photographs of places as backgrounds for `build_scenes`: RGB PNG files, `<name>.png`.

    Args:
        package: the folder in which `gcompris-qt-data` was unpacked.
        output_dir: folder to write; it appears only when complete. Its `ATTRIBUTION.md` holds the package's terms.

    Returns:
        the files, by name.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        FileNotFoundError: if a resource file or a photograph is missing.
        ValueError: if a resource file cannot be read.
    """
    root = Path(package) / "usr/share/gcompris-qt/rcc"
    written = []
    with new_folder(output_dir) as partial:
        for resource, names in PHOTOGRAPHS.items():
            source = root / f"{resource}.rcc"
            if not source.is_file():
                raise FileNotFoundError(f"{source} is missing; unpack the package's current version")
            contents = {
                Path(path).stem.removesuffix("_background"): content for path, content in read_resources(source)
            }
            for name in names:
                if name not in contents:
                    raise FileNotFoundError(f"{source} holds no {name}; unpack the package's current version")
                # Two resource files have some places in common.
                target = f"{resource}_{name}.png"
                to_rgb(load_image(contents[name])).save(partial / target)
                written.append(Path(output_dir) / target)
        _write_attribution(partial, Path(package), "Backgrounds: photographs in GCompris", PACKAGES[1])
    return sorted(written)


def _write_attribution(folder: Path, package: Path, heading: str, name: str) -> None:
    terms = package / "usr/share/doc" / name / "copyright"
    text = terms.read_text(encoding="utf-8") if terms.is_file() else ""
    (folder / "ATTRIBUTION.md").write_text(
        f"{heading}, from Debian's package {name}. Its terms:\n\n{text}", encoding="utf-8"
    )


def find_packages(folder: Path) -> list[Path]:
    """The latest `.deb` file in a folder of each of `PACKAGES`, in their order.

    Raises:
        FileNotFoundError: if a package is missing.
    """
    files = [sorted(folder.glob(f"{name}_*.deb")) for name in PACKAGES]
    missing = [name for name, found in zip(PACKAGES, files, strict=True) if not found]
    if missing:
        raise FileNotFoundError(f"{folder} has no .deb file of {', '.join(missing)}; download it into this folder")
    return [found[-1] for found in files]


def fetch(output_dir: Path, packages: Path | None = None) -> Path:
    """Download, unpack and export what is not in `output_dir` yet.

    Args:
        output_dir: folder for `cutouts` and `backgrounds`. Each of them appears only when complete.
        packages: folder with the two `.deb` files; by default they are downloaded with apt (205 MB).

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: if there is no apt, a `.deb` file is missing, or a file in it is missing.
        OSError: if the download fails.
    """
    cutouts, backgrounds = output_dir / "cutouts", output_dir / "backgrounds"
    if cutouts.is_dir() and backgrounds.is_dir():
        return output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(output_dir) as work:
        if packages is None:
            if shutil.which("apt-get") is None:
                raise FileNotFoundError(
                    f"apt-get is not installed; download Debian's packages {' and '.join(PACKAGES)} (.deb files) and name"
                    " their folder with --packages"
                )
            print(f"Downloading {' and '.join(PACKAGES)} (205 MB)", flush=True)
            if subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=work).returncode:
                raise OSError("apt-get could not download the packages; try `sudo apt-get update` first")
        stamps, places = find_packages(packages or work)
        print("Unpacking", flush=True)
        for export, deb, target in ((export_stamps, stamps, cutouts), (export_places, places, backgrounds)):
            if not target.is_dir():
                export(unpack_package(deb, work / target.name), target)
    return output_dir


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write photographic cut-outs and backgrounds for `agevlm scenes`.")
    parser.add_argument("output_dir", type=Path, help="folder for `cutouts` and `backgrounds`")
    parser.add_argument("--packages", type=Path, help="folder with the two .deb files, instead of a download")
    args = parser.parse_args()
    try:
        fetch(args.output_dir, args.packages)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Saved {args.output_dir / 'cutouts'} and {args.output_dir / 'backgrounds'}.")


if __name__ == "__main__":
    main()
