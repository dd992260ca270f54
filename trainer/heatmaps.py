# SPDX-License-Identifier: Apache-2.0
"""Heat maps of some validation rows, as images in TensorBoard, Trackio and W&B."""

import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..attention.grid import image_grid
from ..attention.guidance import AnyTrainer
from ..inference.replies import block_titles
from ..plots import draw_heatmaps
from ..processing.collator import AgeVlmDataCollator, row_images
from ..processing.image_processing_agevlm import to_rgb
from .stages import base_model

logger = logging.get_logger(__name__)

_TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
# Among so many rows of the validation data, those with masks are looked for.
_LOOKED_AT = 256


class HeatmapsMixin(AnyTrainer):
    """After each evaluation, heat maps of the guided phrases of the first `args.eval_heatmaps` rows that have masks.

    They go to those of TensorBoard, Trackio and W&B that `report_to` names, under `eval/heatmap_0` and so on: a row for each
    phrase, with its mask, the map of each block and their mean. Rows with features in place of images are shown on their
    images. Not for sharded models (FSDP, DeepSpeed), whose forward pass needs all processes, and not for preferences.
    """

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = self.eval_dataset[data]
        if not isinstance(data, dict):  # of several data sets, each is evaluated by a call of its own
            self._log_heatmaps(data, metric_key_prefix)
        return metrics

    def _log_heatmaps(self, data: Iterable[Mapping[str, Any]], prefix: str) -> None:
        trackers = [callback for callback in self.callback_handler.callbacks if isinstance(callback, _TRACKERS)]
        collator = self.data_collator
        if (
            not (self.args.eval_heatmaps and trackers and self.is_world_process_zero())
            or not (isinstance(collator, AgeVlmDataCollator) and collator.grid is not None)
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        ):
            return
        with tempfile.TemporaryDirectory() as folder:
            files: list[str] = []
            try:
                for row in itertools.islice(data, _LOOKED_AT):
                    if len(files) == self.args.eval_heatmaps:
                        break
                    file = os.path.join(folder, f"{len(files)}.png")
                    if row.get("grounding") and self._draw_row(row, collator, file):
                        files.append(file)
            except ImportError as error:
                logger.warning_once(f"No heat maps are logged: {error}")
            for number, file in enumerate(files):
                for tracker in trackers:
                    _log_image(tracker, f"{prefix}/heatmap_{number}", file, self.state.global_step)

    @torch.no_grad()
    def _draw_row(self, row: Mapping[str, Any], collator: AgeVlmDataCollator, file: str) -> bool:
        """Draws the guided phrases of a row; False if it has none."""
        batch, problem = collator.try_row(dict(row))
        if batch is None or problem or "map_targets" not in batch:
            return False
        model = base_model(self.model)
        targets, grid = batch.pop("map_targets")[0], collator.grid
        assert grid is not None  # else there were no targets
        images = [to_rgb(image) for image in row_images(dict(row), collator.allow_urls)]
        features = {} if collator.features is None else {"mm_encoder_outputs": {"image": collator.features(images)}}
        names = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "map_queries")
        inputs = self._prepare_inputs({**{name: batch[name] for name in names if name in batch}, **features})
        training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            maps = model.base_model(**inputs, use_cache=False).cross_attention_maps[:, 0].float().cpu()
        model.train(training)
        size = grid[0] * grid[1]
        # The image that most of the masks are in.
        shown = int(targets.unflatten(-1, (-1, size)).sum((0, 2)).argmax())
        cells = slice(shown * size, (shown + 1) * size)
        mask = targets / targets.sum(-1, keepdim=True).clamp(min=1e-6)
        columns = torch.cat([mask[None], maps, maps.mean(0, keepdim=True)]).transpose(0, 1)  # (phrases, columns, V)
        over = image_grid(collator.processor, (images[shown].height, images[shown].width), grid)
        sink = None
        if model.config.get_text_config().cross_attention_sink:
            sink = (1 - columns.sum(-1)).clamp(min=0).numpy()
        queries = batch["map_queries"][0]
        decode = collator.processor.tokenizer.decode
        text = decode(batch["input_ids"][0][batch["attention_mask"][0].bool()], skip_special_tokens=True)
        draw_heatmaps(
            images[shown],
            over.show(columns[..., cells]).numpy(),
            ["mask", *block_titles(model), "average"],
            file,
            f"step {self.state.global_step}: {' '.join(text.split())}",
            labels=[decode(batch["input_ids"][0][query]).strip() for query in queries],
            cell=over.cell,
            sink=sink,
        )
        return True


def _log_image(tracker: Any, name: str, file: str, step: int) -> None:
    """Writes an image to the run that a callback of Transformers has opened, if it has."""
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            pixels = np.asarray(to_rgb(Image.open(file)))
            tracker.tb_writer.add_image(name, pixels, step, dataformats="HWC")
    elif isinstance(tracker, TrackioCallback):
        if tracker._initialized:
            tracker._trackio.log({name: tracker._trackio.Image(file), "train/global_step": step})
    elif tracker._initialized:
        tracker._wandb.log({name: tracker._wandb.Image(file), "train/global_step": step})
