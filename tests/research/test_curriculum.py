# SPDX-License-Identifier: Apache-2.0
"""The curriculum: what its batches hold, and that ready-made features train as pixels do."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import IMAGE, tiny_tokenizer
from tiny_models import tiny_llama, tiny_vision

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.data.features import image_features, scene_images
from agevlm.data.scene_builder import build_scenes
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE
from research.curriculum import STAGES, Curriculum, PlannedBatches, count_tokens, train_stages, without_vision
from research.rivals import ConcatenationForConditionalGeneration, ConcatenationTrainer

SIZE = 64  # pixels; the tiny tower makes 8x8 tokens of them


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for name, colour in {"dog": "red", "cat": "green", "sofa": "blue", "car": "yellow"}.items():
        file = folder / f"cutouts/{name}.png"
        file.parent.mkdir(exist_ok=True)
        image = Image.new("RGBA", (40, 40))
        image.paste(colour, (5, 5, 35, 35))
        image.save(file)
    (folder / "backgrounds").mkdir()
    for number in range(3):
        Image.new("RGB", (100, 90), (60 * number,) * 3).save(folder / f"backgrounds/{number}.png")
    numbers = {"num_train": 12, "num_validation": 1, "num_test": 1, "image_size": SIZE, "max_objects": 2}
    return build_scenes(folder / "cutouts", folder / "backgrounds", folder / "out", **numbers, progress=False)["train"]


def parts():
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    torch.manual_seed(0)
    model = from_parts(
        tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tiny_vision(),
        image_token_id=processor.image_token_id,
    )
    return model, processor


SHORT = Curriculum(steps=4, tokens_per_batch=200, stages=tuple(replace(stage, share=1 / 4) for stage in STAGES))


def test_batches_are_of_one_kind_and_about_as_long_as_asked(rows):
    lengths = count_tokens(parts()[1].tokenizer, rows)
    mixture = {"existence": 0.75, "objects": 0.25}
    planned = PlannedBatches(rows, lengths, 400, 300, mixture, seed=0)
    kinds = Counter()
    for batch in planned.batches:
        (kind,) = {rows[row]["kind"] for row in batch}
        kinds[kind] += 1
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= 300
    assert abs(kinds["existence"] / 400 - 0.75) < 0.1
    again, other = (PlannedBatches(rows, lengths, 400, 300, mixture, seed=seed).batches for seed in (0, 1))
    assert planned.batches == again != other
    with pytest.raises(ValueError, match=r"no rows of the kind\(s\) colours"):
        PlannedBatches(rows, lengths, 1, 300, {"colours": 1.0}, seed=0)


def test_every_stage_trains_and_guides_where_it_should(rows, tmp_path):
    model, processor = parts()
    done = []
    log = train_stages(model, processor, rows, tmp_path, SHORT, after_stage=done.append, quiet=True)
    assert done == [stage.name for stage in STAGES]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [entry["stage"] for entry in log] == done
    assert [entry["guided_phrases"] > 0 for entry in log] == [stage.guided for stage in STAGES]


@pytest.mark.parametrize("concatenates", [False, True])
def test_ready_made_features_train_as_pixels_do(rows, tmp_path, concatenates):
    """With the tower frozen throughout; the features are those of the scene's image."""
    losses = []
    for ready in (False, True):
        model, processor = parts()
        trainer = {}
        if concatenates:
            model = ConcatenationForConditionalGeneration.from_age_vlm(model)
            trainer = {"trainer_class": ConcatenationTrainer, "arguments": {"guidance_weight": 0.0}}
        features = None
        if ready:
            images = scene_images(rows)
            features = image_features(model, processor, [images[scene] for scene in range(len(images))])
            features.pooler_output = None
        curriculum = replace(SHORT, stages=without_vision(SHORT.stages))
        log = train_stages(model, processor, rows, tmp_path, curriculum, features=features, quiet=True, **trainer)
        losses.append([entry["loss"] for entry in log])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bfloat16 autocast


def test_features_and_a_tower_that_trains_do_not_go_together(rows, tmp_path):
    model, processor = parts()
    features = image_features(model, processor, [rows[0]["images"][0]])
    with pytest.raises(ValueError, match="without_vision"):
        train_stages(model, processor, rows, tmp_path, SHORT, features=features, quiet=True)
