# SPDX-License-Identifier: Apache-2.0
"""Mask teachers: they turn grounded phrases, or their boxes, into masks.

There are four teachers. `sam` (Segment Anything) and `grabcut` (GrabCut, which has no weights) start from boxes. `sam3`
starts from phrases. `grounded-sam` finds boxes for phrases with a zero-shot detector, and masks for boxes with SAM.
`agevlm.data.masks.add_masks` runs a teacher over a data set.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou, clip_boxes_to_image

from ..hub import load_pretrained, loading
from ..resume import fingerprint

if TYPE_CHECKING:
    from accelerate import PartialState
    from segment_anything.modeling import Sam

TEACHERS = ("sam", "sam3", "grounded-sam", "grabcut")

SAM_WEIGHTS = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"
"""Where the best of SAM's official checkpoints is (2.4 GB)."""

# Prompts in a batch. Each of their masks is decoded at the size of its image, in float32.
_PROMPT_BATCH = 16


@dataclass(frozen=True)
class Prompt:
    """A phrase that needs a mask, and its box `(x0, y0, x1, y1)` in pixels of the image, if it has one."""

    phrase: str
    box: tuple[float, float, float, float] | None = None


ScoredMask = tuple[np.ndarray | None, float]
"""A mask, bool `(height, width)` of its image's size, or None if the teacher finds nothing; and its score."""


class MaskTeacher(Protocol):
    """The interface of a teacher for `add_masks`."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the masks depend on, as values for JSON. Work of other settings is not resumed."""

    def accepts(self, prompt: Prompt) -> bool:
        """Whether this teacher can make a mask for such a prompt."""

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[ScoredMask]]:
        """The mask of each prompt, and the teacher's own estimate of its quality.

        Args:
            images: in RGB.
            prompts: for each image, prompts that this teacher accepts.

        Returns:
            for each image and prompt `(mask, score)`: bool `(height, width)` of the image's size, or None and a score of 0
            if the teacher finds nothing.
        """


def _batches(items: Sequence) -> Iterator[Sequence]:
    return (items[start : start + _PROMPT_BATCH] for start in range(0, len(items), _PROMPT_BATCH))


def load_sam(checkpoint: str | os.PathLike) -> Sam:
    """The `segment_anything` model of an official `.pth` checkpoint, float32 on the CPU. The weights determine its type.

    Raises:
        ImportError: if `segment-anything` is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but the weights of a SAM. Code in it is never run.
    """
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise ImportError(f"{error}; for masks from SAM: pip install segment-anything") from error
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"there is no SAM checkpoint {checkpoint}: the mask teachers sam and grounded-sam need SAM's weights (--checkpoint), one of "
            f"the official .pth files, such as {SAM_WEIGHTS}"
        )
    try:
        state_dict = torch.load(checkpoint, map_location="cpu", weights_only=True)
        shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"{checkpoint} is not a file of PyTorch weights only ({type(error).__name__}); pickled code is never run; use the"
            " official checkpoint"
        ) from error
    for build in dict.fromkeys(sam_model_registry.values()):
        with torch.device("meta"):  # the weights are assigned below
            model = build()
        if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}:
            model.load_state_dict(state_dict, assign=True)
            return model.float().requires_grad_(False).eval()
    types = ", ".join(name for name in sam_model_registry if name != "default")
    raise ValueError(f"{checkpoint} does not hold the weights of a SAM of the types {types}; use one of these")


@dataclass
class SamEmbedding:
    """An image encoded by SAM. Sizes are `(height, width)` in pixels."""

    features: torch.Tensor  # float32 (1, channels, rows, columns)
    input_size: tuple[int, int]  # of the resized image, without padding
    image_size: tuple[int, int]


