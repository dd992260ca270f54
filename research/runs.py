# SPDX-License-Identifier: Apache-2.0
"""Runs of the laboratory: variants of one recipe, each trained by [`agevlm.train`] and examined by [`agevlm.evaluation`].

All variants of a seed see the same batches in the same order, begin with the same weights where they have the same parts, and take
the same number of optimizer steps.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars, load_from_disk
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import agevlm
from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.build import fresh_modules
from agevlm.data import DataPart, compute_features
from agevlm.deltas import load_checkpoint
from agevlm.evaluation import evaluate_scenes, measure_similarity
from agevlm.files import new_file
from agevlm.resume import digest, fingerprint, refuse_changes, resume_or_refuse
from agevlm.trainer import AgeVlmTrainer, Recipe, load_recipe
from agevlm.trainer.parser import parse, read_yaml
from research.rivals import ConcatenationForConditionalGeneration, ConcatenationProcessor, ConcatenationTrainer

FOLDER = Path(__file__).parent
RECIPE = FOLDER / "evidence.yaml"

# Read without an image by the trained model and by the language model alone. Grimm, as translated by Hunt in 1884.
TEXT = (
    "Hard by a great forest dwelt a poor wood-cutter with his wife and his two children. The boy was called Hansel and the "
    "girl Gretel. He had little to bite and to break, and once, when great scarcity fell on the land, he could no longer "
    "procure daily bread. Now when he thought over this by night in his bed, and tossed about in his anxiety, he groaned and "
    'said to his wife, "What is to become of us? How are we to feed our poor children, when we no longer have anything even '
    'for ourselves?"'
)


@dataclass(frozen=True)
class Variant:
    """One way to train: what differs from the recipe.

    Args:
        title: for tables and figures.
        overrides: of the recipe, as `training.guidance_loss=dice`.
        text_config: fields of [`~agevlm.AgeVlmTextConfig`].
        image_processor: fields of the image processor.
        scenes: name of the scenes that the model is trained and examined on, a key of [`Laboratory.scenes`].
        concatenates: train Llava of the same parts instead. Squares of this many by this many of the tower's tokens become
            one visual token; 0 for AGE-VLM.
    """

    title: str
    overrides: list[str] = field(default_factory=list)
    text_config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)
    scenes: str = "exact"
    concatenates: int = 0


def read_variants(file: Path) -> dict[str, dict[str, Variant]]:
    """The variants of a YAML file, by topic and name.

    Raises:
        ValueError: if the file does not have that form.
    """
    topics = read_yaml(file.read_text(encoding="utf-8"), str(file))
    return {
        topic: {name: parse(Variant, values, f"{topic}.{name}") for name, values in variants.items()}
        for topic, variants in topics.items()
    }


ARMS = read_variants(FOLDER / "arms.yaml")["arms"]
"""The arms that the evidence compares."""


@dataclass(frozen=True)
class Laboratory:
    """What all runs share.

    Args:
        checkpoint: folder of an assembled AGE-VLM; each seed begins with a new adapter and new cross-attention.
        scenes: folders of grounded scenes by name: `exact`, and what the variants need besides.
        output_dir: gets `runs/{variant}-{seed}/`, and `features/` of the frozen tower.
        recipe: that the variants override.
        overrides: of the recipe, for all variants.
        max_questions: of each kind, in each split that is examined; all by default.
        splits: of the scenes that are examined.
        device: `"cpu"` or `"cuda"`.
    """

    checkpoint: Path
    scenes: Mapping[str, Path]
    output_dir: Path
    recipe: Path = RECIPE
    overrides: Sequence[str] = ()
    max_questions: int | None = None
    splits: Sequence[str] = ("test", "zero_shot")
    device: str = "cpu"

    def run_dir(self, name: str, seed: int) -> Path:
        return self.output_dir / "runs" / f"{name}-{seed}"

    def features(self, variant: Variant) -> Path:
        """Where the frozen tower's features for a variant are kept: they depend on the image processor."""
        changes = variant.image_processor
        return self.output_dir / "features" / (digest([changes]) if changes else "unchanged")

    def load_recipe(self, variant: Variant, name: str, seed: int) -> Recipe:
        """The recipe of a run."""
        run = {
            "model": self.checkpoint,
            "features": self.features(variant),
            "training.output_dir": self.run_dir(name, seed) / "training",
            "training.seed": seed,
            "training.use_cpu": json.dumps(self.device == "cpu"),
        }
        overrides = [f"{key}={value}" for key, value in run.items()]
        recipe = load_recipe(self.recipe, [*self.overrides, *variant.overrides, *overrides])
        for part in _parts(recipe):
            part.path = str(self.scenes[variant.scenes])
        return recipe

    def load_processor(self, variant: Variant) -> AgeVlmProcessor:
        processor = AutoProcessor.from_pretrained(self.checkpoint)
        for name, value in variant.image_processor.items():
            setattr(processor.image_processor, name, value)
        return processor

    def settings(self, variant: Variant, name: str, seed: int) -> dict[str, Any]:
        """All that a run's result depends on: its recipe with digests of the model and the data in place of their paths."""
        recipe = self.load_recipe(variant, name, seed)
        scenes = load_from_disk(self.scenes[variant.scenes])
        recipe.model = _checkpoint_digest(self.checkpoint)
        recipe.features = None
        for part in _parts(recipe):
            part.path = scenes[part.split]._fingerprint
        settings = asdict(recipe)
        for machine_setting in ("output_dir", "use_cpu"):
            del settings["training"][machine_setting]
        differs = {key: value for key, value in asdict(variant).items() if key not in ("title", "overrides", "scenes")}
        examined = {split: scenes[split]._fingerprint for split in self.splits}
        return {"recipe": settings, **differs, "examined": examined, "max_questions": self.max_questions}


