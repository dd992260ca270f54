# SPDX-License-Identifier: Apache-2.0
"""Masks for grounded phrases, from Segment Anything, or from GrabCut where there are no weights.

A mask teacher turns prompts (a phrase and, where there is one, its box) into masks. There are four: SAM from boxes, SAM 3
from phrases, SAM from the boxes that a zero-shot detector gives phrases, and GrabCut from boxes. `add_masks` runs one over a
grounding data set (`agevlm.processing.grounding`): on one process or several, and again from where it stopped.

How good a teacher is, data with exact masks can tell: `boxes_from_masks` gives what the teacher starts from, and
`mask_quality` holds its masks against the exact ones.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou, clip_boxes_to_image

from agevlm._files import check_new_folder, new_folder

from .grounding import import_datasets, mask_from_rle, mask_to_rle, message_text, row_features
from .scenes import _quiet

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset, DatasetDict
    from segment_anything.modeling import Sam


TEACHERS = ("sam", "sam3", "grounded-sam", "grabcut")

# Prompts that go through a model together: each mask is decoded at the size of its image, in float32.
_PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Prompt:
    """What a mask is wanted for: a phrase, and its box `(x0, y0, x1, y1)` in pixels of the image where it has one."""

    phrase: str
    box: tuple[float, float, float, float] | None = None


Answer = tuple[np.ndarray | None, float]
"""A mask, bool `(height, width)` of its image's size, or None where the teacher finds nothing; and its score."""


class MaskTeacher(Protocol):
    """What `add_masks` needs of a teacher."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the masks, for JSON: work that was begun with other settings is not continued."""

    def takes(self, prompt: Prompt) -> bool:
        """Whether this teacher can answer such a prompt."""

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Answer]]:
        """The mask of each prompt, and the teacher's own estimate of how good it is.

        Args:
            images: in RGB.
            prompts: for each image, prompts that this teacher takes.

        Returns:
            for each image and prompt `(mask, score)`: bool `(height, width)` of the image's size, or None and a score of 0
            where the teacher finds nothing.
        """


def _weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's weights as loaded: the same wherever the checkpoint lies, another for another type of number."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- teachers ---


def load_sam(checkpoint: str | os.PathLike) -> Sam:
    """The `segment_anything` model of an official `.pth` checkpoint, float32 on the CPU; its size is read off the weights.

    Raises:
        ImportError: if `segment-anything` is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but the weights of a SAM; code in it is not run.
    """
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise ImportError(f"{error}; for masks from SAM: pip install segment-anything") from error
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"there is no SAM checkpoint {checkpoint}; name an official file, such as sam_vit_h_4b8939.pth"
        )
    try:
        state_dict = torch.load(checkpoint, map_location="cpu", weights_only=True)
        shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"{checkpoint} is not a file of PyTorch weights, or holds more than weights, such as pickled code, which"
            f" is never run ({type(error).__name__}); use the official checkpoint"
        ) from error
    for build in dict.fromkeys(sam_model_registry.values()):
        with torch.device("meta"):  # names and shapes are all that is needed until the weights come
            model = build()
        if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}:
            model.load_state_dict(state_dict, assign=True)
            return model.float().requires_grad_(False).eval()
    types = ", ".join(name for name in sam_model_registry if name != "default")
    raise ValueError(f"{checkpoint} holds weights, but not those of a SAM of the types {types}; other SAMs do not fit")


@dataclass
class SamEmbedding:
    """An image as SAM's encoder saw it; sizes are `(height, width)` in pixels."""

    features: torch.Tensor  # float32 (1, channels, rows, columns)
    input_size: tuple[int, int]  # of the image as scaled, without its padding
    image_size: tuple[int, int]


