# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen vision tower: computed once, kept on disk, and given to training in place of pixels.

A [`FeatureStore`] is a folder with `settings.json`, which says what the features depend on, and safetensors files with the
features of some hundred images each. The header of each file lists the digests of its images, so that a file and its
part of the index appear together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from ..files import name_full_disk, set_ordinary_permissions, unfinished_folder
from ..modeling_agevlm.modeling_agevlm import AgeVlmImageFeatures
from ..processing.collator import row_images
from ..processing.processing_agevlm import AgeVlmProcessor
from ..processing.rows import ORIGIN_COLUMN
from ..resume import differences, digest, fingerprint, resume_or_refuse
from .readers import stored_images

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

COMMAND = "agevlm features RECIPE"

_SETTINGS = "settings.json"


class StoredImageFeatures(AgeVlmImageFeatures):
    """The features that a [`FeatureStore`] returns; the adapter computes their `pooler_output`."""

    def pin_memory(self) -> StoredImageFeatures:
        """A copy in page-locked memory. PyTorch's data loaders call it, because they cannot pin a `ModelOutput` themselves."""
        pinned: dict[str, Any] = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        return type(self)(**pinned)


class FeatureStore:
    """Features of images on disk, made by [`compute_features`] or `agevlm features`.

    Only the digests of the images are kept in memory; features are read when a batch needs them.

    Args:
        folder: that the features are in.

    Raises:
        FileNotFoundError: if there are no features in the folder.
        ValueError: if one of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / _SETTINGS).is_file():
            raise FileNotFoundError(f"There are no features in {self.folder}: compute them with `{COMMAND}`.")
        self.settings: dict[str, Any] = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
        self.grid: tuple[int, int] | None = None
        self._places: dict[str, tuple[Path, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                header = json.loads(opened.metadata()["agevlm"])
            self.grid = tuple(header["grid"])
            self._places.update({name: (file, row) for row, name in enumerate(header["images"])})
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it and run `{COMMAND}` again.") from error

    def __len__(self) -> int:
        """The number of different images."""
        return len(self._places)

    def __contains__(self, image: Image.Image) -> bool:
        return image_digest(image) in self._places

    def check(self, model: PreTrainedModel, processor: AgeVlmProcessor) -> None:
        """
        Raises:
            ValueError: if the features are of another vision tower or of an image processor with other settings, or if
                the model's tower trains, so that its features change with every step.
        """
        if changes := differences(self.settings, feature_settings(model, processor)):
            raise ValueError(
                f"The features in {self.folder} are of another vision tower or image processor ({changes}): name another "
                f"folder as `features`, and compute them with `{COMMAND}`."
            )
        if any(p.requires_grad for name, p in model.named_parameters() if "vision_tower." in name):
            raise ValueError(
                f"The vision tower trains, so the features in {self.folder} are wrong after the first step: leave out "
                "`features`, or choose a stage that freezes the tower."
            )

    def __call__(self, images: Sequence[Image.Image]) -> StoredImageFeatures:
        """Features of a batch of images, for the model's input `mm_encoder_outputs={"image": ...}`.

        Args:
            images: as they are before any processing.

        Returns:
            `last_hidden_state` `(images, tokens, vision_width)` in the tower's own type, `visual_attention_mask`
            `(images, tokens)` where the processor makes a mask of real pixels, and the `grid` of tokens, on the CPU.

        Raises:
            ValueError: if an image has no features.
        """
        names = [image_digest(image) for image in images]
        if missing := sum(name not in self._places for name in names):
            raise ValueError(
                f"{missing} of {len(names)} images of a batch have no features in {self.folder}: the data has changed. Run "
                f"`{COMMAND}` again, which computes the missing ones."
            )
        rows_of_file: dict[Path, list[int]] = defaultdict(list)  # positions in the batch
        for position, name in enumerate(names):
            rows_of_file[self._places[name][0]].append(position)
        found: dict[str, list[torch.Tensor]] = defaultdict(lambda: [torch.empty(0)] * len(names))
        for file, positions in rows_of_file.items():
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    stored = opened.get_slice(key)
                    for position in positions:
                        row = self._places[names[position]][1]
                        found[key][position] = stored[row : row + 1]
        return StoredImageFeatures(**{key: torch.cat(rows) for key, rows in found.items()}, grid=self.grid)


def image_digest(image: Image.Image) -> str:
    """A digest (32 hexadecimal digits) of an image's pixels as they are decoded, whatever file they come from."""
    sha = hashlib.sha256(repr((image.mode, image.size, image.info.get("transparency"), image.getpalette())).encode())
    sha.update(image.tobytes())
    return sha.hexdigest()[:32]


