# SPDX-License-Identifier: Apache-2.0
"""The evidence: does guided cross-attention do what it is said to do? On grounded scenes of photographs, several seeds.

    make evidence      # or: python examples/evidence.py [--device cuda]

From the demo's real parts, each arm is trained with each seed and examined on scenes of new photographs and of new classes:
the image beside the text (Llava), cross-attention without guidance, with guidance by exact masks, and with guidance by the
masks of a teacher (GrabCut, from boxes). Stop it, even kill it, and the same command goes on where it was.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import DatasetDict, load_from_disk
from parts import assemble
from rich.console import Console

from agevlm.data.masks import add_masks
from agevlm.data.scene_builder import build_scenes, load_cutouts
from agevlm.data.teachers import load_teacher
from agevlm.files import new_folder
from research.assets.debian import fetch
from research.curriculum import Curriculum
from research.mask_quality import boxes_from_masks, mask_quality
from research.report import check_claims, write_report
from research.runs import ARMS, Setting, run_all

# Every fourth class, 47 of 186: as many as this little training can tell apart.
EVERY_CLASS = 4
SCENES = {
    "num_train": 1500,
    "num_validation": 150,
    "num_test": 200,
    "num_zero_shot": 100,
    "zero_shot_classes": 7,
    "image_size": 256,
    "max_objects": 6,
    "cooccurrence": 0.5,
    "seed": 0,
}
MODEL = {
    "image_size": 256,
    "dtype": torch.float32,
    "out_indices": (3,),
    "visual_position_embedding": True,
    "cross_attention_sink": True,
}
STEPS = 200
MAX_QUESTIONS = 60
SPLITS = ("test", "zero_shot")

console = Console()


def made(folder: Path, arguments: dict[str, Any], make: Callable[[Path], Any]) -> Path:
    """The folder, filled by `make` unless it is there already.

    Raises:
        FileExistsError: if it was made with other arguments.
    """
    file, ours = folder.with_name(f"{folder.name}.json"), json.dumps(arguments, indent=1, default=str) + "\n"
    if folder.is_dir() and any(folder.iterdir()):
        if not file.is_file() or file.read_text(encoding="utf-8") != ours:
            raise FileExistsError(
                f"{folder} was made with other arguments: choose another --output-dir, or delete {folder}."
            )
        console.print(f"{folder.name}: there already")
        return folder
    console.rule(folder.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ours, encoding="utf-8")
    make(folder)
    return folder


def build_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    with new_folder(folder) as partial:
        assemble(partial, **MODEL)


def add_teacher(scenes: Path, folder: Path) -> None:
    """The same scenes, with GrabCut's masks in the split `train`; `mask_quality.json` says how good they are."""
    exact = load_from_disk(scenes)
    attribution = (scenes / "ATTRIBUTION.md").read_text(encoding="utf-8")
    train = folder.with_name(f"{folder.name}_train")
    masked = (
        load_from_disk(train)
        if train.is_dir()
        else add_masks(boxes_from_masks(exact["train"]), load_teacher("grabcut", device="cpu"), train)[0]
    )
    quality = mask_quality(masked, exact["train"])
    console.print(f"GrabCut's masks: mean IoU {quality.mean_iou:.3f}, below 0.5 {quality.below_half:.1%}")
    with new_folder(folder) as partial:
        DatasetDict({**exact, "train": masked}).save_to_disk(partial)
        (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        (partial / "mask_quality.json").write_text(json.dumps(asdict(quality), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(train)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and examine the arms of the evidence.")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/evidence"), help="a stopped run goes on in it"
    )
    parser.add_argument(
        "--packages", type=Path, help="folder with Debian's two .deb files, instead of downloading them"
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas between them")
    parser.add_argument("--steps", type=int, default=STEPS, help="of all stages together")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between them; all by default")
    parser.add_argument("--workers", type=int, help="runs at the same time; by default 2 on CPUs, 1 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be whole numbers with commas between them, got '{args.seeds}'")
    args.arms = [name.strip() for name in args.arms.split(",")]
    if unknown := [name for name in args.arms if name not in ARMS]:
        parser.error(f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if args.steps < 4 or (args.workers is not None and args.workers < 1):
        parser.error("--steps must be at least 4, one for each stage, and --workers at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no CUDA GPU here")
    args.workers = args.workers or (2 if args.device == "cpu" else 1)
    return args


def collect(args: argparse.Namespace) -> None:
    for library in (datasets, transformers.utils.logging):  # whose progress bars would cut through ours
        library.disable_progress_bar()
    out = args.output_dir
    photographs = fetch(out / "photographs", args.packages)
    arguments = {"every_class": EVERY_CLASS, **SCENES}
    scenes = made(
        out / "scenes",
        arguments,
        lambda folder: build_scenes(
            photographs / "cutouts",
            photographs / "backgrounds",
            folder,
            classes=list(load_cutouts(photographs / "cutouts"))[::EVERY_CLASS],
            **SCENES,
        ),
    )
    data = {"exact": scenes}
    if any(ARMS[name].data == "teacher" for name in args.arms):
        data["teacher"] = made(out / "teacher", arguments, lambda folder: add_teacher(scenes, folder))
    setting = Setting(
        checkpoint=made(out / "untrained", MODEL, build_checkpoint),
        data=data,
        output_dir=out,
        curriculum=Curriculum(steps=args.steps),
        max_questions=MAX_QUESTIONS,
        splits=SPLITS,
        device=args.device,
    )
    console.rule("runs")
    results = run_all({name: ARMS[name] for name in args.arms}, args.seeds, setting, args.workers)

    console.rule("report")
    notes = {}
    if "teacher" in data:
        notes["masks of the teacher"] = json.loads((data["teacher"] / "mask_quality.json").read_text(encoding="utf-8"))
    tables = write_report(
        results,
        out / "report",
        title="Evidence",
        command=shlex.join(["python", *sys.argv]),
        claims=check_claims(results),
        notes=notes,
    )
    console.print(tables)
    console.print(f"[green]Saved[/green] {out / 'report'}: report.md, its figures, and results.json.")


def main() -> None:
    try:
        collect(parse_args())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"evidence: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("evidence: interrupted; the same command goes on from here") from None


if __name__ == "__main__":
    main()