class SamTeacher:
    """SAM ("Segment Anything") with boxes as prompts. Scores are SAM's own prediction of the mask's IoU.

    Args:
        checkpoint: an official `.pth` file; see `load_sam`.
        device: of the model.
        dtype: of the image encoder, which does nearly all of the work; prompts and masks stay in float32.
    """

    def __init__(
        self, checkpoint: str | os.PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.model = load_sam(checkpoint).to(device)
        self.model.image_encoder.to(dtype)
        self.dtype = dtype

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "sam", "weights": _weights_digest(self.model)}

    def takes(self, prompt: Prompt) -> bool:
        return prompt.box is not None

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[SamEmbedding]:
        """Encode RGB images in one batch."""
        from segment_anything.utils.transforms import ResizeLongestSide

        resize = ResizeLongestSide(self.model.image_encoder.img_size).apply_image
        resized = [torch.from_numpy(resize(np.array(image))).permute(2, 0, 1) for image in images]
        pixels = torch.stack([self.model.preprocess(image.to(self.model.device)) for image in resized])
        features = self.model.image_encoder(pixels.to(self.dtype)).float()
        return [
            SamEmbedding(features[i, None], (resized[i].shape[1], resized[i].shape[2]), (image.height, image.width))
            for i, image in enumerate(images)
        ]

    @torch.inference_mode()
    def decode(self, embedding: SamEmbedding, boxes: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of the boxes `(x0, y0, x1, y1)` in pixels of the image.

        Returns:
            float32: logits `(boxes, height, width)` of the image's size, a mask where above `mask_threshold`, and the
            predicted IoU `(boxes,)`.
        """
        height, width = embedding.image_size
        input_height, input_width = embedding.input_size
        scale = torch.tensor([input_width / width, input_height / height] * 2, dtype=torch.float64)
        prompts = (torch.tensor(boxes, dtype=torch.float64) * scale).float().to(self.model.device)
        sparse, dense = self.model.prompt_encoder(points=None, boxes=prompts, masks=None)
        low_resolution, iou = self.model.mask_decoder(
            image_embeddings=embedding.features,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,  # a box is not ambiguous
        )
        logits = self.model.postprocess_masks(low_resolution, embedding.input_size, embedding.image_size)
        return logits[:, 0], iou[:, 0]

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Answer]]:
        results: list[list[Answer]] = [[] for _ in images]
        asked = [i for i, image_prompts in enumerate(prompts) if image_prompts]
        if not asked:
            return results
        for i, embedding in zip(asked, self.encode([images[i] for i in asked]), strict=True):
            for chunk in _chunks([prompt.box for prompt in prompts[i]], _PROMPTS_AT_ONCE):
                logits, iou = self.decode(embedding, chunk)
                masks = (logits > self.model.mask_threshold).cpu().numpy()
                results[i] += zip(masks, iou.tolist(), strict=True)
        return results


class Sam3Teacher:
    """SAM 3 with phrases as prompts; boxes in the data are not used.

    A phrase may name several things: its mask is the union of all instances that score above `threshold`, its score that
    of the best of them.

    Args:
        checkpoint: folder or Hub id of a Transformers SAM 3.
        threshold: the least score of an instance (SAM 3's: how well it fits the phrase, times whether the phrase is in
            the image at all).
        device, dtype: of the model.

    Raises:
        ValueError: if the checkpoint is of another model.
        OSError: if there is no such checkpoint.
    """

    _TEXT_TOKENS = 32  # what SAM 3's text encoder has positions for

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        threshold: float = 0.5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        from transformers import AutoConfig, Sam3Model, Sam3Processor

        model_type = AutoConfig.from_pretrained(checkpoint).model_type
        if model_type not in ("sam3", "sam3_video"):  # the published checkpoint holds both
            raise ValueError(f"{checkpoint} is a {model_type}, not a sam3: name a checkpoint such as facebook/sam3")
        self.model = Sam3Model.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        self.processor = Sam3Processor.from_pretrained(checkpoint)
        self.threshold = threshold

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "sam3", "weights": _weights_digest(self.model), "threshold": self.threshold}

    def takes(self, prompt: Prompt) -> bool:
        return True

    @torch.inference_mode()
    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Answer]]:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        vision = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
        results: list[list[Answer]] = [[] for _ in images]
        pairs = [(i, prompt.phrase) for i, image_prompts in enumerate(prompts) for prompt in image_prompts]
        for chunk in _chunks(pairs, _PROMPTS_AT_ONCE):
            owners = [i for i, _ in chunk]
            text = self.processor.tokenizer(
                [phrase for _, phrase in chunk],
                padding="max_length",
                max_length=self._TEXT_TOKENS,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            outputs = self.model(
                vision_embeds=type(vision)(
                    fpn_hidden_states=tuple(level[owners] for level in vision.fpn_hidden_states),
                    fpn_position_encoding=tuple(level[owners] for level in vision.fpn_position_encoding),
                ),
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
            )
            outputs = type(outputs)(
                **{key: outputs[key].float() for key in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits")}
            )
            sizes = [(images[i].height, images[i].width) for i in owners]
            found = self.processor.post_process_instance_segmentation(
                outputs, threshold=self.threshold, target_sizes=sizes
            )
            for i, instances in zip(owners, found, strict=True):
                results[i].append(_union(instances["masks"].bool().cpu().numpy(), instances["scores"].tolist()))
        return results


def _union(masks: Sequence[np.ndarray], scores: Sequence[float]) -> Answer:
    """One mask for all instances of a phrase, with the best one's score; None and 0 where there are none."""
    return (np.logical_or.reduce(masks), max(scores)) if len(masks) else (None, 0.0)


class GroundedSamTeacher:
    """A zero-shot detector turns phrases into boxes, SAM boxes into masks ("Grounded SAM").

    A phrase that has a box already goes to SAM as it is. Otherwise its mask is the union of the masks of all boxes that
    score above `threshold`; its score is that of the best of them, the detector's score times SAM's predicted IoU. Each
    phrase is detected alone, so that its boxes do not depend on what else is asked about the image.

    Args:
        sam: turns boxes into masks.
        detector: folder or Hub id of a Transformers Grounding DINO, MM Grounding DINO, OWL-ViT or OWLv2.
        threshold: the detector's least score of a box; OWL's scores are lower than Grounding DINO's (0.1 is usual).
        device, dtype: of the detector.

    Raises:
        ValueError: if the detector is of another kind.
        OSError: if there is no such checkpoint.
    """

    def __init__(
        self,
        sam: SamTeacher,
        detector: str | os.PathLike,
        *,
        threshold: float = 0.3,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

        kinds = ("grounding-dino", "mm-grounding-dino", "owlvit", "owlv2")
        model_type = AutoConfig.from_pretrained(detector).model_type
        if model_type not in kinds:
            raise ValueError(f"{detector} is a {model_type}, but the detector must be one of {', '.join(kinds)}")
        self.sam = sam
        self.detector = AutoModelForZeroShotObjectDetection.from_pretrained(detector, dtype=dtype).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(detector)
        # OWL's processor tokenizes the phrases one by one, so they only come out equally long at full length.
        self._padding = "max_length" if model_type.startswith("owl") else "longest"
        self.threshold = threshold

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {
            **self.sam.settings,
            "teacher": "grounded-sam",
            "detector": _weights_digest(self.detector),
            "threshold": self.threshold,
        }

    def takes(self, prompt: Prompt) -> bool:
        return True

    @torch.inference_mode()
    def detect(self, image: Image.Image, phrases: Sequence[str]) -> list[tuple[list[list[float]], list[float]]]:
        """For each phrase the boxes `[x0, y0, x1, y1]` in pixels, within the image, and their scores."""
        found = []
        pixels = self.processor.image_processor(images=image, return_tensors="pt")
        for chunk in _chunks(phrases, _PROMPTS_AT_ONCE):
            # A full stop would end the phrase: Grounding DINO's captions are phrases with full stops between them.
            labels = [[" ".join(phrase.replace(".", " ").split())] for phrase in chunk]
            text = self.processor(text=labels, padding=self._padding, truncation=True, return_tensors="pt")
            inputs = {key: tensor.expand(len(chunk), *tensor.shape[1:]) for key, tensor in pixels.items()} | dict(text)
            inputs = {key: tensor.to(self.detector.device) for key, tensor in inputs.items()}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.detector.dtype)
            outputs = self.detector(**inputs)
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            detections = self.processor.post_process_grounded_object_detection(
                outputs,
                threshold=self.threshold,
                target_sizes=[(image.height, image.width)] * len(chunk),
                text_labels=labels,
            )
            for detection in detections:
                limit = torch.tensor([image.width, image.height] * 2, device=detection["boxes"].device)
                boxes = detection["boxes"].clamp(min=0).minimum(limit)
                inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)  # OWLv2 also looks at the square's padding
                found.append((boxes[inside].tolist(), detection["scores"][inside].tolist()))
        return found

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Answer]]:
        boxes: list[list[tuple[list[Any], list[float]]]] = []  # for each image and prompt: boxes and their scores
        for image, image_prompts in zip(images, prompts, strict=True):
            phrases = [prompt.phrase for prompt in image_prompts if prompt.box is None]
            detections = iter(self.detect(image, phrases) if phrases else [])
            boxes.append([next(detections) if p.box is None else ([p.box], [1.0]) for p in image_prompts])
        flat = [[Prompt("", tuple(box)) for found, _ in image_boxes for box in found] for image_boxes in boxes]
        results: list[list[Answer]] = []
        for image_boxes, answers in zip(boxes, self.sam.masks(images, flat), strict=True):
            rest = iter(answers)
            results.append([])
            for _, scores in image_boxes:
                masks, ious = zip(*itertools.islice(rest, len(scores)), strict=True) if scores else ((), ())
                results[-1].append(_union(masks, [iou * score for iou, score in zip(ious, scores, strict=True)]))
        return results


