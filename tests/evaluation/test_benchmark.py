# SPDX-License-Identifier: Apache-2.0
"""POPE and CV-Bench: metrics worked by hand, answers of models, and the commands from end to end."""

import json
import random
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE, tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryPrecision, BinaryRecall
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, cli, from_parts
from agevlm.evaluation import benchmark as answering
from agevlm.evaluation.benchmark import Question, answer, load_model
from agevlm.evaluation.cv_bench import CvBenchQuestion, parse_choice, read_cv_bench, score_cv_bench
from agevlm.evaluation.pope import PopeQuestion, parse_yes_no, read_pope, score_pope, yes_no_scores
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE

SIZE = 32  # pixels
LLAVA_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def age_vlm(seed=0):
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    llama = tiny_llama(seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id)
    return open_gates(model), processor


def llava():
    """Transformers' LLaVA: a CLIP tower with a class token that is left out, a projector, a Llama."""
    tokenizer = tiny_tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=LLAVA_TEMPLATE,
    )
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=8, initializer_range=0.5, **small),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=256, **small
        ),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if "embed_tokens" in name or "multi_modal_projector" in name:
            weight.data *= 8  # otherwise greedy decoding falls into repeating one token, whatever the image
    return model, processor


@pytest.fixture(scope="module", params=[age_vlm, llava])
def parts(request):
    return request.param()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both models as checkpoints; AGE-VLM's processor again without its template."""
    place = tmp_path_factory.mktemp("models")
    for build in (age_vlm, llava):
        for part in build():
            part.save_pretrained(place / build.__name__)
    model, processor = age_vlm()
    model.save_pretrained(place / "no_template")
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(place / "no_template")
    tiny_llama(vocab_size=len(processor.tokenizer)).save_pretrained(place / "text_only")
    processor.tokenizer.save_pretrained(place / "text_only")
    return place