class SamTeacher:
    """SAM ("Segment Anything") with boxes as prompts. Scores are SAM's own prediction of the mask's IoU.

    Args:
        checkpoint: an official `.pth` file; see `load_sam`.
        device: of the model.
        dtype: of the image encoder, which takes nearly all of the time; prompts and masks stay in float32.
    """

    def __init__(
        self, checkpoint: str | os.PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.model = load_sam(checkpoint).to(device)
        self.model.image_encoder.to(dtype)
        self.dtype = dtype

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "sam", "weights": fingerprint(self.model)}

    def accepts(self, prompt: Prompt) -> bool:
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
            float32: logits `(boxes, height, width)` of the image's size, whose mask is where they exceed `mask_threshold`,
            and the predicted IoU `(boxes,)`.
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

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[ScoredMask]]:
        results: list[list[ScoredMask]] = [[] for _ in images]
        with_prompts = [i for i, image_prompts in enumerate(prompts) if image_prompts]
        if not with_prompts:
            return results
        for i, embedding in zip(with_prompts, self.encode([images[i] for i in with_prompts]), strict=True):
            for boxes in _batches([prompt.box for prompt in prompts[i]]):
                logits, iou = self.decode(embedding, boxes)
                masks = (logits > self.model.mask_threshold).cpu().numpy()
                results[i] += zip(masks, iou.tolist(), strict=True)
        return results


