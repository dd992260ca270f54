# SPDX-License-Identifier: Apache-2.0
"""Models whose outputs are not finite numbers are neither scored nor shown, by any command or function."""

import json

import pytest
import torch
from command_line import run
from evaluation_cases import age_vlm, llava, picture, some_questions, write_lines
from grounded_rows import filled
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessorList

from agevlm import attend
from agevlm.evaluation import Scenes, evaluate, evaluate_pope
from agevlm.evaluation.answers import answer
from agevlm.evaluation.similarity import measure_similarity
from agevlm.inference.generation import FiniteLogits
from agevlm.processing.rows import mask_to_rle

DAMAGES = {
    "the whole head": lambda model: model.get_output_embeddings().weight.data.fill_(torch.nan),
    "one number of the head": lambda model: model.get_output_embeddings().weight.data[3, 2:3].fill_(torch.nan),
    "an infinite number": lambda model: model.get_output_embeddings().weight.data[3, 2:3].fill_(torch.inf),
    "the tower": lambda model: next(model.model.vision_tower.parameters()).data.fill_(torch.nan),
    "the last norm": lambda model: model.get_decoder().norm.weight.data.fill_(torch.nan),
}


def damaged(build, damage):
    model, processor = build()
    DAMAGES[damage](model)
    return model, processor


@pytest.mark.parametrize("build", [age_vlm, llava])
@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_answered(tmp_path, build, damage):
    model, processor = damaged(build, damage)
    model.config.name_or_path = model.name_or_path = "runs/stage_2"
    # Transformers would make numbers of them, if a checkpoint says so.
    model.generation_config.remove_invalid_values = True
    with pytest.raises(
        ValueError, match=r"^runs/stage_2 .*NaN or infinity.* question q/0 \('Is there a dog\?'\).*diverged"
    ) as error:
        answer(model, processor, some_questions(3), tmp_path / "a.jsonl", max_new_tokens=3, progress=None)
    assert any(f"{name} is not finite" in str(error.value) for name, _ in model.named_parameters())
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1, "an answer was written"


def test_numbers_that_are_too_large_for_the_dtype(tmp_path):
    model, processor = age_vlm()
    model.get_output_embeddings().weight.data.fill_(1e38)
    with pytest.raises(
        ValueError, match=r"weights are finite, and too large for torch\.float32: choose a wider dtype"
    ):
        answer(model, processor, some_questions(1), max_new_tokens=3, progress=None)


def test_the_first_question_that_is_hit_is_named():
    """One image of a batch is damaged, as that of a tower that overflows: the other rows are finite."""
    model, processor = age_vlm()
    features = model.get_image_features

    def overflowing(*args, **kwargs):
        found = features(*args, **kwargs)
        found.pooler_output[2] = torch.inf
        return found

    model.get_image_features = overflowing
    with pytest.raises(ValueError, match="question q/2"):
        answer(model, processor, some_questions(4), batch_size=4, max_new_tokens=3, progress=None)


def test_logits_are_watched_without_waiting_for_the_device():
    """Tensors of the device `meta` have no values, so whoever asks for one raises."""
    watch = FiniteLogits()
    for _ in range(3):
        scores = torch.empty(2, 7, device="meta")
        assert watch(torch.zeros(2, 1), scores) is scores
    assert watch.rows.shape == (2,)
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(watch.rows.all())


def test_which_rows_are_finite():
    logits = torch.zeros(5, 6)
    logits[1, 2] = torch.nan
    logits[2, 3] = torch.inf
    logits[3, 1:] = -torch.inf  # tokens that are suppressed
    watch = FiniteLogits()
    for scores in (torch.zeros(5, 6), logits, torch.zeros(5, 6)):  # a later step heals nothing
        LogitsProcessorList([watch])(torch.zeros(5, 1), scores)
    assert watch.rows.tolist() == [True, False, False, True, True]