def _parts(recipe: Recipe) -> Iterator[DataPart]:
    yield from recipe.data
    for stage in recipe.stages:
        yield from stage.data or ()


@cache
def _checkpoint_digest(folder: Path) -> str:
    model = load_checkpoint(AgeVlmForConditionalGeneration, folder)
    files = sorted(file for pattern in ("*.json", "*.jinja") for file in folder.glob(pattern))
    return digest([fingerprint(model), *((file.name, file.read_text(encoding="utf-8")) for file in files)])


def run_all(
    variants: Mapping[str, Variant], seeds: Sequence[int], laboratory: Laboratory, workers: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Trains and examines each variant with each seed; results that are there already are read.

    Args:
        workers: processes that work at the same time, each on its share of the cores.

    Returns:
        The results by variant, in the order of the seeds; see [`run`].

    Raises:
        FileExistsError: if a run of other settings is in the output folder.
        ValueError: if a variant's scenes are missing, or there is no GPU where one is asked for.
        OSError: if a process was ended from outside.
    """
    if laboratory.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("The device is cuda, but PyTorch finds no CUDA GPU: use cpu.")
    if missing := sorted({variant.scenes for variant in variants.values()}.difference(laboratory.scenes)):
        raise ValueError(f"There are no scenes {', '.join(missing)}; there are {', '.join(laboratory.scenes)}.")
    runs = [(name, seed) for seed in seeds for name in variants]
    for name, seed in runs:  # all, before hours of work
        file = laboratory.run_dir(name, seed) / "settings.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            refuse_changes(kept, laboratory.settings(variants[name], name, seed), file.parent)
    left = [(name, seed) for name, seed in runs if not (laboratory.run_dir(name, seed) / "result.json").is_file()]
    waiting = [variants[name] for name in dict(left)]
    for variant in {(laboratory.features(variant), variant.scenes): variant for variant in waiting}.values():
        prepare_features(variant, laboratory)  # before several processes would each do it
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(threads,))
    with Progress() as bar:
        task = bar.add_task("runs", total=len(runs), completed=len(runs) - len(left))
        futures = {pool.submit(run, variants[name], name, seed, laboratory): (name, seed) for name, seed in left}
        try:
            for future in as_completed(futures):
                name, seed = futures[future]
                minutes = sum(future.result()["seconds"].values()) / 60
                bar.console.print(f"{name}, seed {seed}: {minutes:.1f} minutes")
                bar.advance(task)
        except BrokenProcessPool as error:
            raise OSError(
                "A run's process was ended from outside, perhaps because memory ran out. The same command resumes the other runs; "
                "try fewer workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, runs that have begun are finished and no other begins
    return {name: [_read_result(laboratory.run_dir(name, seed)) for seed in seeds] for name in variants}


def _start(threads: int) -> None:
    """Prepares a process, which must print nothing: several would write over each other and over the progress bar."""
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()


def _read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def prepare_features(variant: Variant, laboratory: Laboratory) -> None:
    """Computes what is missing of the frozen tower's features of a variant's training images."""
    model = load_checkpoint(AgeVlmForConditionalGeneration, laboratory.checkpoint).to(laboratory.device).eval()
    scenes = load_from_disk(laboratory.scenes[variant.scenes])["train"]
    compute_features(model, laboratory.load_processor(variant), [scenes], laboratory.features(variant))


def fresh_model(variant: Variant, seed: int, laboratory: Laboratory) -> PreTrainedModel:
    """The checkpoint with a new adapter and new cross-attention, or the concatenating model of the same parts."""
    config = AgeVlmConfig.from_pretrained(laboratory.checkpoint)
    for name, value in variant.text_config.items():
        setattr(config.text_config, name, value)
    # Eager attention is faster on CPUs for texts without image tokens, which are short.
    attention = "eager" if laboratory.device == "cpu" and not variant.concatenates else "sdpa"
    model = AgeVlmForConditionalGeneration.from_pretrained(
        laboratory.checkpoint, config=config, attn_implementation=attention
    )
    for number, fresh in enumerate(fresh_modules(model).values()):
        torch.manual_seed(1000 * seed + number)
        for parameter in fresh.parameters():
            parameter._is_hf_initialized = False  # what comes from the checkpoint would be kept
        for module in reversed(list(fresh.modules())):  # a sink last, so that all else is drawn alike without it
            model._init_weights(module)
    if variant.concatenates:
        return ConcatenationForConditionalGeneration.from_age_vlm(model, variant.concatenates)
    return model


def run(variant: Variant, name: str, seed: int, laboratory: Laboratory) -> dict[str, Any]:
    """Trains a variant and examines it. A run that was stopped resumes at the stage that it was in.

    Returns:
        What it writes to `result.json`: `scores` and `similarity` by split (see [`~agevlm.evaluation.evaluate_scenes`] and
        [`~agevlm.evaluation.measure_similarity`]); `text_loss`, see [`text_loss`]; the training `log`; `seconds`; `settings` and
        `versions`. Beside it are the trained weights in `trained.safetensors`.
    """
    folder = laboratory.run_dir(name, seed)
    settings = laboratory.settings(variant, name, seed)
    resume_or_refuse(folder / "settings.json", settings)
    start, training = perf_counter(), folder / "training"
    processor = laboratory.load_processor(variant)
    trainer = agevlm.train(
        laboratory.load_recipe(variant, name, seed),
        model=fresh_model(variant, seed, laboratory).to(laboratory.device),
        processor=processor,
        trainer_class=ConcatenationTrainer if variant.concatenates else AgeVlmTrainer,
        resume=any(training.glob("*/config.json")),
    )
    trained, model = perf_counter(), trainer.model.eval()
    reader = ConcatenationProcessor.from_age_vlm(processor, model) if variant.concatenates else processor
    scenes, scores, similarity = load_from_disk(laboratory.scenes[variant.scenes]), {}, {}
    for split in laboratory.splits:
        scores[split] = evaluate_scenes(
            (model, reader), data=scenes[split], limit=laboratory.max_questions, progress=None
        ).scores
        similarity[split] = measure_similarity(model, reader, scenes[split], progress=None).summary()
    result = {
        "name": name,
        "title": variant.title,
        "seed": seed,
        "scores": scores,
        "similarity": similarity,
        "text_loss": text_loss(model, processor, laboratory.checkpoint),
        "log": json.loads((training / "training.json").read_text(encoding="utf-8"))["log_history"],
        "seconds": {"training": trained - start, "examination": perf_counter() - trained},
        "settings": settings,
        "versions": {
            "agevlm": agevlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if laboratory.device == "cuda" else platform.machine(),
        },
    }
    weights = {key: p.detach().to("cpu", torch.bfloat16) for key, p in model.named_parameters() if p.requires_grad}
    with new_file(folder / "trained.safetensors") as partial:
        save_file({key: weight.contiguous() for key, weight in weights.items()}, partial)
    with new_file(folder / "result.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(training)  # the whole model after each stage
    return result


@torch.no_grad()
def text_loss(model: PreTrainedModel, processor: AgeVlmProcessor, checkpoint: Path) -> dict[str, float]:
    """The next-token loss of [`TEXT`] without an image: of a trained `model`, and of the `language_model` alone, loaded
    from the checkpoint that training began with."""
    config = AgeVlmConfig.from_pretrained(checkpoint)
    text = config.text_config.to_dict()
    for name in ("model_type", "architectures", "cross_attention_layers", "cross_attention_sink"):
        text.pop(name, None)
    llama = LlamaForCausalLM.from_pretrained(
        checkpoint,
        config=LlamaConfig(**{**text, "tie_word_embeddings": config.tie_word_embeddings}),
        key_mapping={r"^model\.language_model\.": "model."},
        dtype=model.dtype,
        attn_implementation=model.model.language_model.config._attn_implementation,
    ).to(model.device)
    ids = processor.tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)
    losses = {}
    for name, reader in (("model", model), ("language_model", llama)):
        logits = reader.eval()(input_ids=ids).logits[0, :-1].double()
        losses[name] = nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    return losses
