# SPDX-License-Identifier: Apache-2.0
"""Experiments on grounded scenes: the arms of the evidence, and the ablations, each trained and examined alike.

A variant says what differs from guided training as it is by default. All variants of a seed see the same batches in the same
order, start from the same weights where they have the same parts, and take the same number of optimiser steps.
"""

import functools
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Group
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agevlm.data.features import image_features, scene_images
from agevlm.evaluation.scenes import evaluate_scenes
from agevlm.evaluation.similarity import scene_similarity
from agevlm.files import new_folder
from agevlm.modeling_agevlm.configuration_agevlm import AgeVlmConfig, AgeVlmTextConfig
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from agevlm.processing.processing_agevlm import AgeVlmProcessor
from agevlm.processing.rows import mask_from_rle, mask_to_rle
from agevlm.trainer.trainer import AgeVlmTrainer
from research.curriculum import Curriculum, train_stages, without_vision
from research.rivals import ConcatenationForConditionalGeneration, ConcatenationTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict

# Read without an image by the trained model and by the language model alone. Grimm, as translated by Hunt in 1884.
TEXT = (
    "Hard by a great forest dwelt a poor wood-cutter with his wife and his two children. The boy was called Hansel and the "
    "girl Gretel. He had little to bite and to break, and once, when great scarcity fell on the land, he could no longer "
    "procure daily bread. Now when he thought over this by night in his bed, and tossed about in his anxiety, he groaned and "
    'said to his wife, "What is to become of us? How are we to feed our poor children, when we no longer have anything even '
    'for ourselves?"'
)
# The height of wide images, in parts of their width.
_WIDE = 5 / 8


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        title: for tables and figures.
        concatenates: Llava of the same parts in place of cross-attention.
        pooling: so many visual tokens by so many are averaged into one.
        data: name of the scenes, a key of [`Setting.data`]; they differ in their masks or images only.
        arguments: of [`~agevlm.trainer.arguments.AgeVlmTrainingArguments`].
        text_config: fields of [`~agevlm.AgeVlmTextConfig`].
        image_processor: fields of the image processor.
        curriculum: fields of [`~research.curriculum.Curriculum`].
        unguided_stages: names of stages that are not guided here.
    """

    title: str
    concatenates: bool = False
    pooling: int = 1
    data: str = "exact"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    curriculum: Mapping[str, Any] = field(default_factory=dict)
    unguided_stages: tuple[str, ...] = ()


ARMS = {
    # With a quarter of the tokens: on 2 cores a step with all of them takes ten times that of cross-attention.
    "concatenation": Variant(
        "concatenation (Llava)", concatenates=True, pooling=2, arguments={"guidance_weight": 0.0}
    ),
    "unguided": Variant("cross-attention, unguided", arguments={"guidance_weight": 0.0}),
    "guided": Variant("cross-attention, guided"),
    "teacher": Variant("cross-attention, guided by GrabCut's masks", data="teacher"),
}
"""The arms that the evidence compares."""


def ablations(config: AgeVlmTextConfig) -> dict[str, dict[str, Variant]]:
    """The ablations of a model, by topic: variants to be compared with `guided` of [`ARMS`] and with each other.

    The topic `padding` needs the scenes `wide`, see [`widen`].
    """
    layers, depth = config.cross_attention_layers or [], config.num_hidden_layers
    blocks = len(layers)

    def inserted(title: str, before: Sequence[int]) -> Variant:
        merged = [layer + i for i, layer in enumerate(before)]
        return Variant(f"{title} {', '.join(map(str, before))}", text_config={"cross_attention_layers": merged})

    losses = {
        "dice": Variant("guided by Dice", arguments={"guidance_loss": "dice"}),
        "dice_as_it_is": Variant(
            "guided by Dice without rescaling", arguments={"guidance_loss": "dice", "rescale_maps": False}
        ),
        "bce": Variant("guided by binary cross-entropy", arguments={"guidance_loss": "bce"}),
        "kl": Variant("guided by Kullback-Leibler", arguments={"guidance_loss": "kl"}),
    }
    sink = not config.cross_attention_sink
    return {
        "stages": {
            "no_stage_3": Variant("no guidance in stage 3", unguided_stages=("guide",)),
            "no_stage_4": Variant("no guidance in stage 4", unguided_stages=("instruct",)),
        },
        "guided_layers": {
            f"layer_{layer}": Variant(f"guidance of layer {layer} alone", arguments={"guided_layers": [layer]})
            for layer in layers
        },
        "guided_fraction": {
            f"fraction_{share}": Variant(f"{share} % of the rows guided", arguments={"guided_fraction": share / 100})
            for share in (5, 10, 25, 50)  # 0 is `unguided`, 100 `guided`: both stand beside every topic
        },
        "loss": {name: variant for name, variant in losses.items() if name != Curriculum.guidance_loss},
        "padding": {
            "padding_masked": Variant("wide images, padding masked", data="wide"),
            "padding_seen": Variant(
                "wide images, padding seen", data="wide", image_processor={"return_pixel_mask": False}
            ),
        },
        "insertion": {
            "first_layers": inserted("blocks before layers", range(blocks)),
            "last_layers": inserted("blocks before layers", range(depth - blocks, depth)),
            "one_block": inserted("one block, before layer", config.cross_attention_llama_layers[:1]),
        },
        "gate": {
            "no_gates": Variant("no gates", curriculum={"initial_gate": 20.0}),
            "gates_shut": Variant("gates start at 0.01", curriculum={"initial_gate": 0.01}),
        },
        "sink": {
            "sink" if sink else "no_sink": Variant(
                "attention sink" if sink else "no attention sink", text_config={"cross_attention_sink": sink}
            )
        },
    }


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share.

    Args:
        checkpoint: folder of an assembled AGE-VLM; the adapter and the cross-attention are made anew for each seed.
        data: folders of grounded scenes by name: `exact`, and what the variants need besides.
        output_dir: folder of the runs, `runs/{variant}-{seed}/result.json`, and of the ready-made image features.
        curriculum: with the vision tower frozen throughout.
        guidance_weight: of the guided stages.
        max_questions: of each kind, in each split that is examined.
        splits: of the scenes that are examined.
        device: `"cpu"` or `"cuda"`.
    """

    checkpoint: Path
    data: Mapping[str, Path]
    output_dir: Path
    curriculum: Curriculum = field(default_factory=Curriculum)
    guidance_weight: float = 1.0
    max_questions: int | None = 300
    splits: tuple[str, ...] = ("test", "zero_shot")
    device: str = "cpu"

    def run_dir(self, name: str, seed: int) -> Path:
        return self.output_dir / "runs" / f"{name}-{seed}"


