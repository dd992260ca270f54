# SPDX-License-Identifier: Apache-2.0
"""The greedy-answer loop: what models answer, one by one and in batches, and runs that were stopped."""

from dataclasses import replace

import pytest
import torch
from evaluation_cases import TEXTS, age_vlm, llava, picture, some_questions
from PIL import Image

from agevlm.evaluation.answers import Question, answer
from agevlm.inference.generation import load_model, open_image, read_batch


@pytest.fixture(scope="module", params=[age_vlm, llava])
def parts(request):
    return request.param()


@pytest.mark.parametrize("batch_size", [2, 4, 9])
def test_answers_of_batches_are_those_of_each_question(parts, tmp_path, batch_size):
    model, processor = parts
    options = {"settings": {}, "max_new_tokens": 8, "progress": None}
    alone = answer(model, processor, some_questions(), tmp_path / "1.jsonl", batch_size=1, **options)
    batched = answer(model, processor, some_questions(), tmp_path / "2.jsonl", batch_size=batch_size, **options)
    assert (
        len({given["answer"] for given in alone.values()}) > 5
    )  # they depend on image and text, so that a mix-up would show
    assert batched == alone
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


@torch.no_grad()
def test_an_answer_is_greedy_decoding_of_the_rendered_conversation(parts, tmp_path):
    model, processor = parts
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXTS[0]}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    # The template of AGE-VLM writes the first token itself, and the tokenizer adds it to that of LLaVA.
    special = not prompt.startswith(processor.tokenizer.bos_token)
    inputs = processor(images=picture(0), text=prompt, add_special_tokens=special, return_tensors="pt")
    assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
    pixels = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    ids = inputs["input_ids"]
    for _ in range(6):
        token = model(input_ids=ids, **pixels).logits[:, -1]
        token[:, processor.image_token_id] = -torch.inf  # AGE-VLM never says it, and this LLaVA does not want to
        ids = torch.cat([ids, token.argmax(-1, keepdim=True)], dim=-1)
        if ids[0, -1] == processor.tokenizer.eos_token_id:
            break
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    # Sampling in the checkpoint's settings changes nothing.
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=2)
    options = {"settings": {}, "max_new_tokens": 6, "progress": None}
    try:
        answers = answer(model, processor, some_questions(1), tmp_path / "answers.jsonl", **options)
    finally:
        model.generation_config.update(do_sample=False, temperature=None, num_beams=1)
    assert answers == {"q/0": {"answer": expected}}


def test_a_run_that_was_stopped_goes_on(parts, tmp_path):
    model, processor = parts
    options = {"settings": {"model": "m"}, "max_new_tokens": 8, "progress": None}
    whole = answer(model, processor, some_questions(), tmp_path / "whole.jsonl", batch_size=2, **options)

    file = tmp_path / "stopped.jsonl"
    loaded = []

    def stopping_at(stop: int) -> list[Question]:
        def load(number: int) -> Image.Image:
            if number == stop:
                # What is done is on the disk by now, were this a power cut.
                assert len(file.read_bytes().splitlines()) == 1 + 4
                raise KeyboardInterrupt
            loaded.append(number)
            return picture(number)

        return [replace(question, load_image=lambda n=n: load(n)) for n, question in enumerate(some_questions())]

    with pytest.raises(KeyboardInterrupt):
        answer(model, processor, stopping_at(5), file, batch_size=2, **options)
    assert loaded == [0, 1, 2, 3, 4]  # images are loaded when their batch comes, not before
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:7])  # the power went off while the fourth answer was written
    loaded.clear()
    assert answer(model, processor, stopping_at(99), file, batch_size=4, **options) == whole
    assert loaded == [3, 4, 5, 6, 7, 8]
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    loaded.clear()
    assert answer(model, processor, stopping_at(0), file, **options) == whole  # no question remains
    assert loaded == []


def test_a_file_of_other_answers_is_refused(tmp_path):
    model, processor = age_vlm()
    file = tmp_path / "answers.jsonl"
    options = {"max_new_tokens": 2, "progress": None}
    answer(model, processor, some_questions(2), file, settings={"model": "a", "limit": None}, **options)
    before = file.read_bytes()

    def again(model=model, count=2, settings=("a", None), **changed):
        settings = dict(zip(("model", "limit"), settings, strict=True))
        return answer(model, processor, some_questions(count), file, settings=settings, **options | changed)

    assert again() == again(batch_size=1)
    message = (
        r"other settings \(model was 'a' and is 'b'\); resume it with its own settings, choose another output folder"
    )
    with pytest.raises(FileExistsError, match=message):
        again(settings=("b", None))
    with pytest.raises(FileExistsError, match=r"\(limit was None and is 3\)"):
        again(settings=("a", 3))
    with pytest.raises(FileExistsError, match="max_new_tokens was 2 and is 3"):
        again(max_new_tokens=3)
    with pytest.raises(FileExistsError, match="questions was"):
        again(count=3)
    file.write_bytes(before.replace(b'"model"', b'"seed": 1, "model"', 1))
    with pytest.raises(FileExistsError, match=r"other settings \(seed was 1 and is None\)"):
        again()
    file.write_bytes(before)
    other, _ = age_vlm(seed=1)  # trained anew, under the same name
    with pytest.raises(FileExistsError, match="weights was"):
        again(model=other)
    assert file.read_bytes() == before

    # Of a run that ended before its first answer: nothing is lost.
    file.write_bytes(before.splitlines(keepends=True)[0])
    found = again(model=other)
    assert found == again(model=other)
    file.write_bytes(before)

    file.write_bytes(before.replace(b'"answer"', b'"reply"', 1))
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: is damaged"):
        again()
    for content in (b"my notes", b"my notes\n", b"[]\n", b'{"settings": 3}\n', b"\xff\xfe\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of answers"):
            again()
        assert file.read_bytes() == content
    # The header itself was being written when the power went off.
    file.write_bytes(before[:20])
    again()
    assert file.read_bytes() == before