def picture(seed: int) -> Image.Image:
    """Of another shape and other colours for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((30 + 7 * (seed % 4), 50 - 5 * (seed % 3)))


TEXTS = ["Is there a dog?", "Is there a white cat on the red sofa in this image?", "Cat?", "How many cats are there?"]


def some_questions(count: int = 9) -> list[Question]:
    return [
        Question(f"q/{number}", lambda number=number: picture(number), TEXTS[number % 4]) for number in range(count)
    ]


# --- answers ---


@pytest.mark.parametrize("batch_size", [2, 4, 9])
def test_answers_of_batches_are_those_of_each_question(parts, tmp_path, batch_size):
    model, processor = parts
    options = {"settings": {}, "max_new_tokens": 8, "progress": None}
    alone = answer(model, processor, some_questions(), tmp_path / "1.jsonl", batch_size=1, **options)
    batched = answer(model, processor, some_questions(), tmp_path / "2.jsonl", batch_size=batch_size, **options)
    assert len(set(alone.values())) > 5  # they depend on image and text, so that a mix-up would show
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
    pixels = {name: value for name, value in inputs.items() if name.startswith("pixel")}
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
    assert answers == {"q/0": expected}


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

        return [question._replace(load_image=lambda n=n: load(n)) for n, question in enumerate(some_questions())]

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
    assert answer(model, processor, stopping_at(0), file, **options) == whole  # nothing is left to ask
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
    with pytest.raises(ValueError, match=r"another run \(model was 'a', is 'b'\); choose another output folder"):
        again(settings=("b", None))
    with pytest.raises(ValueError, match=r"\(limit was None, is 3\)"):
        again(settings=("a", 3))
    with pytest.raises(ValueError, match="max_new_tokens was 2, is 3"):
        again(max_new_tokens=3)
    with pytest.raises(ValueError, match="questions was"):
        again(count=3)
    file.write_bytes(before.replace(b'"model"', b'"seed": 1, "model"', 1))
    with pytest.raises(ValueError, match=r"another run \(seed was 1, is None\)"):
        again()
    file.write_bytes(before)
    other, _ = age_vlm(seed=1)  # trained anew, under the same name
    with pytest.raises(ValueError, match="weights was"):
        again(model=other)
    assert file.read_bytes() == before

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


# --- POPE's rules and metrics ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("Yes, there is a dog in the image.", "yes"),
        ("No, there is no dog in the image.", "no"),
        ("There is not a dog, but a cat.", "no"),
        ("No.", "no"),
        ("Yes. There is no cat, though.", "yes"),  # only the first sentence counts
        ("The image shows a dog. No cat.", "yes"),
        (",no,", "no"),  # commas are removed, not spaces
        ("yes,no", "yes"),  # "yesno" is neither word
        ("Nothing is there", "yes"),  # words, not parts of words
        ("NO", "yes"),  # the official list has No, no and not
        ("No!", "yes"),  # nor are other marks removed
        ("", "yes"),
        ("Yes\nno", "yes"),  # words are parted by spaces alone
        (".No", "yes"),  # the first sentence is empty
    ],
)
def test_yes_or_no(text, expected):
    assert parse_yes_no(text) == expected


def test_yes_no_scores_worked_by_hand():
    # TP 3, FN 1, FP 2, TN 4: precision 3/5, recall 3/4, F1 2 * 0.6 * 0.75 / 1.35 = 2/3
    answers = ["Yes", "yes", "Yes, a dog.", "No", "It is.", "Yes", "No", "no", "There is not.", "No, none."]
    labels = ["yes"] * 4 + ["no"] * 6
    assert yes_no_scores(answers, labels) == pytest.approx(
        {
            "questions": 10,
            "accuracy": 0.7,
            "precision": 0.6,
            "recall": 0.75,
            "f1": 2 / 3,
            "yes_ratio": 0.5,
            "neither": 1,  # "It is."
        }
    )


@pytest.mark.parametrize(
    ("answers", "labels", "precision", "recall"),
    [
        (["no", "no"], ["yes", "no"], 0, 0),  # nothing was said to be there
        (["yes", "no"], ["no", "no"], 0, 0),  # nothing is there
        (["no", "no"], ["no", "no"], 0, 0),
        (["yes", "yes"], ["yes", "yes"], 1, 1),
    ],
)
def test_yes_no_scores_without_a_denominator(answers, labels, precision, recall):
    scores = yes_no_scores(answers, labels)
    assert (scores["precision"], scores["recall"]) == (precision, recall)
    assert scores["f1"] == (precision + recall) / 2


def test_yes_no_scores_are_those_of_torchmetrics():
    rng = random.Random(0)
    cases = [[("yes", "no"), ("no", "no")]]
    for _ in range(50):
        share, skill = rng.random(), rng.random()
        labels = ["yes" if rng.random() < share else "no" for _ in range(rng.randint(1, 40))]
        cases.append([(label if rng.random() < skill else rng.choice(["yes", "no"]), label) for label in labels])
    metrics = {
        "accuracy": BinaryAccuracy(),
        "precision": BinaryPrecision(),
        "recall": BinaryRecall(),
        "f1": BinaryF1Score(),
    }
    for case in cases:
        answers, labels = zip(*case, strict=True)
        scores = yes_no_scores(answers, labels)
        said, there = (torch.tensor([value == "yes" for value in values]).int() for values in (answers, labels))
        for name, metric in metrics.items():
            assert scores[name] == pytest.approx(float(metric(said, there))), name
        assert scores["yes_ratio"] == pytest.approx(float(said.float().mean()))


def test_pope_scores_are_means_of_the_categories():
    """Each category counts as much, however many questions it has."""
    plan = {"random": [("yes", "Yes"), ("no", "No"), ("no", "No"), ("yes", "Maybe")], "popular": [("no", "Yes")]}
    questions, answers = [], {}
    for category, pairs in plan.items():
        for number, (label, text) in enumerate(pairs):
            questions.append(PopeQuestion(f"{category}/{number}", category, "?", label, lambda: picture(0)))
            answers[f"{category}/{number}"] = text
    scores = score_pope(questions, answers)
    assert scores["random"] == yes_no_scores(["Yes", "No", "No", "Maybe"], ["yes", "no", "no", "yes"])
    assert scores["mean"] == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.75, "questions": 5, "neither": 1,
    }  # fmt: skip


def test_yes_no_scores_refuse_nonsense():
    for answers, labels in ([], []), (["yes"], ["yes", "no"]):
        with pytest.raises(ValueError, match="one label for each"):
            yes_no_scores(answers, labels)
    with pytest.raises(ValueError, match="yes or no, got 'maybe'"):
        yes_no_scores(["yes"], ["maybe"])


# --- CV-Bench's rules and metrics ---

CHAIRS = ("red chair", "chair", "dining table", "table")


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        # Forms in lmms-eval's and Cambrian's scripts, which read the same letter from them.
        ("A", CHAIRS, "A"),
        ("a", CHAIRS, "A"),
        ("(B)", CHAIRS, "B"),
        ("(b) red chair", CHAIRS, "B"),
        ("B) red chair", CHAIRS, "B"),
        ("C.", CHAIRS, "C"),
        ("D: the table", CHAIRS, "D"),
        ("A, because it is in front", CHAIRS, "A"),
        ("B because the dining table is behind it", CHAIRS, "B"),
        ("The answer is (C).", CHAIRS, "C"),
        ("Answer: D", CHAIRS, "D"),
        ("The answer is (A)? No, the answer is B.", CHAIRS, "B"),  # the last one
        ("A\nBecause the table is behind it.", CHAIRS, "A"),
        (" **B** ", CHAIRS, "B"),
        ("'C'", CHAIRS, "C"),
        ("(A) red chair\n(B) chair", CHAIRS, "A"),  # repeats the choices: the first, as Cambrian's
        ("3", ("4", "3", "12"), "B"),
        # Letters inside.
        ("It must be (D), I think.", CHAIRS, "D"),
        ("Either (A) or (B).", CHAIRS, None),
        ("I see (E).", CHAIRS, None),  # there is no such choice
        # In words.
        ("The Red Chair is closer.", CHAIRS, "A"),
        ("the chair", CHAIRS, "B"),
        ("dining table.", CHAIRS, "C"),
        ("A table is closer.", CHAIRS, "D"),  # an article, no choice
        ("Between the chair and the table.", CHAIRS, None),
        ("There are 12 of them", ("1", "2", "12"), "C"),
        ("There are 2.", ("1", "2", "12"), "B"),
        ("above", ("below", "above"), "B"),  # Cambrian's first letter would make A of it
        ("A is closer", CHAIRS, "A"),
        ("A chair and a table", CHAIRS, None),
        ("The red chair", ("red", "red chair"), "B"),
        # Nothing.
        ("", CHAIRS, None),
        ("E", CHAIRS, None),
        ("chairs", CHAIRS, None),
        ("I do not know.", CHAIRS, None),
    ],
)
def test_choice(text, choices, expected):
    assert parse_choice(text, choices) == expected


def cv_question(task, source, number, letter="A", choices=("one", "two")):
    return CvBenchQuestion(f"{task}/{number}", task, source, "?", choices, letter, lambda: picture(0))


def cv_case():
    """Right: ADE20K 3 of 4, COCO 1 of 2, Omni3D 2 of 5."""
    questions, answers = [], {}
    plan = [
        ("Count", "ADE20K", "11"),
        ("Relation", "ADE20K", "10"),
        ("Relation", "COCO", "10"),
        ("Depth", "Omni3D", "10x"),
        ("Distance", "Omni3D", "10"),
    ]
    for task, source, outcomes in plan:
        for outcome in outcomes:
            question = cv_question(task, source, len(questions), "AB"[len(questions) % 2])
            right = question.letter
            wrong = "BA"["AB".index(right)]
            questions.append(question)
            answers[question.key] = {"1": f"({right})", "0": wrong, "x": "hm"}[outcome]
    return questions, answers


def accuracies(scores):
    return {name: row["accuracy"] for name, row in scores.items()}


def test_cv_bench_scores_worked_by_hand():
    scores = score_cv_bench(*cv_case())
    assert accuracies(scores) == pytest.approx(
        {
            "ADE20K": 3 / 4,
            "COCO": 1 / 2,
            "Omni3D": 2 / 5,
            "2D": 5 / 8,  # (3/4 + 1/2) / 2, where all 2D questions together would give 4/6
            "3D": 2 / 5,
            "overall": 41 / 80,  # (5/8 + 2/5) / 2, where all questions together would give 6/11
            "Count": 1,
            "Relation": 1 / 2,
            "Depth": 1 / 3,
            "Distance": 1 / 2,
        }
    )
    assert {name: row["questions"] for name, row in scores.items()} == {
        "overall": 11, "2D": 6, "3D": 5, "ADE20K": 4, "COCO": 2, "Omni3D": 5,
        "Count": 2, "Relation": 4, "Depth": 3, "Distance": 2,
    }  # fmt: skip
    unparsed = {name for name, row in scores.items() if row["unparsed"]}
    assert unparsed == {"overall", "3D", "Omni3D", "Depth"}


def test_cv_bench_scores_of_parts():
    questions, answers = cv_case()
    scores = score_cv_bench([question for question in questions if question.task == "Relation"], answers)
    expected = {"overall": None, "2D": 0.5, "3D": None, "ADE20K": 0.5, "COCO": 0.5, "Relation": 0.5}
    assert accuracies(scores) == expected
    scores = score_cv_bench([question for question in questions if question.source == "ADE20K"], answers)
    assert accuracies(scores) == {
        "overall": None, "2D": None, "3D": None, "ADE20K": 0.75, "Count": 1, "Relation": 0.5,
    }  # fmt: skip


# --- data, as the authors and the Hub have it ---

OBJECTS = ["dog", "cat", "sofa", "brown dog"]


def pope_rows(category: str) -> list[dict]:
    """Four questions about two images, as in coco_pope_*.json; the categories differ in their objects."""
    shift = ["random", "popular", "adversarial"].index(category)
    return [
        {
            "question_id": number + 1,
            "image": f"COCO_val2014_{number // 2:012d}.jpg",
            "text": f"Is there a {OBJECTS[(number + shift) % 4]} in the image?",
            "label": "yes" if number % 2 == 0 else "no",
        }
        for number in range(4)
    ]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pope_files(tmp_path):
    """The authors' folder, and COCO's."""
    for category in ("random", "popular", "adversarial"):
        write_lines(tmp_path / "pope" / f"coco_pope_{category}.json", pope_rows(category))
    (tmp_path / "pope" / "coco_ground_truth_objects.json").write_text("{}")
    (tmp_path / "val2014").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    return tmp_path / "pope", tmp_path / "val2014"


def pope_table(images) -> datasets.Dataset:
    """The same questions as lmms-lab/POPE has them."""
    rows = []
    for category in ("adversarial", "popular", "random"):
        for row in pope_rows(category):
            stem = row["image"].removesuffix(".jpg")
            names = {"id": str(len(rows)), "question_id": str(row["question_id"]), "category": category}
            content = {"question": row["text"], "answer": row["label"], "image_source": stem}
            rows.append({**names, **content, "image": str(images / row["image"])})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    return table.map(lambda row: row, batched=False, keep_in_memory=True)


CV_CASES = [
    ("Count", "ADE20K", "How many cats are in the image?", ["3", "2", "1", "0"], "(C)"),
    ("Count", "COCO", "How many dogs are in the image?", ["0", "1"], "(A)"),
    ("Relation", "COCO", "Where is the dog (annotated by the red box)?", ["above", "below"], "(B)"),
    ("Depth", "Omni3D", "Which object is closer to the camera?", ["sofa", "dog"], "(A)"),
    ("Distance", "Omni3D", "Which object is closer to the sofa?", ["cat", "dog"], "(B)"),
    ("Count", "ADE20K", "How many sofas are in the image?", ["1", "0"], "(B)"),
]


def cv_rows() -> list[dict]:
    rows = []
    for number, (task, source, question, choices, label) in enumerate(CV_CASES):
        options = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
        rows.append(
            {
                "idx": number,
                "type": "3D" if source == "Omni3D" else "2D",
                "task": task,
                "question": question,
                "choices": choices,
                "answer": label,
                "prompt": f"{question} Select from the following choices.\n{options}",
                "filename": f"img/{number}.png",
                "source": source,
                "source_dataset": f"{source} validation",
                "target_class": None,
            }
        )
    return rows


@pytest.fixture
def cv_files(tmp_path):
    folder = tmp_path / "cv"
    (folder / "img").mkdir(parents=True)
    rows = cv_rows()
    for number in range(len(rows)):
        picture(number).save(folder / "img" / f"{number}.png")
    for kind in ("2D", "3D"):
        write_lines(folder / f"test_{kind.lower()}.jsonl", [row for row in rows if row["type"] == kind])
    return folder


def cv_table(folder) -> datasets.Dataset:
    rows = [{**row, "image": {"bytes": (folder / row["filename"]).read_bytes()}} for row in cv_rows()]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_parquet_folder(table, folder):
    """As the Hub holds it, and as a clone of it is."""
    folder.mkdir()
    table.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def content(questions, texts="text", labels="label"):
    """Everything but the keys, with the images' pixels."""
    return [
        (getattr(q, texts), getattr(q, labels), np.asarray(q.load_image()).tobytes(), q.load_image().mode)
        for q in questions
    ]