def feature_settings(model: PreTrainedModel, processor: AgeVlmProcessor) -> dict[str, Any]:
    """What features depend on beside the image: the tower's weights and configuration, and the image processor."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    general = PreTrainedConfig().to_dict()  # labels, version of Transformers and the like
    config = {k: v for k, v in model.config.vision_config.to_dict().items() if k not in general}
    preprocessing = processor.image_processor.to_dict()
    for name in ("auto_map", "processor_class"):
        preprocessing.pop(name, None)
    # Both backends have the same saved form, but not the same pixels.
    preprocessing["image_processor_type"] = type(processor.image_processor).__name__
    return {
        "vision_tower": {"weights": fingerprint(model.model.vision_tower), "configuration": digest([config])},
        "image_processor": preprocessing,
    }


@torch.no_grad()
def compute_features(
    model: PreTrainedModel,
    processor: AgeVlmProcessor,
    datasets: Iterable[Dataset],
    folder: str | os.PathLike,
    *,
    batch_size: int = 16,
    images_per_file: int = 256,
    allow_urls: bool = False,
    progress: bool = True,
) -> FeatureStore:
    """Computes the vision tower's features of all images of some data sets, and keeps them in a folder.

    A second call resumes after the last file. It skips images that already have features, whichever data set they
    came from.

    Args:
        model: with the vision tower, in evaluation mode; on any device.
        processor: of the model.
        datasets: of rows with `image`, `images` or neither.
        folder: for the store.
        batch_size: images that go through the tower together.
        images_per_file: images whose features are kept in memory, and lost by a stop.
        allow_urls: fetch images that the data name by a URL, from public addresses only.
        progress: show a progress bar.

    Raises:
        FileExistsError: if the folder holds features of another tower or image processor.
        ValueError: if an image cannot be read.
        OSError: if the features cannot be written.
    """
    folder = Path(folder)
    resume_or_refuse(folder / _SETTINGS, feature_settings(model, processor))
    store = FeatureStore(folder)
    tower = model.model.vision_tower
    if tower.device.type == "cpu":
        # Several times faster for depthwise convolutions; the values keep their meaning.
        tower.to(memory_format=torch.channels_last)
    waiting: dict[str, Image.Image] = {}
    names: list[str] = []
    computed: list[AgeVlmImageFeatures] = []

    def compute() -> None:
        if waiting:
            inputs = processor.image_processor(list(waiting.values()), return_tensors="pt").to(model.device)
            computed.append(model.get_image_features(**inputs, return_dict=True))
            names.extend(waiting)
            waiting.clear()

    def write() -> None:
        if names:
            store._add(_write(folder, work, names, computed))
            names.clear()
            computed.clear()

    with name_full_disk(folder), unfinished_folder(folder) as work:
        for name, image in _different_images(datasets, allow_urls, progress):
            if name in store._places or name in waiting or name in names:
                continue
            waiting[name] = image
            if len(waiting) == min(batch_size, images_per_file):
                compute()
            if len(names) >= images_per_file:
                write()
        compute()
        write()
    return store


def _different_images(
    datasets: Iterable[Dataset], allow_urls: bool, progress: bool
) -> Iterator[tuple[str, Image.Image]]:
    with Progress(disable=not progress) as bar:
        for dataset in datasets:
            columns = [name for name in ("image", "images", ORIGIN_COLUMN) if name in dataset.column_names]
            rows = stored_images(dataset.select_columns(columns))
            for number, row in enumerate(bar.track(rows, description="features", total=len(dataset))):
                try:
                    images = row_images(row, allow_urls)
                except ValueError as error:
                    origin = row.get(ORIGIN_COLUMN)
                    where = f"{origin['file']}, row {origin['row']}" if origin else f"Row {number}"
                    raise ValueError(f"{where}: {error}") from error
                for image in images:
                    yield image_digest(image), image


def _write(folder: Path, work: Path, names: Sequence[str], computed: Sequence[AgeVlmImageFeatures]) -> Path:
    """A file of features, named after its first image; it is in `work` until it is whole."""
    tensors = {
        key: torch.cat([features[key].cpu() for features in computed])
        for key in ("last_hidden_state", "visual_attention_mask")
        if computed[0].get(key) is not None
    }
    file = folder / f"{names[0]}.safetensors"
    header = json.dumps({"grid": computed[0].grid, "images": list(names)})
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, work / file.name, {"agevlm": header})
    except SafetensorError as error:
        raise OSError(f"Could not write {file}: {error}. Make room, and run `{COMMAND}` again.") from error
    set_ordinary_permissions(work / file.name)
    return (work / file.name).replace(file)
