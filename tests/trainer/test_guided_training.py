# SPDX-License-Identifier: Apache-2.0
"""What guidance is for: on held-out grounded scenes, phrases of a guided model look at their objects."""

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_training import tiny_processor, tiny_trainable

from agevlm import AgeVlmTrainer, AgeVlmTrainingArguments
from agevlm.data.scene_builder import build_scenes
from agevlm.evaluation import evaluate_scenes

pytestmark = pytest.mark.slow

COLORS = {"red": (255, 30, 30), "green": (20, 230, 20), "blue": (30, 30, 255), "yellow": (240, 240, 20)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Colored discs on gray backgrounds that training and test do not share."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "cutouts").mkdir()
    (folder / "backgrounds").mkdir()
    for name, color in COLORS.items():
        disc = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(disc).ellipse((2, 2, 61, 61), fill=(*color, 255))
        disc.save(folder / "cutouts" / f"{name}.png")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        noise = torch.randint(60, 130, (64, 64, 1), generator=generator, dtype=torch.uint8).expand(-1, -1, 3)
        Image.fromarray(noise.numpy()).save(folder / "backgrounds" / f"{i}.png")
    return build_scenes(
        folder / "cutouts",
        folder / "backgrounds",
        folder / "scenes",
        num_train=150,
        num_validation=1,
        num_test=60,
        image_size=64,
        max_objects=2,
        object_size=(0.25, 0.4),
        progress=False,
    )


def pointing(scenes, folder, guidance_weight: float) -> dict:
    """Held-out pointing of a model trained from the same seed for the same steps on the same rows."""
    torch.manual_seed(0)
    processor = tiny_processor()
    processor.image_processor.size = {"height": 64, "width": 64}
    model = tiny_trainable(gate=0.5)
    trainer = AgeVlmTrainer(
        model,
        AgeVlmTrainingArguments(
            output_dir=str(folder / str(guidance_weight)),
            stage=["adapter", "cross_attention", "vision"],
            guidance_weight=guidance_weight,
            learning_rate=3e-3,
            max_steps=60,
            per_device_train_batch_size=8,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        processing_class=processor,
        train_dataset=scenes["train"].filter(lambda kind: kind != "existence", input_columns="kind"),
    )
    trainer.train()
    options = {"batch_size": 32, "max_new_tokens": 1, "progress": None}
    return evaluate_scenes((model, processor), data=scenes["test"], **options).scores["pointing"]


def test_guidance_makes_phrases_look_at_their_objects(scenes, tmp_path):
    guided, unguided = (pointing(scenes, tmp_path, weight) for weight in (1.0, 0.0))
    assert guided["questions"] >= 100
    assert guided["score"] > 3 * guided["chance"]
    assert guided["score"] > unguided["score"] + 0.2