def test_pope_is_read_alike_from_all_forms(pope_files, tmp_path):
    files, images = pope_files
    theirs = read_pope(files, images)
    assert [q.key for q in theirs] == [
        f"{category}/{row}" for category in ("adversarial", "popular", "random") for row in (1, 2, 3, 4)
    ]
    assert [q.text for q in theirs[:4]] == [row["text"] for row in pope_rows("adversarial")]
    assert [q.label for q in theirs] == ["yes", "no"] * 6
    second = Image.open(images / "COCO_val2014_000000000001.jpg")
    assert theirs[2].load_image() == second.convert("RGB")

    table = pope_table(images)
    table.save_to_disk(tmp_path / "saved")
    places = [tmp_path / "saved", as_parquet_folder(table, tmp_path / "clone")]
    places.append(places[-1] / "test-00000-of-00001.parquet")
    for place in places:
        assert content(read_pope(place)) == content(theirs)
        assert [q.category for q in read_pope(place)] == [q.category for q in theirs]
    assert content(read_pope(files / "coco_pope_random.json", images)) == content(theirs[8:])


def test_pope_on_the_hub(pope_files, monkeypatch):
    _, images = pope_files
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"test": pope_table(images)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_pope()) == 12
    assert asked == ["lmms-lab/POPE"]