class GrabCutTeacher:
    """GrabCut (Rother et al., SIGGRAPH 2004) with boxes as prompts: it tells a thing by its colours, and has no weights.

    It looks at the box and half of the box's sides around it. All within a tenth of the sides around the box may be part of the
    thing, since a detector's box may cut some of it off; the rest is background.

    Scores are the IoU of the box and the mask's own bounding box: a right mask fills its box (Lempitsky et al., ICCV 2009),
    and where the thing's colours are those of the background, GrabCut's masks shrink to pieces or nothing.

    Raises:
        ImportError: if `opencv-python-headless` is not installed.
    """

    _SEEN = 0.5  # around the box, in parts of its sides
    _UNSURE = 0.1
    _ITERATIONS = 5

    def __init__(self) -> None:
        self.cv2 = _import_cv2()

    @property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "grabcut", "opencv": self.cv2.__version__}

    def takes(self, prompt: Prompt) -> bool:
        return prompt.box is not None

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Answer]]:
        return [
            [self._mask(np.asarray(image), prompt.box) for prompt in image_prompts if prompt.box is not None]
            for image, image_prompts in zip(images, prompts, strict=True)
        ]

    def _mask(self, image: np.ndarray, box: Sequence[float]) -> Answer:
        """The mask of a box that lies at least in part within an image, uint8 `(height, width, 3)`."""
        cv2 = self.cv2
        seen = _pixels(image, box, self._SEEN)
        labels = np.full(image.shape[:2], cv2.GC_BGD, dtype=np.uint8)
        labels[_pixels(image, box, self._UNSURE)] = cv2.GC_PR_BGD
        labels[_pixels(image, box)] = cv2.GC_PR_FGD
        cut = labels[seen].copy()
        if (cut == cv2.GC_PR_FGD).all():  # a box around the whole image leaves no background to learn from
            return None, 0.0
        # The clusters that it starts from are drawn at random: the same for each box, whatever was asked before it.
        cv2.setRNGSeed(0)
        models = np.zeros((2, 1, 65))
        pixels = np.ascontiguousarray(image[seen])
        cv2.grabCut(pixels, cut, (0, 0, 0, 0), models[0], models[1], self._ITERATIONS, cv2.GC_INIT_WITH_MASK)
        mask = np.zeros(image.shape[:2], dtype=bool)
        mask[seen] = cut == cv2.GC_PR_FGD
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        asked = clip_boxes_to_image(torch.tensor([box], dtype=torch.float64), mask.shape)
        found = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float64)
        return mask, box_iou(asked, found).item()