class Sam3Teacher:
    """SAM 3 with phrases as prompts. It ignores boxes.

    A phrase may name several objects. Its mask is the union of all instances that score above `threshold`, its score is that
    of the best instance.

    Args:
        checkpoint: folder or Hub id of a Transformers SAM 3.
        threshold: the least score of an instance: SAM 3's score of its match with the phrase, times SAM 3's probability that
            the image shows what the phrase names.
        device, dtype: of the model.

    Raises:
        ValueError: if the checkpoint is of another model.
        OSError: if there is no such checkpoint.
    """

    _TEXT_TOKENS = 32  # the positions of SAM 3's text encoder

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        threshold: float = 0.5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        from transformers import AutoConfig, Sam3Model, Sam3Processor

        with loading(checkpoint) as place:
            model_type = AutoConfig.from_pretrained(place).model_type
        if model_type not in ("sam3", "sam3_video"):  # the published checkpoint holds both
            raise ValueError(f"{checkpoint} is a {model_type}, not a sam3; name a checkpoint such as facebook/sam3")
        self.model = load_pretrained(Sam3Model, checkpoint, dtype=dtype).to(device).eval()
        with loading(checkpoint) as place:
            self.processor = Sam3Processor.from_pretrained(place)
        self.threshold = threshold

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "sam3", "weights": fingerprint(self.model), "threshold": self.threshold}

    def accepts(self, prompt: Prompt) -> bool:
        return True

    @torch.inference_mode()
    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[ScoredMask]]:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        vision = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
        results: list[list[ScoredMask]] = [[] for _ in images]
        pairs = [(i, prompt.phrase) for i, image_prompts in enumerate(prompts) for prompt in image_prompts]
        for batch in _batches(pairs):
            owners = [i for i, _ in batch]
            text = self.processor.tokenizer(
                [phrase for _, phrase in batch],
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
            instances_of_prompts = self.processor.post_process_instance_segmentation(
                outputs, threshold=self.threshold, target_sizes=sizes
            )
            for i, instances in zip(owners, instances_of_prompts, strict=True):
                results[i].append(_union(instances["masks"].bool().cpu().numpy(), instances["scores"].tolist()))
        return results


def _union(masks: Sequence[np.ndarray], scores: Sequence[float]) -> ScoredMask:
    """The union of the masks of a phrase, with the best score; None and 0 if there are none."""
    return (np.logical_or.reduce(masks), max(scores)) if len(masks) else (None, 0.0)


class GroundedSamTeacher:
    """Grounded SAM: a zero-shot detector turns phrases into boxes, and SAM turns boxes into masks.

    A phrase with a box goes to SAM directly. Otherwise its mask is the union of the masks of all boxes that score above
    `threshold`. The score of a mask is the detector's score times SAM's predicted IoU; the phrase has the best of them. Each
    phrase is detected alone, so that its boxes do not depend on other phrases.

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

        types = ("grounding-dino", "mm-grounding-dino", "owlvit", "owlv2")
        with loading(detector) as place:
            model_type = AutoConfig.from_pretrained(place).model_type
        if model_type not in types:
            raise ValueError(f"{detector} is a {model_type}, but the detector must be one of {', '.join(types)}")
        self.sam = sam
        self.detector = load_pretrained(AutoModelForZeroShotObjectDetection, detector, dtype=dtype).to(device).eval()
        with loading(detector) as place:
            self.processor = AutoProcessor.from_pretrained(place)
        # OWL's processor tokenizes each phrase by itself, so only full length gives all of them the same length.
        self._padding = "max_length" if model_type.startswith("owl") else "longest"
        self.threshold = threshold

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {
            **self.sam.settings,
            "teacher": "grounded-sam",
            "detector": fingerprint(self.detector),
            "threshold": self.threshold,
        }

    def accepts(self, prompt: Prompt) -> bool:
        return True

    @torch.inference_mode()
    def detect(self, image: Image.Image, phrases: Sequence[str]) -> list[tuple[list[list[float]], list[float]]]:
        """For each phrase the boxes `[x0, y0, x1, y1]` in pixels, within the image, and their scores."""
        detections = []
        pixels = self.processor.image_processor(images=image, return_tensors="pt")
        for batch in _batches(phrases):
            # Without periods, which separate the phrases of Grounding DINO's captions.
            labels = [[" ".join(phrase.replace(".", " ").split())] for phrase in batch]
            text = self.processor(text=labels, padding=self._padding, truncation=True, return_tensors="pt")
            inputs = {key: tensor.expand(len(batch), *tensor.shape[1:]) for key, tensor in pixels.items()} | dict(text)
            inputs = {key: tensor.to(self.detector.device) for key, tensor in inputs.items()}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.detector.dtype)
            outputs = self.detector(**inputs)
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            results = self.processor.post_process_grounded_object_detection(
                outputs,
                threshold=self.threshold,
                target_sizes=[(image.height, image.width)] * len(batch),
                text_labels=labels,
            )
            for result in results:
                boxes = clip_boxes_to_image(result["boxes"], (image.height, image.width))
                inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)  # OWLv2 also finds boxes in the padding
                detections.append((boxes[inside].tolist(), result["scores"][inside].tolist()))
        return detections

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[ScoredMask]]:
        boxes: list[list[tuple[list[Any], list[float]]]] = []  # for each image and prompt: boxes and their scores
        for image, image_prompts in zip(images, prompts, strict=True):
            phrases = [prompt.phrase for prompt in image_prompts if prompt.box is None]
            detections = iter(self.detect(image, phrases) if phrases else [])
            boxes.append([next(detections) if p.box is None else ([p.box], [1.0]) for p in image_prompts])
        sam_prompts = [[Prompt("", tuple(box)) for found, _ in image_boxes for box in found] for image_boxes in boxes]
        results: list[list[ScoredMask]] = []
        for image_boxes, sam_masks in zip(boxes, self.sam.masks(images, sam_prompts), strict=True):
            remaining = iter(sam_masks)
            results.append([])
            for _, scores in image_boxes:
                masks, ious = zip(*itertools.islice(remaining, len(scores)), strict=True) if scores else ((), ())
                results[-1].append(_union(masks, [iou * score for iou, score in zip(ious, scores, strict=True)]))
        return results


class GrabCutTeacher:
    """GrabCut (Rother et al., SIGGRAPH 2004) with boxes as prompts. It separates an object from the background by color, and
    has no weights.

    It uses the box and a margin of half of the box's sides. The object may reach into the margin by a tenth of the sides, since
    a detector's box may cut off a part of it. The rest of the margin is background.

    Scores are the IoU of the box and the mask's own bounding box. A correct mask fills its box (Lempitsky et al., ICCV 2009);
    if the object has the background's colors, GrabCut's mask shrinks to pieces or to nothing.

    Raises:
        ImportError: if `opencv-python-headless` is not installed.
    """

    _MARGIN = 0.5  # relative to the box's sides
    _POSSIBLE_MARGIN = 0.1  # the part of it that the object may reach into
    _ITERATIONS = 5

    def __init__(self) -> None:
        self.cv2 = import_cv2()

    @property
    def settings(self) -> dict[str, Any]:
        return {"teacher": "grabcut", "opencv": self.cv2.__version__}

    def accepts(self, prompt: Prompt) -> bool:
        return prompt.box is not None

    def masks(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[ScoredMask]]:
        return [
            [self._mask(np.asarray(image), prompt.box) for prompt in image_prompts if prompt.box is not None]
            for image, image_prompts in zip(images, prompts, strict=True)
        ]

    def _mask(self, image: np.ndarray, box: Sequence[float]) -> ScoredMask:
        """The mask of a box that lies at least in part within an image, uint8 `(height, width, 3)`."""
        cv2 = self.cv2
        window = _box_pixels(image, box, self._MARGIN)
        labels = np.full(image.shape[:2], cv2.GC_BGD, dtype=np.uint8)
        labels[_box_pixels(image, box, self._POSSIBLE_MARGIN)] = cv2.GC_PR_BGD
        labels[_box_pixels(image, box)] = cv2.GC_PR_FGD
        window_labels = labels[window].copy()
        if (window_labels == cv2.GC_PR_FGD).all():  # a box around the whole image leaves no background to learn from
            return None, 0.0
        # Initial clusters are drawn at random. With this seed a box's mask does not depend on earlier boxes.
        cv2.setRNGSeed(0)
        models = np.zeros((2, 1, 65))
        pixels = np.ascontiguousarray(image[window])
        cv2.grabCut(pixels, window_labels, (0, 0, 0, 0), models[0], models[1], self._ITERATIONS, cv2.GC_INIT_WITH_MASK)
        mask = np.zeros(image.shape[:2], dtype=bool)
        mask[window] = window_labels == cv2.GC_PR_FGD
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        clipped_box = clip_boxes_to_image(torch.tensor([box], dtype=torch.float64), mask.shape)
        mask_box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float64)
        return mask, box_iou(clipped_box, mask_box).item()


def import_cv2() -> ModuleType:
    """OpenCV, imported when it is needed.

    Raises:
        ImportError: if it is not installed; names the command that installs it.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{error}; for GrabCut and boxes: pip install opencv-python-headless") from error
    return cv2


def _box_pixels(image: np.ndarray, box: Sequence[float], margin: float = 0.0) -> tuple[slice, slice]:
    """The rows and columns that a box touches, with a margin on each side relative to its height and width."""
    slices = []
    for low, high, size in ((box[1], box[3], image.shape[0]), (box[0], box[2], image.shape[1])):
        extra = margin * (high - low)
        slices.append(slice(max(0, math.floor(low - extra)), min(size, math.ceil(high + extra))))
    return slices[0], slices[1]


def process_state(cpu: bool = False) -> PartialState:
    """This process's place among those that `accelerate launch` started. Only the first call can choose `cpu`.

    Raises:
        ImportError: if `accelerate` is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(f"{error}; to add masks: pip install accelerate") from error
    # The first process to finish waits for the others, which may need hours.
    return PartialState(cpu=cpu, timeout=timedelta(weeks=1))


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
        device: `cpu`, `cuda` or `auto`, the best device available. With several GPUs each process has its own.
        dtype: of the models.

    Raises:
        ValueError: for an unknown name or device, an option of another teacher, a missing checkpoint, or a checkpoint of
            another model.
        OSError: if a checkpoint is missing.
        ImportError: if a package is missing.
    """
    if name not in TEACHERS:
        raise ValueError(f"there is no mask teacher {name!r}; choose one of: {', '.join(TEACHERS)}")
    if checkpoint is None and name != "grabcut":
        needed = "facebook/sam3, or a folder with it" if name == "sam3" else f"SAM's .pth file, such as {SAM_WEIGHTS}"
        raise ValueError(f"{name} needs a checkpoint (--checkpoint): {needed}; only grabcut has no weights")
    if checkpoint is not None and name == "grabcut":
        raise ValueError(f"grabcut has no weights and no checkpoint; remove {checkpoint}")
    if (detector is not None) != (name == "grounded-sam"):
        raise ValueError(
            f"grounded-sam needs a detector (--detector), and other teachers have none; got {name} with {detector}"
        )
    if name in ("sam", "grabcut") and threshold is not None:
        raise ValueError(f"threshold is for phrases, but {name} starts from boxes; reject bad masks with min_score")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, but must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA GPU; use cpu or auto")
    state = process_state(cpu=device == "cpu")
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