def test_parts_of_pope(pope_files):
    questions = read_pope(*pope_files, categories=["popular", "random"], limit=3)
    assert [q.key for q in questions] == [f"{name}/{row}" for name in ("popular", "random") for row in (1, 2, 3)]


def test_cv_bench_is_read_alike_from_all_forms(cv_files, tmp_path):
    theirs = read_cv_bench(cv_files)
    table = cv_table(cv_files)
    table.save_to_disk(tmp_path / "saved")
    clone = as_parquet_folder(table, tmp_path / "clone")
    whole = read_cv_bench(tmp_path / "saved")
    assert [(q.task, q.source, q.choices, f"({q.letter})") for q in whole] == [
        (task, source, tuple(choices), label) for task, source, _, choices, label in CV_CASES
    ]
    assert [q.key for q in whole] == ["Count/1", "Count/2", "Relation/3", "Depth/4", "Distance/5", "Count/6"]
    assert whole[0].prompt == (
        "How many cats are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0"
    )
    expected = content(whole, "prompt", "letter")
    for place in (clone, clone / "test-00000-of-00001.parquet"):
        assert content(read_cv_bench(place), "prompt", "letter") == expected
    # The authors' files have the 2D questions in one and the 3D questions in the other.
    assert sorted(content(theirs, "prompt", "letter")) == sorted(expected)
    (tmp_path / "elsewhere").mkdir()
    moved = write_lines(tmp_path / "elsewhere" / "test_2d.jsonl", cv_rows()[:2])
    assert content(read_cv_bench(moved, cv_files), "prompt", "letter") == expected[:2]