def scenes() -> "object":
    from datasets import Dataset

    from agevlm.data.scene_builder import scene_features

    row = dict.fromkeys(scene_features())
    image = picture(0)
    text = "Is there a dog?"
    mask = mask_to_rle(filled(image, (2, 2, 12, 12)))
    phrase = {"message": 0, "start": 11, "end": 14, "image": 0, "box": None, "mask": mask, "score": None}
    messages = [{"role": role, "content": said} for role, said in (("user", text), ("assistant", "Yes"))]
    row |= {
        "images": [image],
        "messages": messages,
        "grounding": [phrase],
        "answers": ["Yes"],
        "kind": "existence",
        "scene": 0,
    }
    return Dataset.from_list([row])


@pytest.mark.parametrize("damage", ["the whole head", "the tower"])
def test_no_function_measures_them(damage, pope_files):
    model, processor = damaged(age_vlm, damage)
    with pytest.raises(ValueError, match="question random/1"):
        evaluate_pope((model, processor), None, *pope_files, categories=["random"], max_new_tokens=2, progress=None)
    with pytest.raises(ValueError, match="question existence/1"):
        evaluate(Scenes(scenes()), (model, processor), max_new_tokens=2, progress=None)
    with pytest.raises(ValueError, match="the question 'Dog\\?'"):
        attend(model, processor, picture(0), "Dog?", phrases=["Dog"], max_new_tokens=2)


def test_maps_and_hidden_states_of_given_answers_are_checked_too():
    """They need no generation, and no head."""
    model, processor = damaged(age_vlm, "the tower")
    with pytest.raises(ValueError, match="the question 'Dog\\?'"):
        attend(model, processor, picture(0), "Dog?", "Yes")
    from datasets import Dataset

    rows = [
        {
            "images": [picture(n)],
            "messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": text}],
        }
        for n, text in enumerate(("a dog", "a cat", "a sofa"))
    ]
    with pytest.raises(ValueError, match="for the question 'What is 0\\?'"):
        measure_similarity(model, processor, Dataset.from_list(rows), progress=None)


@pytest.fixture(scope="module")
def diverged(folders, tmp_path_factory):
    """The folder of a checkpoint whose weights are all NaN."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "diverged"
    shutil.copytree(folders / "age_vlm", folder)
    file = folder / "model.safetensors"
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file, {"format": "pt"}
    )
    return folder


def test_no_command_scores_or_shows_them(monkeypatch, capsys, tmp_path, diverged, pope_files, cv_files):
    """Where all labels are yes, a diverged model used to be right everywhere: what it says counts as yes."""
    files, images = pope_files
    for file in files.glob("coco_pope_*.json"):
        write_lines(file, [json.loads(line) | {"label": "yes"} for line in file.read_text().splitlines()])
    picture(0).save(tmp_path / "picture.png")
    one = ["--model", diverged, "--image", tmp_path / "picture.png", "Is there a dog?"]
    out = tmp_path / "out"
    commands = {
        "random/1": ["eval", "pope", "--model", diverged, "--data", files / "coco_pope_random.json", "--images", images, "--out", out],
        "Count/1": ["eval", "cv-bench", "--model", diverged, "--data", cv_files, "--out", tmp_path / "cv_out"],
        "Is there a dog?": ["ask", *one],
        "Is there a dog": ["ask", *one, "--heatmap", tmp_path / "h.png"],
        "there a dog?": ["attention", *one, "--out", tmp_path / "attention"],
    }  # fmt: skip
    for place, command in commands.items():
        code, printed = run(monkeypatch, capsys, *command, "--max-new-tokens", 2)
        assert code == 2, printed
        printed = " ".join(printed.split())
        assert f"{diverged} computes numbers that are not finite" in printed
        assert place in printed
        assert "Traceback" not in printed
    assert not (out / "results.json").exists()
    assert not (tmp_path / "h.png").exists()
    assert not (tmp_path / "attention").exists()