def _import_cv2() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{error}; for GrabCut and boxes: pip install opencv-python-headless") from error
    return cv2


def _pixels(image: np.ndarray, box: Sequence[float], grown: float = 0.0) -> tuple[slice, slice]:
    """All pixels that a box touches, once it is grown on each side by a part of its width and height: rows, columns."""
    slices = []
    for low, high, size in ((box[1], box[3], image.shape[0]), (box[0], box[2], image.shape[1])):
        margin = grown * (high - low)
        slices.append(slice(max(0, math.floor(low - margin)), min(size, math.ceil(high + margin))))
    return slices[0], slices[1]


def load_teacher(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    *,
    detector: str | os.PathLike | None = None,
    threshold: float | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> MaskTeacher:
    """Load one of `TEACHERS`.

    Args:
        name: `sam`, `sam3`, `grounded-sam` or `grabcut`.
        checkpoint: of SAM, a `.pth` file; of SAM 3, a folder or Hub id; GrabCut has none.
        detector: folder or Hub id of the detector of `grounded-sam`.
        threshold: the least score of an instance (`sam3`) or a box (`grounded-sam`); the teacher's own default if None.
        device: `cpu`, `cuda` or `auto`, the best there is; on several GPUs each process has its own.
        dtype: of the models.

    Raises:
        ValueError: for an unknown name or device, an option of another teacher, no checkpoint where one is needed, or that of
            another model.
        OSError: if a checkpoint is missing.
        ImportError: if a package is missing.
    """
    if name not in TEACHERS:
        raise ValueError(f"there is no mask teacher {name!r}; there are {', '.join(TEACHERS)}")
    if checkpoint is None and name != "grabcut":
        raise ValueError(f"{name} needs a checkpoint (--checkpoint); only grabcut has no weights and goes without")
    if checkpoint is not None and name == "grabcut":
        raise ValueError(f"grabcut has no weights, and takes no checkpoint; leave {checkpoint} out")
    if (detector is not None) != (name == "grounded-sam"):
        raise ValueError(f"a detector goes with grounded-sam and with no other teacher; got {name} with {detector}")
    if name in ("sam", "grabcut") and threshold is not None:
        raise ValueError(f"threshold is for phrases, and {name} starts from boxes; refuse bad masks with min_score")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, but must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA GPU here; use cpu or auto")
    state = _processes(cpu=device == "cpu")
    if checkpoint is None:
        return GrabCutTeacher()
    where = state.device if device == "auto" else torch.device(device, state.local_process_index * (device == "cuda"))
    options: dict[str, Any] = {"device": where, "dtype": dtype}
    if name == "sam":
        return SamTeacher(checkpoint, **options)
    if threshold is not None:
        options["threshold"] = threshold
    if name == "sam3":
        return Sam3Teacher(checkpoint, **options)
    options["detector"] = detector
    return GroundedSamTeacher(SamTeacher(checkpoint, device=where, dtype=dtype), **options)


def _processes(cpu: bool = False) -> PartialState:
    """This process among those that `accelerate launch` started, or alone. The first call decides about `cpu`."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(f"{error}; to add masks: pip install accelerate") from error
    # Who is done first waits for the others, and their share may take hours.
    return PartialState(cpu=cpu, timeout=timedelta(weeks=1))


# --- data sets ---


@dataclass
class _Asked:
    """An image and, for each prompt about it, where its answer goes: entries, their rows' outcomes, and their indices."""

    image: Image.Image
    prompts: dict[Prompt, list[tuple[dict[str, Any], list[str], int]]] = field(default_factory=dict)


def _decode_image(value: dict[str, Any], where: str) -> Image.Image:
    from datasets import Image as ImageFeature

    try:
        return ImageFeature().decode_example(value).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: its image cannot be read ({error}); repair the image or drop the row") from error


def _read_prompt(messages: Sequence[dict[str, Any]], entry: dict[str, Any], where: str) -> Prompt:
    """The phrase and the box of a grounding entry, checked as far as that goes without the image."""
    if not 0 <= entry["message"] < len(messages):
        raise ValueError(
            f"{where} is about message {entry['message']} of a row with {len(messages)} messages; mend it"
        )
    text = message_text(messages[entry["message"]])
    start, end, box = entry["start"], entry["end"], entry.get("box")
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise ValueError(f"{where}: characters {start} to {end} of its message are no phrase; mend the row")
    if box is not None and not (
        len(box) == 4 and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]
    ):
        raise ValueError(f"{where}: its box is {box}, but must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return Prompt(text[start:end].strip(), None if box is None else tuple(box))


def _mask_rows(
    texts: Dataset,
    images: Dataset,
    indices: range,
    teacher: MaskTeacher,
    batch_size: int,
    min_score: float,
    overwrite: bool,
    split: str,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `indices`, some at a time: `grounding` with masks, and the outcome of each entry.

    `texts` has the columns but for the images; `images` has these, in the format "arrow", so that none is decoded in vain.
    """
    rows: list[dict[str, Any]] = []
    asked: dict[bytes | str, _Asked] = {}  # by content: an image that many rows share is encoded once in a batch
    for index in indices:
        row = texts[index]
        messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
        grounding = row["grounding"] or []
        stored = None
        outcomes = ["kept"] * len(grounding)
        rows.append({"grounding": grounding, "outcomes": outcomes})
        for i, entry in enumerate(grounding):
            entry.setdefault("mask", None)
            entry.setdefault("score", None)
            if entry["mask"] is not None and not overwrite:
                continue
            where = f"row {index}{split and f' of {split}'}, grounding entry {i}"
            prompt = _read_prompt(messages, entry, where)
            if not teacher.takes(prompt):
                outcomes[i] = "not asked"
                continue
            if stored is None:
                stored = images[index]["images"][0].as_py() or []
            if not 0 <= entry["image"] < len(stored):
                raise ValueError(
                    f"{where} is about image {entry['image']} of a row with {len(stored)} images; mend it"
                )
            value = stored[entry["image"]]
            key = value["bytes"] or value["path"]
            if key not in asked:
                asked[key] = _Asked(_decode_image(value, where))
            width, height = asked[key].image.size
            if prompt.box and (
                prompt.box[2] <= 0 or prompt.box[3] <= 0 or prompt.box[0] >= width or prompt.box[1] >= height
            ):
                raise ValueError(f"{where}: its box {list(prompt.box)} lies outside its image of {width} x {height}")
            asked[key].prompts.setdefault(prompt, []).append((entry, outcomes, i))
        if len(asked) >= batch_size:
            _answer(asked, teacher, min_score)
            yield rows
            rows, asked = [], {}
    _answer(asked, teacher, min_score)
    yield rows


def _answer(asked: dict[bytes | str, _Asked], teacher: MaskTeacher, min_score: float) -> None:
    if not asked:
        return
    answers = teacher.masks([a.image for a in asked.values()], [list(a.prompts) for a in asked.values()])
    for one, image_answers in zip(asked.values(), answers, strict=True):
        for targets, (mask, score) in zip(one.prompts.values(), image_answers, strict=True):
            score = min(max(0.0, score), 1.0)  # a predicted IoU may lie a little outside; in this order NaN gives 0
            rle = mask_to_rle(mask) if mask is not None and mask.any() and score >= min_score else None
            for entry, outcomes, i in targets:
                entry["mask"], entry["score"] = rle, score
                outcomes[i] = "masked" if rle else "refused"


def add_masks(
    dataset: Dataset | DatasetDict,
    teacher: MaskTeacher,
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 8,
    min_score: float = 0.0,
    overwrite: bool = False,
    save_every: int = 100,
    attribution: str | None = None,
    progress: bool = True,
) -> tuple[Dataset | DatasetDict, Counter[str]]:
    """Add masks to a grounding data set, and write it as a new one: the same rows in the same order.

    Each entry of `grounding` that has no mask gets `mask` and `score`. Where the teacher finds nothing, or its score is
    below `min_score`, the mask stays None and the score says so; entries that the teacher cannot take (SAM: without a
    box) stay as they are.

    Work is saved in the folder `{output_dir}.partial`. If it stops, for whatever reason, the same call goes on where it
    stopped. Under `accelerate launch` each process does its share of the work, and the first one puts it together.

    Args:
        dataset: with the columns of `agevlm.processing.grounding`; others are kept.
        teacher: see `load_teacher`.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        batch_size: images that are encoded together.
        min_score: the least score of a mask.
        overwrite: ask for masks that are there already, too.
        save_every: rows after which work is saved.
        attribution: text for the data set's `ATTRIBUTION.md`.
        progress: show a progress bar.

    Returns:
        the data set as read back from `output_dir`, and the number of entries by outcome: `masked`, `refused` (nothing
        found, or below `min_score`), `kept` (had a mask already) and `not asked` (no box).

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder, or its partial folder holds work that was
            begun with another data set or other settings.
        ValueError: if a column is missing, a number is out of range, a row's image cannot be read, its phrase or its
            box is wrong, or the teacher can take no entry at all.
        ImportError: if `accelerate`, `datasets` or `pycocotools` is not installed.
    """
    try:
        import datasets
        import pycocotools.mask  # noqa: F401
        from datasets.arrow_writer import ArrowWriter
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(f"{error}; to add masks: pip install accelerate datasets pycocotools") from error

    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score is {min_score}, but must be in [0, 1]")
    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    splits = {split: part.with_format(None) for split, part in splits.items()}
    for split, part in splits.items():
        texts = {"messages"} if "messages" in part.column_names else {"prompt", "chosen"}
        if missing := {"images", "grounding", *texts} - set(part.column_names):
            raise ValueError(f"the data set{split and f' ({split})'} lacks the column(s) {', '.join(sorted(missing))}")
        if not isinstance(getattr(part.features["grounding"], "feature", None), dict):
            raise ValueError(f"grounding must be a list of entries, but is {part.features['grounding']}")
    state = _processes()
    output_dir = Path(output_dir).absolute()
    check_new_folder(output_dir)

    # All that decides the result, but for the batch size: who runs out of memory may go on with a smaller one.
    settings = {
        **teacher.settings,
        "dataset": {split: [part._fingerprint, len(part)] for split, part in splits.items()},
        "min_score": min_score,
        "overwrite": overwrite,
        "save_every": save_every,
    }
    work = output_dir.with_name(f"{output_dir.name}.partial")
    _begin(work, settings, state)
    shards = {
        (split, start): work / split / f"{start:09}.arrow"
        for split, part in splits.items()
        for start in range(0, len(part), save_every)
    }
    todo = [shard for shard, path in shards.items() if not path.is_file()]
    state.wait_for_everyone()  # all look before any writes, so that all deal the work alike

    own = row_features()["grounding"].feature
    features = {
        split: datasets.Features(
            grounding=datasets.List(
                {**part.features["grounding"].feature, "mask": own["mask"], "score": own["score"]}
            ),
            outcomes=datasets.List(datasets.Value("string")),
        )
        for split, part in splits.items()
    }
    with Progress(disable=not (progress and state.is_main_process)) as bar:
        share = todo[state.process_index :: state.num_processes]
        ranges = [range(start, min(start + save_every, len(splits[split]))) for split, start in share]
        task = bar.add_task("masks", total=sum(map(len, ranges)))
        for (split, start), indices in zip(share, ranges, strict=True):
            path = shards[split, start]
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            columns = [
                name for name in ("messages", "prompt", "chosen", "grounding") if name in splits[split].column_names
            ]
            texts = splits[split].select_columns(columns)
            images = splits[split].with_format("arrow").select_columns("images")
            with ArrowWriter(path=str(unfinished), features=features[split]) as writer:
                for rows in _mask_rows(texts, images, indices, teacher, batch_size, min_score, overwrite, split):
                    for row in rows:
                        writer.write(row)
                    bar.advance(task, len(rows))
                writer.finalize()
            unfinished.replace(path)
    state.wait_for_everyone()

    results = {
        split: [datasets.Dataset.from_file(str(path)) for (owner, _), path in shards.items() if owner == split]
        for split in splits
    }
    outcomes = Counter(
        outcome for parts in results.values() for part in parts for row in part["outcomes"] for outcome in row
    )
    state.wait_for_everyone()  # all have read before the work is deleted
    if outcomes["not asked"] and not outcomes["masked"] + outcomes["refused"]:
        if state.is_main_process:
            shutil.rmtree(work)
        raise ValueError(
            f"none of the {outcomes['not asked']} phrases without a mask has a box, and boxes are what this teacher"
            " starts from; use grounded-sam or sam3, which start from phrases"
        )
    if state.is_main_process:
        with new_folder(output_dir) as partial, _quiet(datasets):
            masked = datasets.DatasetDict()
            for split, part in splits.items():
                # The fingerprint that `datasets` would make up holds paths and times; this one depends on the rows.
                digest = hashlib.sha256(json.dumps([split, settings], sort_keys=True).encode()).hexdigest()[:16]
                masked[split] = _replace_grounding(part, results[split], digest)
            (masked if isinstance(dataset, datasets.DatasetDict) else masked[""]).save_to_disk(partial)
            if attribution:
                (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        shutil.rmtree(work)
    state.wait_for_everyone()
    return datasets.load_from_disk(output_dir), outcomes


def _replace_grounding(part: Dataset, results: Sequence[Dataset], fingerprint: str) -> Dataset:
    """A split with the grounding that is in `results`; nothing is read into memory, no image is encoded anew."""
    import datasets

    if not results:  # an empty split
        return part
    grounding = datasets.concatenate_datasets(results).select_columns("grounding")
    whole = datasets.concatenate_datasets([part.remove_columns("grounding"), grounding], axis=1)
    whole = whole.select_columns(part.column_names)
    return datasets.Dataset(whole.data, whole.info, part.split, whole._indices, fingerprint)


def _begin(work: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Make the folder for unfinished work, or find it as the same settings left it."""
    file = work / "settings.json"
    if state.is_main_process and not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        unfinished.replace(file)
    state.wait_for_everyone()
    begun = json.loads(file.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(settings))
    if others := [key for key in sorted(begun.keys() | ours.keys()) if begun.get(key) != ours.get(key)]:
        changes = "; ".join(f"{key} was {begun.get(key)} and is {ours.get(key)}" for key in others)
        raise FileExistsError(
            f"{work} holds work that was begun otherwise ({changes}); go on with what it was begun with, or delete"
            " the folder to begin anew"
        )


# --- how good they are ---

# Parts of a mask that are smaller than this part of its largest get no box: crumbs that the things in front of it left over.
_LEAST_PART = 0.05


def boxes_from_masks(
    dataset: Dataset | DatasetDict, jitter: float = 0.1, seed: int = 0, *, progress: bool = True
) -> Dataset | DatasetDict:
    """Grounding data with boxes in place of its exact masks: what a mask teacher would get, had a detector drawn the boxes.

    A phrase may name several things, and a box has one: the entry of a mask becomes one entry for each of its connected parts,
    with the part's bounding box; parts below a twentieth of the largest have none. Guidance joins the masks that a teacher
    makes of them, since entries of the same phrase and image are one. Things of a class that touch are one part, and one that
    another thing cuts in two is two parts. Entries without a mask, or with an empty one, stay as they are.

    Each side of a box is moved, in or out, by up to `jitter` times the box's extent across it (drawn evenly), though not out of
    the image. What is drawn depends on the seed and the mask alone: the same thing has the same box in all of its rows.

    Args:
        dataset: with the column `grounding`; the others, images included, are kept as they are.
        jitter: from 0, exact boxes, to below 0.5.
        seed: a non-negative number.
        progress: show a progress bar.

    Raises:
        ValueError: if a number is out of range, there is no `grounding`, no phrase has a mask, or a mask is damaged.
        ImportError: if `datasets` or `opencv-python-headless` is not installed.
    """
    from rich.progress import track

    datasets = import_datasets()
    cv2 = _import_cv2()
    if not 0 <= jitter < 0.5:
        raise ValueError(f"jitter is {jitter}, but must be from 0 to below 0.5, where a box could vanish")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be at least 0")

    @functools.lru_cache(maxsize=1024)  # a scene's masks come again in each of its rows
    def boxes(counts: str, height: int, width: int) -> list[list[float]]:
        mask = mask_from_rle({"size": [height, width], "counts": counts})
        parts = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:]
        if not len(parts):
            return []
        parts = parts[parts[:, cv2.CC_STAT_AREA] >= _LEAST_PART * parts[:, cv2.CC_STAT_AREA].max()]
        corners, sides = parts[:, :2], parts[:, 2:4]  # each x, y
        exact = np.concatenate([corners, corners + sides], axis=1)
        digest = hashlib.sha256(f"{height} {width} {counts}".encode()).digest()
        offsets = np.random.default_rng([seed, int.from_bytes(digest)]).uniform(-jitter, jitter, exact.shape)
        return np.clip(exact + offsets * np.tile(sides, 2), 0, [width, height] * 2).tolist()

    def replaced(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            rle = entry.get("mask")
            if rle is None:
                yield entry
                continue
            drawn = boxes(rle["counts"], *rle["size"])
            if not drawn:  # it says that the phrase names nothing here
                yield entry
            for box in drawn:
                yield {**entry, "box": box, "mask": None, "score": None}

    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    own = row_features()["grounding"].feature
    boxed = datasets.DatasetDict()
    for split, part in splits.items():
        if "grounding" not in part.column_names:
            raise ValueError(f"the data set{split and f' ({split})'} has no column grounding, and so no masks")
        part = part.with_format(None)
        rows = track(part["grounding"], f"boxes {split}", len(part), disable=not progress, transient=True)
        grounding = [list(replaced(entries or [])) for entries in rows]
        feature = {**part.features["grounding"].feature, **{key: own[key] for key in ("box", "mask", "score")}}
        column = datasets.Dataset.from_dict(
            {"grounding": grounding}, datasets.Features(grounding=datasets.List(feature))
        )
        # So that `add_masks` knows its unfinished work: the fingerprint that `datasets` would make up is another each time.
        digest = hashlib.sha256(json.dumps([part._fingerprint, jitter, seed]).encode()).hexdigest()[:16]
        boxed[split] = _replace_grounding(part, [column] if len(part) else [], digest)
    if not boxes.cache_info().misses:
        raise ValueError("no phrase of the data set has a mask to draw boxes around")
    return boxed if isinstance(dataset, datasets.DatasetDict) else boxed[""]


@dataclass(frozen=True)
class MaskQuality:
    """How good a teacher's masks are, by `mask_quality`. IoUs are of phrases that got a mask; NaN if none did."""

    phrases: int  # with an exact mask
    without_mask: int  # phrases that got no mask: guidance passes over them
    mean_iou: float
    median_iou: float
    below_half: float  # the part of the phrases with a mask whose IoU is below 0.5


def mask_quality(masked: Dataset, exact: Dataset, *, progress: bool = True) -> MaskQuality:
    """Hold a teacher's masks against exact ones: the IoU of each phrase, its entries joined as for guidance.

    Args:
        masked: what `add_masks` made of `boxes_from_masks(exact)`.
        exact: the same rows with exact masks; phrases that have none, or an empty one, do not count.
        progress: show a progress bar.

    Raises:
        ValueError: if the two are not of the same rows, no phrase has an exact mask, or a mask is damaged.
    """
    from rich.progress import track

    if len(masked) != len(exact):
        raise ValueError(
            f"the data set with masks has {len(masked)} rows, the exact one {len(exact)}; name the same rows"
        )
    columns = (part.with_format(None)["grounding"] for part in (masked, exact))
    ious: list[float] = []
    without = 0
    rows = track(zip(*columns, strict=True), "comparing", len(exact), disable=not progress, transient=True)
    for index, (ours, theirs) in enumerate(rows):
        found = _joined(ours)
        for phrase, wanted in _joined(theirs).items():
            if wanted is None or not wanted.any():
                continue
            mask = found.get(phrase)
            if phrase not in found or (mask is not None and mask.shape != wanted.shape):
                raise ValueError(
                    f"row {index}: the data set with masks has another phrase or image than the exact one"
                )
            if mask is None:
                without += 1
            else:
                ious.append(float((mask & wanted).sum() / (mask | wanted).sum()))
    if not ious and not without:
        raise ValueError("no phrase has an exact mask to compare with")
    values = np.array(ious or [math.nan])
    below = float((values < 0.5).mean()) if ious else math.nan
    return MaskQuality(len(ious) + without, without, float(values.mean()), float(np.median(values)), below)


def _joined(entries: list[dict[str, Any]] | None) -> dict[tuple[int, ...], np.ndarray | None]:
    """By phrase and image the union of the entries' masks, None where there is none."""
    joined: dict[tuple[int, ...], np.ndarray | None] = {}
    for entry in entries or ():
        phrase = tuple(entry[key] for key in ("message", "start", "end", "image"))
        joined.setdefault(phrase, None)
        if entry["mask"] is not None:
            mask, before = mask_from_rle(entry["mask"]), joined[phrase]
            joined[phrase] = mask if before is None else before | mask
    return joined


# --- looking at them ---


def draw_masks(dataset: Dataset, path: str | os.PathLike, rows: int = 6) -> None:
    """Write a PNG of some rows, evenly spread: an image, its masks in colours, and its phrases with their scores.

    Args:
        dataset: with masks; rows without any are passed over.
        path: of the PNG.
        rows: at most so many.

    Raises:
        ValueError: if no row has a mask.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    grounding = dataset.select_columns("grounding")
    masked = [i for i, row in enumerate(grounding) if any(e["mask"] for e in row["grounding"] or [])]
    if not masked:
        raise ValueError("no row has a mask, so there is nothing to draw")
    chosen = [masked[i] for i in np.linspace(0, len(masked) - 1, min(rows, len(masked))).round().astype(int)]
    columns = min(3, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 5 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, chosen, strict=False):
        row = dataset[index]
        shown = next(entry["image"] for entry in row["grounding"] if entry["mask"])
        entries = [entry for entry in row["grounding"] if entry["image"] == shown]
        image = row["images"][shown].convert("RGB")
        image.thumbnail((640, 640))
        axis.imshow(image)
        axis.set_title(f"row {index}", fontsize=10, loc="left")
        legend = []
        colours = iter([plt.get_cmap("tab10")(i % 10)[:3] for i in range(len(entries))])
        for entry in entries:
            phrase = message_text(row["messages"][entry["message"]])[entry["start"] : entry["end"]]
            score = "" if entry["score"] is None else f"  {entry['score']:.2f}"
            label = textwrap.fill(f"{phrase}{score}{'' if entry['mask'] else '  (no mask)'}", 48).replace("$", r"\$")
            if not entry["mask"]:
                legend.append(Patch(facecolor="none", edgecolor="grey", label=label))
                continue
            colour = next(colours)
            legend.append(Patch(color=colour, label=label))
            small = Image.fromarray(mask_from_rle(entry["mask"])).resize(image.size, Image.Resampling.NEAREST)
            mask = np.asarray(small)
            axis.imshow(np.where(mask[..., None], [*colour, 0.45], 0.0))
            if mask.any() and not mask.all():
                axis.contour(mask, [0.5], colors=[colour], linewidths=1.5)
        more = len(legend) - 8
        if more > 0:
            legend[8:] = [Patch(facecolor="none", edgecolor="none", label=f"and {more} more")]
        axis.legend(
            handles=legend, loc="upper left", bbox_to_anchor=(0, -0.01), frameon=False, fontsize=10, borderaxespad=0
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)