def test_parts_of_cv_bench(cv_files):
    table = cv_table(cv_files)
    place = as_parquet_folder(table, cv_files.parent / "clone")
    questions = read_cv_bench(place, tasks=["Count", "Depth"], limit=1)
    # The first of each task and source, so that no source is left out.
    assert [q.key for q in questions] == ["Count/1", "Count/2", "Depth/4"]


def changed_line(path, number, **changes):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] = {name: value for name, value in {**rows[number], **changes}.items() if value is not ...}
    write_lines(path, rows)


def test_mistakes_in_pope(pope_files, tmp_path):
    folder, images = pope_files
    file = folder / "coco_pope_random.json"
    with pytest.raises(ValueError, match="names images without holding them"):
        read_pope(folder)
    with pytest.raises(ValueError, match="no category 'rare' in the data; there are: adversarial, popular, random"):
        read_pope(folder, images, categories=["rare"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_pope(folder, images, limit=0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_pope(folder / "nowhere.json", images)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_pope(tmp_path / "no where", None)
    write_lines(folder / "gqa_pope_random.json", pope_rows("random"))
    with pytest.raises(ValueError, match="two files of the category random"):
        read_pope(folder, images)

    (images / "COCO_val2014_000000000001.jpg").rename(images / "kept.jpg")
    with pytest.raises(FileNotFoundError, match=r"random\.json, row 3: no such image file: .*0001\.jpg; .*--images"):
        read_pope(file, images)
    (images / "COCO_val2014_000000000001.jpg").write_bytes((images / "kept.jpg").read_bytes()[:400])
    question = read_pope(file, images)[3]  # a damaged image shows when it is loaded
    with pytest.raises(ValueError, match=r"(?i)random\.json, row 4: cannot read image '.*0001\.jpg'.*truncated"):
        question.load_image()

    changed_line(file, 1, label="maybe")
    with pytest.raises(ValueError, match=r"random\.json, row 2: its label must be yes or no, got 'maybe'"):
        read_pope(file, images)
    changed_line(file, 1, label=...)
    with pytest.raises(ValueError, match=r"line 2: lacks label; it has question_id, image, text"):
        read_pope(file, images)
    file.write_text("[{}]")
    with pytest.raises(ValueError, match="line 1: is not an object"):
        read_pope(file, images)
    file.write_text('{"question_id": 1,\n')
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        read_pope(file, images)
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no lines"):
        read_pope(file, images)


def test_mistakes_in_tables(pope_files, cv_files, tmp_path):
    _, images = pope_files
    table = pope_table(images)
    table.rename_column("question", "text").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet lacks the columns question; it has id, .*text"):
        read_pope(tmp_path / "a.parquet")
    table.remove_columns("image").add_column("image", [3] * 12).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="its column image does not hold images"):
        read_pope(tmp_path / "b.parquet")
    broken = [{**row, "image": {"bytes": b"no image"}} for row in cv_rows()]
    datasets.Dataset.from_list(broken).cast_column("image", datasets.Image()).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: its image cannot be read"):
        read_cv_bench(tmp_path / "c.parquet")[1].load_image()
    with pytest.raises(ValueError, match="holds its images"):
        read_cv_bench(tmp_path / "c.parquet", images)
    with pytest.raises(ValueError, match="holds its images"):
        read_pope(tmp_path / "a.parquet", images)
    with pytest.raises(ValueError, match="lacks the columns task, source, prompt, choices"):
        read_cv_bench(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer": "(E)"},
            r"test_2d\.jsonl, row 1: its answer must be one of \(A\), \(B\), \(C\), \(D\), got '\(E\)'",
        ),
        ({"answer": "C"}, r"got 'C'"),
        ({"task": "Colour"}, "its task must be one of Count, Relation, Depth, Distance, got 'Colour'"),
        ({"source": "LVIS"}, "its source must be one of ADE20K, COCO, Omni3D, got 'LVIS'"),
        ({"choices": "3 2 1 0"}, "its choices must be a list of texts"),
        ({"choices": ["3", " "]}, "its choices must be a list of texts"),
        ({"choices": []}, "its choices must be a list of texts"),
        ({"filename": ...}, "line 1: lacks filename"),
        ({"filename": "img/no.png"}, r"row 1: no such image file: .*no\.png"),
    ],
)
def test_mistakes_in_cv_bench(cv_files, changes, message):
    changed_line(cv_files / "test_2d.jsonl", 0, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_cv_bench(cv_files)


def test_unknown_task(cv_files):
    with pytest.raises(ValueError, match="no task 'Depth' in the data; there are: Count, Relation"):
        read_cv_bench(cv_files / "test_2d.jsonl", tasks=["Count", "Depth"])


# --- the commands ---


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["agevlm", "eval", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(cli.main())
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out + captured.err


def give_answers(folder, answers):
    """Puts these answers in the place of the model's, by key."""
    file = folder / "answers.jsonl"
    header, *lines = file.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines]
    assert {entry["key"] for entry in entries} == set(answers)
    lines = [json.dumps({**entry, "answer": answers[entry["key"]]}) for entry in entries]
    file.write_text("\n".join([header, *lines, ""]))


def cells(printed, separator):
    """The numbers of a table, by their row's name."""
    rows = [[cell.strip() for cell in line.split(separator)[1:-1]] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1 and row[1].isdigit()}


@pytest.mark.parametrize("model", ["age_vlm", "llava"])
def test_pope_command(monkeypatch, capsys, tmp_path, folders, pope_files, model):
    files, images = pope_files
    command = ["pope", "--model", folders / model, "--data", files, "--images", images, "--out", tmp_path / "out"]
    command += ["--max-new-tokens", 5, "--batch-size", 5, "--device", "cpu"]
    code, printed = run(monkeypatch, capsys, *command)
    assert code == 0, printed
    entries = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().split("\n")[1:-1]]
    # Questions are put as they are, and what is scored is what the model said.
    questions = read_pope(files, images)
    assert [(entry["key"], entry["question"]) for entry in entries] == [(q.key, q.text) for q in questions]
    assert len({entry["answer"] for entry in entries}) > 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scores"] == score_pope(questions, {entry["key"]: entry["answer"] for entry in entries})

    # Of random, TP 1, FN 1, FP 0, TN 2; of popular, everything yes; of adversarial, everything no.
    given = dict(zip([f"random/{row}" for row in (1, 2, 3, 4)], ["Yes", "No", "No, none.", "no"], strict=True))
    given |= {f"popular/{row}": "Yes." for row in (1, 2, 3, 4)}
    given |= {f"adversarial/{row}": "No." for row in (1, 2, 3, 4)}
    give_answers(tmp_path / "out", given)
    code, printed = run(monkeypatch, capsys, *command)
    assert code == 0, printed
    expected = {
        "random": ["4", "0.7500", "1.0000", "0.5000", "0.6667", "0.2500", "0"],
        "popular": ["4", "0.5000", "0.5000", "1.0000", "0.6667", "1.0000", "0"],
        "adversarial": ["4", "0.5000", "0.0000", "0.0000", "0.0000", "0.0000", "0"],
        "mean": ["12", "0.5833", "0.5000", "0.5000", "0.4444", "0.4167", "0"],
    }
    assert cells(printed, "│") == expected
    report = (tmp_path / "out" / "report.md").read_text()
    assert cells(report, "|") == expected
    assert f"- model: {folders / model}" in report
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scores"]["mean"]["f1"] == pytest.approx((2 / 3 + 2 / 3) / 3)
    assert results["settings"] == {
        "benchmark": "POPE",
        "data": str(files),
        "images": str(images),
        "categories": None,
        "limit": None,
        "model": str(folders / model),
        "dtype": "float32",
        "prompt_suffix": "",
        "max_new_tokens": 5,
    }
    assert set(results["versions"]) == {"agevlm", "transformers", "torch"}