def run_all(
    variants: Mapping[str, Variant], seeds: Sequence[int], setting: Setting, workers: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Trains and examines each variant with each seed; those that are done already are read from the output folder.

    Args:
        workers: processes that work at the same time, each on its share of the cores.

    Returns:
        The results by variant, in the order of the seeds; see [`run`].

    Raises:
        ValueError: if the output folder has results of other settings, a variant's scenes are missing, or there is no GPU
            where one is asked for.
        OSError: if a process was ended from outside.
    """
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("The device is cuda, but PyTorch finds no CUDA GPU here: use cpu.")
    if missing := sorted({variant.data for variant in variants.values()}.difference(setting.data)):
        raise ValueError(f"There are no scenes {', '.join(missing)}, but {', '.join(setting.data)}.")
    todo = [
        (name, seed) for seed in seeds for name in variants if _result(variants[name], name, seed, setting) is None
    ]
    # Before there are several processes that would each compute them.
    for name in dict(todo):
        for split in ("train", *setting.splits):
            split_features(setting, variants[name], split)
    total, threads = len(variants) * len(seeds), max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(threads,))
    with Progress() as bar:
        task = bar.add_task("runs", total=total, completed=total - len(todo))
        futures = {pool.submit(run, variants[name], name, seed, setting): (name, seed) for name, seed in todo}
        try:
            for future in as_completed(futures):
                name, seed = futures[future]
                seconds = future.result()["seconds"]
                bar.console.print(f"{name}, seed {seed}: {sum(seconds.values()) / 60:.1f} minutes")
                bar.advance(task)
        except BrokenProcessPool as error:
            raise OSError(
                "A run's process was ended from outside, perhaps because memory ran out: the same command goes on with what is "
                "left, perhaps with fewer workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what has begun is finished and nothing else is begun
    done = {name: [_result(variant, name, seed, setting) for seed in seeds] for name, variant in variants.items()}
    return {name: [result for result in results if result is not None] for name, results in done.items()}


def _start(threads: int) -> None:
    """Prepares a process: it says nothing, because several would write over each other and over the progress bar."""
    import datasets
    import transformers

    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _settings(variant: Variant, setting: Setting) -> dict[str, Any]:
    """What a result depends on, as JSON has it."""
    varied = asdict(variant)
    del varied["title"]
    data = {split: _fingerprint(setting.data[variant.data], split) for split in ("train", *setting.splits)}
    shared = {
        "checkpoint": _checkpoint_digest(setting.checkpoint),
        "data": data,
        "curriculum": asdict(setting.curriculum),
        "guidance_weight": setting.guidance_weight,
        "max_questions": setting.max_questions,
    }
    return json.loads(json.dumps({"variant": varied, **shared}))


@functools.cache
def _checkpoint_digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for file in sorted(file for kind in ("json", "jinja", "safetensors") for file in folder.glob(f"*.{kind}")):
        with file.open("rb") as opened:
            sha.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()[:16]


@functools.cache
def _fingerprint(scenes: Path, split: str) -> str:
    """That of a split, as it was saved; it is another for other rows."""
    from datasets import load_from_disk

    return load_from_disk(scenes)[split]._fingerprint


def _result(variant: Variant, name: str, seed: int, setting: Setting) -> dict[str, Any] | None:
    file = setting.run_dir(name, seed) / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    theirs, ours = (_flat(settings) for settings in (result["settings"], _settings(variant, setting)))
    if others := [key for key in sorted(ours.keys() | theirs.keys()) if theirs.get(key) != ours.get(key)]:
        changes = "; ".join(f"{key} was {theirs.get(key)} and is {ours.get(key)}" for key in others)
        raise ValueError(
            f"{file} is of other settings ({changes}): choose another output folder, or delete {file.parent}."
        )
    return result


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def split_features(setting: Setting, variant: Variant, split: str) -> AgeVlmImageFeatures:
    """The frozen tower's tokens of all scenes of a split, computed once and kept in the output folder, and pooled for the
    variant."""
    from datasets import load_from_disk

    # The teacher's scenes have other masks, and the same images.
    data = "exact" if variant.data == "teacher" else variant.data
    changed = dict(variant.image_processor)
    source = [_checkpoint_digest(setting.checkpoint), _fingerprint(setting.data[data], split), changed]
    name = f"{data}-{split}-{hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]}"
    file = setting.output_dir / "features" / f"{name}.safetensors"
    if not file.is_file():
        model = AgeVlmForConditionalGeneration.from_pretrained(setting.checkpoint).to(setting.device).eval()
        images = scene_images(load_from_disk(setting.data[data])[split])
        features = image_features(
            model, _processor(setting, changed), images.values(), batch_size=4, progress=f"images of {data}, {split}"
        )
        tensors = {"tokens": features.last_hidden_state.cpu(), "grid": torch.tensor(features.grid)}
        if features.visual_attention_mask is not None:
            tensors["mask"] = features.visual_attention_mask.cpu()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    tensors = load_file(file, device=setting.device)
    rows, columns = tensors["grid"].tolist()
    features = AgeVlmImageFeatures(
        last_hidden_state=tensors["tokens"], visual_attention_mask=tensors.get("mask"), grid=(rows, columns)
    )
    return features if variant.pooling == 1 else pool_features(features, variant.pooling)


def pool_features(features: AgeVlmImageFeatures, size: int) -> AgeVlmImageFeatures:
    """Visual tokens averaged over squares of `size` by `size`, at the right and bottom edges over what there is.

    Raises:
        ValueError: if there is padding, which an average would take in.
    """
    if features.visual_attention_mask is not None and not features.visual_attention_mask.all():
        raise ValueError(
            "Images with padding cannot be pooled: use square images, or a processor that stretches them."
        )
    tokens = features.last_hidden_state.unflatten(1, features.grid).movedim(-1, 1)
    pooled = nn.functional.avg_pool2d(tokens, size, ceil_mode=True)
    return AgeVlmImageFeatures(
        last_hidden_state=pooled.movedim(1, -1).flatten(1, 2), grid=(pooled.shape[-2], pooled.shape[-1])
    )


def _processor(setting: Setting, image_processor: Mapping[str, Any]) -> AgeVlmProcessor:
    processor = AutoProcessor.from_pretrained(setting.checkpoint)
    for name, value in image_processor.items():
        setattr(processor.image_processor, name, value)
    return processor


def ablate(
    checkpoint: Path,
    scenes: Path,
    output_dir: Path,
    *,
    command: str,
    topics: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    steps: int = Curriculum.steps,
    max_questions: int | None = Setting.max_questions,
    guidance_weight: float = 1.0,
    workers: int = 1,
    device: str = "cpu",
) -> Group:
    """Trains and examines the [`ablations`] of a model beside guided and unguided training, and writes a report on them.

    Args:
        checkpoint: folder of an assembled AGE-VLM.
        scenes: folder of grounded scenes with the splits `train` and `test`, perhaps `zero_shot`.
        output_dir: of the runs and the folder `report`; runs that are there already are not done again.
        command: that is named in the report.
        topics: of [`ablations`]; all by default.
        steps: optimiser steps of all stages together.
        max_questions: of each kind, in each split that is examined.

    Returns:
        the tables, for the terminal.

    Raises:
        FileNotFoundError: if there is no such checkpoint or data.
        ValueError: for an unknown topic, a checkpoint of another architecture, scenes without a split to examine, or an
            output folder with results of other settings.
    """
    from datasets import load_from_disk

    from agevlm.trainer.recipe import check_model
    from research.report import write_report

    if not checkpoint.is_dir():
        raise FileNotFoundError(f"There is no folder {checkpoint}: `agevlm build` assembles a checkpoint in one.")
    check_model(str(checkpoint))
    known = ablations(AgeVlmConfig.from_pretrained(checkpoint).text_config)
    if unknown := [topic for topic in topics or () if topic not in known]:
        raise ValueError(f"There is no topic {', '.join(unknown)}; there are {', '.join(known)}.")
    if not (scenes / "dataset_dict.json").is_file():
        raise FileNotFoundError(f"{scenes} is not a folder of grounded scenes that `agevlm scenes` has written.")
    splits = tuple(split for split in ("test", "zero_shot") if split in load_from_disk(scenes))
    if not splits:
        raise ValueError(f"{scenes} has no split test or zero_shot to examine.")
    chosen = {topic: known[topic] for topic in topics or known}
    data = {"exact": scenes}
    if "padding" in chosen:
        data["wide"] = output_dir / "wide"
        if not data["wide"].is_dir():
            widen(scenes, data["wide"])
    setting = Setting(
        checkpoint=checkpoint,
        data=data,
        output_dir=output_dir,
        curriculum=Curriculum(steps=steps),
        guidance_weight=guidance_weight,
        max_questions=max_questions,
        splits=splits,
        device=device,
    )
    arms = {name: ARMS[name] for name in ("guided", "unguided")}
    variants = arms | {name: variant for topic in chosen.values() for name, variant in topic.items()}
    return write_report(
        run_all(variants, seeds, setting, workers),
        output_dir / "report",
        title="Ablations",
        command=command,
        topics={topic: ["unguided", *found] for topic, found in chosen.items()},
        reference="guided",
    )


def fresh_model(variant: Variant, seed: int, setting: Setting) -> PreTrainedModel:
    """The checkpoint with a new adapter and new cross-attention, or the concatenating model of the same parts."""
    config = AgeVlmConfig.from_pretrained(setting.checkpoint)
    for name, value in variant.text_config.items():
        setattr(config.text_config, name, value)
    model = AgeVlmForConditionalGeneration.from_pretrained(setting.checkpoint, config=config)
    # For texts without image tokens, which are short, eager attention is the faster one on CPUs.
    if setting.device == "cpu" and not variant.concatenates:
        model.set_attn_implementation("eager")
    blocks = [layer.cross_attn for layer in model.model.language_model.layers if layer.cross_attn is not None]
    for number, fresh in enumerate((model.model.multi_modal_projector, *blocks)):
        torch.manual_seed(1000 * seed + number)
        for parameter in fresh.parameters():
            parameter._is_hf_initialized = False  # what has come from the checkpoint would be left as it is
        for module in reversed(list(fresh.modules())):  # a sink last, so that without it all else is drawn alike
            model._init_weights(module)
    if variant.concatenates:
        return ConcatenationForConditionalGeneration.from_age_vlm(model)
    return model


def run(variant: Variant, name: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Trains a variant and examines it.

    Returns:
        What is written to `result.json`, beside the trained weights in `trained.safetensors`: `scores` by split, as
        [`~agevlm.evaluation.scenes.evaluate_scenes`] gives them; `similarity` of matching and random pairs by split, without the
        pairs themselves; `text_loss`, see [`text_loss`]; the training `log`; `seconds`; `settings` and `versions`.
    """
    import transformers
    from datasets import load_from_disk

    from agevlm import __version__

    model = fresh_model(variant, seed, setting).to(setting.device)
    processor = _processor(setting, variant.image_processor)
    scenes = load_from_disk(setting.data[variant.data])
    curriculum = replace(
        setting.curriculum,
        stages=without_vision(
            [replace(s, guided=s.guided and s.name not in variant.unguided_stages) for s in setting.curriculum.stages]
        ),
        **variant.curriculum,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        log = train_stages(
            model,
            processor,
            scenes["train"],
            Path(work),
            curriculum,
            seed=seed,
            arguments={
                "guidance_weight": setting.guidance_weight,
                "use_cpu": setting.device == "cpu",
                **variant.arguments,
            },
            trainer_class=ConcatenationTrainer if variant.concatenates else AgeVlmTrainer,
            features=split_features(setting, variant, "train"),
            quiet=True,
        )
    trained = time.perf_counter()
    scores, similarity = {}, {}
    for split in setting.splits:
        features = split_features(setting, variant, split)
        scores[split], _ = evaluate_scenes(
            model, processor, scenes[split], max_questions=setting.max_questions, features=features, progress=None
        )
        similarity[split] = scene_similarity(model, processor, scenes[split], features=features).summary()
    result = {
        "name": name,
        "title": variant.title,
        "seed": seed,
        "scores": scores,
        "similarity": similarity,
        "text_loss": text_loss(model, processor, setting.checkpoint),
        "log": log,
        "seconds": {"training": trained - start, "examination": time.perf_counter() - trained},
        "settings": _settings(variant, setting),
        "versions": {
            "agevlm": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if setting.device == "cuda" else platform.machine(),
        },
    }
    weights = {
        key: tensor.to(torch.bfloat16).contiguous().cpu()
        for key, tensor in model.state_dict().items()
        if "multi_modal_projector" in key or ".cross_attn." in key
    }
    folder = setting.run_dir(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "trained.safetensors")
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")
    return result


@torch.no_grad()
def text_loss(model: PreTrainedModel, processor: AgeVlmProcessor, checkpoint: Path) -> dict[str, float]:
    """The next-token loss of [`TEXT`], without an image: of a trained `model`, and of the `language_model` alone, which is loaded
    from the checkpoint that the training began with."""
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


def widen(scenes: Path, out: Path) -> "DatasetDict":
    """Writes the same grounded scenes with their images and masks at 5/8 of their height, so that an image processor pads
    them; questions and answers hold as they did.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
    """
    from datasets import load_from_disk

    def squash(row: dict[str, Any]) -> dict[str, Any]:
        (image,) = row["images"]
        size = image.width, round(_WIDE * image.height)
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
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

    with new_folder(out) as partial:
        exact = load_from_disk(scenes)
        # By default `datasets` would leave its work in the folder of the scenes.
        files = {split: str(partial.parent / f"{split}.arrow") for split in exact}
        exact.map(squash, cache_file_names=files, desc="wide images").save_to_disk(partial)
    return load_from_disk(out)
