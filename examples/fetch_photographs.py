# SPDX-License-Identifier: Apache-2.0
"""Fetches the photographic cut-outs and backgrounds of the grounded scenes from two packages of Debian.

    python examples/fetch_photographs.py photographs

writes `photographs/cutouts` and `photographs/backgrounds`, for `agevlm scenes` or `agevlm.data.scene_builder.build_scenes`. On
Debian and its kin the packages are downloaded with apt, without installing them; elsewhere download them by hand and name
the folder that holds them with `--packages`.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from research.assets.debian import PACKAGES, export_places, export_stamps, unpack_package


def find_packages(folder: Path) -> list[Path]:
    """The packages' files in a folder, by name; those of `PACKAGES`, in order."""
    found = [sorted(folder.glob(f"{name}_*.deb")) for name in PACKAGES]
    missing = [name for name, files in zip(PACKAGES, found, strict=True) if not files]
    if missing:
        raise SystemExit(f"{folder} has no .deb file of {', '.join(missing)}.")
    return [files[-1] for files in found]


def fetch(output_dir: Path, packages: Path | None = None) -> Path:
    """Downloads, unpacks and exports what is not there yet."""
    cutouts, backgrounds = output_dir / "cutouts", output_dir / "backgrounds"
    if cutouts.is_dir() and backgrounds.is_dir():
        return output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as temporary:
        work = Path(temporary)
        if packages is None:
            if shutil.which("apt-get") is None:
                raise SystemExit(
                    f"There is no apt-get here: download Debian's packages {' and '.join(PACKAGES)} (.deb files) and name "
                    "their folder with --packages."
                )
            print(f"Downloading {' and '.join(PACKAGES)} (205 MB)", flush=True)
            if subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=work).returncode:
                raise SystemExit("apt-get could not download the packages: try `sudo apt-get update` first.")
        stamps, places = find_packages(packages or work)
        print("Unpacking", flush=True)
        for export, deb, target in ((export_stamps, stamps, cutouts), (export_places, places, backgrounds)):
            if not target.is_dir():
                export(unpack_package(deb, work / target.name), target)
    return output_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--packages", type=Path, help="folder with the two .deb files, instead of downloading them")
    args = parser.parse_args()
    fetch(args.output_dir, args.packages)
    print(f"Photographs are in {args.output_dir}.")


if __name__ == "__main__":
    main()