@pytest.mark.parametrize("model", ["age_vlm", "llava"])
def test_cv_bench_command(monkeypatch, capsys, tmp_path, folders, cv_files, model):
    table = cv_table(cv_files)
    data = as_parquet_folder(table, tmp_path / "clone")
    command = ["cv-bench", "--model", folders / model, "--data", data, "--out", tmp_path / "out"]
    command += ["--max-new-tokens", 5, "--batch-size", 4]
    code, printed = run(monkeypatch, capsys, *command)
    assert code == 0, printed
    entries = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().split("\n")[1:-1]]
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert [entry["question"] for entry in entries] == [row["prompt"] + suffix for row in cv_rows()]
    questions = read_cv_bench(data)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scores"] == score_cv_bench(questions, {entry["key"]: entry["answer"] for entry in entries})
    assert results["settings"]["benchmark"] == "CV-Bench"

    # Right: ADE20K 1 of 2, COCO 2 of 2, Omni3D 1 of 2.
    given = {"Count/1": "(C) 1", "Count/2": "A", "Relation/3": "below", "Depth/4": "hm", "Distance/5": "B."}
    give_answers(tmp_path / "out", given | {"Count/6": "A"})
    code, printed = run(monkeypatch, capsys, *command)
    assert code == 0, printed
    expected = {
        "overall": ["6", "0.6250", "1"],
        "2D": ["4", "0.7500", "0"],
        "3D": ["2", "0.5000", "1"],
        "ADE20K": ["2", "0.5000", "0"],
        "COCO": ["2", "1.0000", "0"],
        "Omni3D": ["2", "0.5000", "1"],
        "Count": ["3", "0.6667", "0"],
        "Relation": ["1", "1.0000", "0"],
        "Depth": ["1", "0.0000", "1"],
        "Distance": ["1", "1.0000", "0"],
    }
    assert cells(printed, "│") == expected
    assert cells((tmp_path / "out" / "report.md").read_text(), "|") == expected