def test_what_cannot_be_asked(tmp_path):
    model, processor = age_vlm()
    file = tmp_path / "answers.jsonl"
    options = {"settings": {}, "progress": None}
    one = some_questions(1)
    with pytest.raises(ValueError, match="two questions have the key 'q/0'"):
        answer(model, processor, one * 2, file, **options)
    with pytest.raises(ValueError, match="at least 1, got 0 and"):
        answer(model, processor, one, file, batch_size=0, **options)
    broken = [Question("random/7", lambda: Image.open(tmp_path / "no.png"), "Cat?")]
    with pytest.raises(ValueError, match=r"question random/7: .*no\.png"):
        answer(model, processor, broken, file, **options)
    with pytest.raises(ValueError, match="no processor of images and text"):
        answer(model, processor.tokenizer, one, file, **options)
    processor.chat_template = None
    with pytest.raises(ValueError, match="AgeVlmProcessor has no chat template"):
        answer(model, processor, one, tmp_path / "other.jsonl", **options)
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("name", ["age_vlm", "llava"])
def test_loaded_models_answer_in_half_precision(folders, tmp_path, name):
    model, processor = load_model(str(folders / name), "cpu", "bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    answers = answer(
        model, processor, some_questions(3), tmp_path / "a.jsonl", settings={}, max_new_tokens=3, progress=None
    )
    assert len(answers) == 3


def test_nothing_is_written_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = age_vlm()
    options = {"max_new_tokens": 3, "progress": None}
    kept = answer(model, processor, some_questions(3), tmp_path / "a.jsonl", **options)
    (tmp_path / "a.jsonl").unlink()
    assert answer(model, processor, some_questions(3), **options) == kept
    assert not list(tmp_path.iterdir())


def test_what_is_inspected_stands_beside_the_answer(tmp_path):
    model, processor = age_vlm()
    seen = []

    def inspect(model, processor, questions, replies):
        assert [given.images[0].size for given in replies] == [q.open_image().size for q in questions]
        for question, given in zip(questions, replies, strict=True):
            assert question.text in given.prompt
            assert given.maps.text == given.prompt + given.text
            assert given.maps.maps.shape[:2] == (4, len(given.maps.ids))
            assert len(given.maps.grids) == 1
        seen.append([q.key for q in questions])
        return [{"length": len(q.text)} for q in questions]

    options = {"max_new_tokens": 2, "batch_size": 2, "inspect": inspect, "progress": None}
    given = answer(model, processor, some_questions(3), tmp_path / "a.jsonl", **options)
    assert seen == [["q/0", "q/1"], ["q/2"]]
    assert [found["length"] for found in given.values()] == [len(text) for text in TEXTS[:3]]
    assert answer(model, processor, some_questions(3), tmp_path / "a.jsonl", **options) == given
    assert len(seen) == 2, "what the file has is not inspected again"


def test_the_tower_sees_an_image_once_a_batch_whatever_is_asked_about_it():
    """Images are the same if their pixels and their padding are: not for blank images of different shapes."""
    model, processor = age_vlm()
    mean = tuple(round(255 * value) for value in processor.image_processor.image_mean)
    images = [picture(0), picture(1), picture(0), *(Image.new("RGB", size, mean) for size in ((32, 32), (32, 16)))]
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    questions = [Question(str(n), lambda image=image: image, TEXTS[n % 4]) for n, image in enumerate(images)]
    options = {"max_new_tokens": 6, "progress": None}
    together = answer(model, processor, questions, batch_size=5, **options)
    assert seen == [4]
    assert answer(model, processor, questions, batch_size=1, **options) == together
    assert len({found["answer"] for found in together.values()}) > 2


def test_transparent_images_are_composited_on_white(tmp_path):
    transparent = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    transparent.save(tmp_path / "image.png")
    question = Question("q", lambda: transparent, "Cat?")
    assert question.open_image().mode == "RGB"
    assert question.open_image().getpixel((0, 0)) == open_image(tmp_path / "image.png").getpixel((0, 0)) == (255,) * 3


def test_models_that_cannot_be_loaded(folders, monkeypatch):
    with pytest.raises(ValueError, match="no_template has no chat template"):
        load_model(str(folders / "no_template"))
    with pytest.raises(OSError, match=r"image processor for .*text_only"):
        load_model(str(folders / "text_only"))
    with pytest.raises(ValueError, match="auto, cpu or cuda, got 'tpu'"):
        load_model(str(folders / "age_vlm"), device="tpu")
    with pytest.raises(ValueError, match="got 'int8'"):
        load_model(str(folders / "age_vlm"), dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        load_model(str(folders / "age_vlm"), device="cuda")
    with pytest.raises(OSError, match="nowhere"):
        load_model(str(folders / "nowhere"))


def test_a_token_beyond_the_embedding_is_named():
    model, processor = age_vlm()
    rows = model.get_input_embeddings().num_embeddings
    processor.tokenizer.add_tokens([f"token{n}" for n in range(rows)], special_tokens=True)
    with pytest.raises(
        ValueError, match=f"the tokenizer writes 'token{rows - 1}', which the model's embedding of {rows} "
    ):
        read_batch(model, processor, ["Is there a dog?", f"A token{rows - 1}"])
    assert read_batch(model, processor, ["Is there a dog?"]).inputs["input_ids"].max() < rows