def test_options_of_the_commands(monkeypatch, capsys, tmp_path, folders, pope_files, cv_files):
    files, images = pope_files
    common = ["--model", folders / "age_vlm", "--max-new-tokens", 2, "--limit", 1]
    options = ["--categories", "random, popular", "--prompt-suffix", "Answer with one word.", "--dtype", "bfloat16"]
    out = tmp_path / "pope_out"
    code, printed = run(
        monkeypatch, capsys, "pope", *common, *options, "--data", files, "--images", images, "--out", out
    )
    assert code == 0, printed
    entries = [json.loads(line) for line in (out / "answers.jsonl").read_text().split("\n")[1:-1]]
    assert [entry["key"] for entry in entries] == ["popular/1", "random/1"]
    assert entries[1]["question"] == "Is there a dog in the image?\nAnswer with one word."
    assert json.loads((out / "results.json").read_text())["settings"]["dtype"] == "bfloat16"

    options = ["--tasks", "Count", "--prompt-suffix", "", "--data", cv_files]
    code, printed = run(monkeypatch, capsys, "cv-bench", *common, *options, "--out", tmp_path / "cv_out")
    assert code == 0, printed
    entries = [json.loads(line) for line in (tmp_path / "cv_out" / "answers.jsonl").read_text().split("\n")[1:-1]]
    assert [entry["question"] for entry in entries] == [row["prompt"] for row in cv_rows()[:2]]
    assert "–" in printed  # there is no accuracy where nothing was asked
    assert json.loads((tmp_path / "cv_out" / "results.json").read_text())["scores"]["overall"]["accuracy"] is None


def test_a_stopped_command_goes_on(monkeypatch, capsys, tmp_path, folders, pope_files):
    files, images = pope_files
    command = ["pope", "--model", folders / "age_vlm", "--data", files, "--images", images, "--max-new-tokens", 5]
    assert run(monkeypatch, capsys, *command, "--out", tmp_path / "whole")[0] == 0

    generate, calls = answering._generate, []

    def stopped(*arguments):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(answering, "_generate", stopped)
    code, printed = run(monkeypatch, capsys, *command, "--out", tmp_path / "out", "--batch-size", 2)
    assert (code, "Traceback" in printed) == (130, False)
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(monkeypatch, capsys, *command, "--out", tmp_path / "out", "--batch-size", 3)[0] == 0
    assert calls == [2, 2, 2, 3, 3, 2]  # four of twelve were answered
    for name in ("answers.jsonl", "results.json", "report.md"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pope", "--model", "{models}/no_template"], "has no chat template"),
        (["pope", "--model", "{models}/text_only"], "Can't load image processor for '{models}/text_only'"),
        (["pope", "--model", "{models}/nowhere"], "nowhere"),
        (["pope", "--model", "{models}/age_vlm", "--categories", "rare"], "there is no category 'rare'"),
        (["pope", "--model", "{models}/age_vlm", "--device", "tpu"], "must be auto, cpu or cuda"),
        (["pope", "--model", "{models}/llava"], "model was '{models}/age_vlm', is '{models}/llava'"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, folders, pope_files, arguments, message):
    files, images = pope_files
    common = ["--data", files, "--images", images, "--out", tmp_path / "out", "--max-new-tokens", 1, "--limit", 1]
    if "was" in message:
        assert run(monkeypatch, capsys, "pope", "--model", folders / "age_vlm", *common)[0] == 0
    code, printed = run(monkeypatch, capsys, *(part.format(models=folders) for part in arguments), *common)
    assert code == 2, printed
    assert message.format(models=folders) in printed.replace("\n", " ")
    assert "Traceback" not in printed
