# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM in lmms-eval: what the harness makes of it is what the model says when it is asked directly."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, List, Value
from evaluation_cases import llava
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from tiny import IMAGE, tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision
from transformers import AutoModelForImageTextToText, AutoProcessor

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.evaluation.lmms import AgeVlmChat, AgeVlmSimple
from agevlm.inference.generation import FiniteLogits
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[1] / "fixtures" / "lmms_task"
SIZE = 32
QUESTIONS = (
    "What is the capital of France?",
    "How many cats are there?",
    "Is there a dog in this image? Describe the sofa, please.",
    "Lower?",
    "Which of the two is brown?",
    "Describe this image in detail.",
)
CHOICES = ["Two cats", "one dog", "a white cat on the red sofa", "Paris"]


def picture(seed: int) -> PILImage.Image:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2)
    return PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# Without, with one and with two images.
DOCUMENTS = [
    {"question": question, "images": [picture(10 * number + k) for k in range(number % 3)]}
    for number, question in enumerate(QUESTIONS)
]


@pytest.fixture(autouse=True)
def no_shared_accelerator():
    """The harness's models have an Accelerator, whose state all later ones of this process would share."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    torch.manual_seed(0)
    model = from_parts(
        tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=1024),
        tiny_vision(),
        image_token_id=processor.image_token_id,
    )
    # A checkpoint that samples by default, as Llama's do.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    folder = tmp_path_factory.mktemp("lmms") / "checkpoint"
    open_gates(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def chat(checkpoint) -> AgeVlmChat:
    return with_documents(AgeVlmChat(str(checkpoint), device="cpu", batch_size=4))


@pytest.fixture
def simple(checkpoint) -> AgeVlmSimple:
    return with_documents(AgeVlmSimple(str(checkpoint), device="cpu", batch_size=4))


class Recorder:
    """The harness's hook for answers, which writes down what it is given."""

    def __init__(self):
        self.calls = []

    def add_partial(self, method, request, result):
        self.calls.append((method, request, result))


def with_documents(lm):
    lm.task_dict["t"] = {"test": DOCUMENTS}
    lm.set_cache_hook(Recorder())
    return lm


def messages_of(document: dict) -> list[dict]:
    content = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["question"]}]}]


def request(kind: str, *arguments, doc_id: int = 0) -> Instance:
    metadata = {"task": "t", "doc_id": doc_id, "repeats": 1}
    return Instance(kind, (*arguments, doc_id, "t", "test"), 0, metadata)


def chat_request(doc_id: int, doc_to_messages=messages_of, **gen_kwargs) -> Instance:
    question = DOCUMENTS[doc_id]["question"]
    return request("generate_until", question, doc_to_messages, gen_kwargs, doc_id=doc_id)


def choice_request(doc_id: int, continuation) -> Instance:
    question = DOCUMENTS[doc_id]["question"]
    return request("loglikelihood", question, continuation, lambda document: document["images"], doc_id=doc_id)


def prompt_inputs(processor, messages: list[dict]):
    """Inputs of one conversation by the processor's own chat template, tokens and images included."""
    parts = [
        [{"type": "image", "image": part["url"]} if part["type"] == "image" else part for part in message["content"]]
        for message in messages
    ]
    conversation = [{**message, "content": content} for message, content in zip(messages, parts, strict=True)]
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def answer(parts, messages: list[dict], max_new_tokens: int, **kwargs) -> str:
    """What the model says to one conversation alone."""
    model, processor = parts
    inputs = prompt_inputs(processor, messages)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **kwargs})
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def log_probability(parts, messages: list[dict], continuation: str) -> tuple[float, bool]:
    """Of the continuation, token by token: each from a forward pass over all that stands before it."""
    model, processor = parts
    inputs = dict(prompt_inputs(processor, messages))
    total, greedy = 0.0, True
    for token in processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        logits = model(**inputs).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return total, greedy


# The harness itself


@pytest.fixture(scope="module")
def expected(parts) -> list[dict]:
    """For each document what the harness must find, from the model directly; every other one has a wrong target."""
    rows = []
    for number, document in enumerate(DOCUMENTS):
        messages = messages_of(document)
        scores = [log_probability(parts, messages, choice)[0] for choice in CHOICES]
        best = int(np.argmax(scores))
        right = best if number % 2 == 0 else int(np.argmin(scores))
        by_character = int(np.argmax([score / len(choice) for score, choice in zip(scores, CHOICES, strict=True)]))
        rounds, images = [answer(parts, messages, 6)], document["images"]
        for shown in (images, []):
            follow_up = {"question": f"You said {rounds[-1]}. Why?", "images": shown}
            rounds.append(answer(parts, messages_of(follow_up), 6))
        rows.append(
            {
                "describe": answer(parts, messages, 12),
                "choose": scores,
                "right": right,
                "acc": float(right == best),
                "acc_norm": float(right == by_character),
                "converse": rounds,
            }
        )
    assert len({row["describe"] for row in rows}) == len(rows)  # equal answers would prove nothing
    return rows


@pytest.fixture(scope="module")
def folder(checkpoint, expected) -> Path:
    """A folder with the tasks' data."""
    rows = [
        {**document, "choices": CHOICES, "right": row["right"], "answer": row["describe"].strip()}
        for document, row in zip(DOCUMENTS, expected, strict=True)
    ]
    features = Features(
        {
            "question": Value("string"),
            "images": List(Image()),
            "choices": List(Value("string")),
            "right": Value("int64"),
            "answer": Value("string"),
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(checkpoint.parent / "questions.parquet")
    return checkpoint.parent


def harness(folder: Path, *command: str) -> str:
    """The log of a run that must succeed, in a separate process: the harness changes global settings of PIL and others.

    All runs are at the verbosity DEBUG, without which the harness reports errors and then ends as if nothing was wrong.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [sys.executable, *command, "--verbosity", "DEBUG"],
        cwd=folder,
        env=environment,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def samples(folder: Path, task: str) -> list:
    """What the harness has logged of each document's answers; the filtered ones are those without white space around."""
    (path,) = folder.rglob(f"*_samples_agevlm_{task}.jsonl")
    found = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
    assert sorted(found) == list(range(len(DOCUMENTS)))
    return [found[i].get("resps", found[i]["filtered_resps"]) for i in sorted(found)]


def results(folder: Path, task: str) -> dict:
    (path,) = folder.rglob("*_results.json")
    return json.loads(path.read_text())["results"][f"agevlm_{task}"]


def check(folder: Path, expected: list[dict], *tasks: str) -> None:
    if "describe" in tasks:
        assert samples(folder, "describe") == [row["describe"] for row in expected]
        assert results(folder, "describe")["exact,none"] == 1
    if "converse" in tasks:
        assert samples(folder, "converse") == [row["converse"] for row in expected]
        assert results(folder, "converse")["rounds,none"] == 3
    if "choose" in tasks:
        found = [[-float(value) for value, _ in responses] for responses in samples(folder, "choose")]
        np.testing.assert_allclose(found, [row["choose"] for row in expected], rtol=1e-4)
        assert results(folder, "choose")["acc,none"] == np.mean([row["acc"] for row in expected]) == 0.5
        assert results(folder, "choose")["acc_norm,none"] == np.mean([row["acc_norm"] for row in expected])


def test_the_harness_gets_the_models_own_answers(folder, checkpoint, expected):
    """Both interfaces, one process after another in a single start; the last one answers from the harness's cache."""
    common = {
        "model": "agevlm",
        "model_args": f"pretrained={checkpoint}",
        "batch_size": 4,
        "device": "cpu",
        "include_path": str(TASKS),
        "log_samples": True,
    }
    both = "agevlm_describe,agevlm_choose"
    runs = [
        {"tasks": "agevlm_describe,agevlm_converse", "output_path": "chat"},
        {"tasks": both, "output_path": "simple", "force_simple": True, "use_cache": "answers"},
        {"tasks": both, "output_path": "cached", "force_simple": True, "use_cache": "answers"},
    ]
    (folder / "runs.yaml").write_text(yaml.safe_dump([{**common, **run} for run in runs]))
    log = harness(folder, "-m", "lmms_eval", "--config", "runs.yaml")
    check(folder / "chat", expected, "describe", "converse")
    check(folder / "simple", expected, "describe", "choose")
    check(folder / "cached", expected, "describe", "choose")
    assert log.count(f"all {len(DOCUMENTS)} requests served from cache") == 1, log
    assert log.count(f"all {len(DOCUMENTS) * len(CHOICES)} requests served from cache") == 1, log


def test_two_processes_share_the_documents(folder, checkpoint, expected):
    # "MULTI_GPU" with `use_cpu`: "MULTI_CPU" would start one process, without MPI.
    machine = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    (folder / "machine.json").write_text(json.dumps({**machine, "num_processes": 2, "mixed_precision": "no"}))
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "machine.json"]
    command += ["--main_process_port", "0", "-m", "lmms_eval", "--model", "agevlm"]
    command += ["--model_args", f"pretrained={checkpoint}", "--tasks", "agevlm_describe,agevlm_choose"]
    command += ["--include_path", str(TASKS), "--batch_size", "2", "--force_simple", "--log_samples"]
    log = harness(folder, *command, "--output_path", "shared")
    check(folder / "shared", expected, "describe", "choose")
    for task, number in (("describe", len(DOCUMENTS)), ("choose", len(DOCUMENTS) * len(CHOICES))):
        assert log.count(f"agevlm_{task}; number of requests on this rank: {number // 2}") == 2, log


def test_the_harness_knows_the_model():
    assert get_model("agevlm") is AgeVlmChat
    assert get_model("agevlm", force_simple=True) is AgeVlmSimple


def test_agevlm_does_not_need_the_harness():
    code = "import sys; sys.modules['lmms_eval'] = None; import agevlm, agevlm.evaluation.scenes, agevlm.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plug_in_leaves_its_process_as_it_is(checkpoint):
    """lmms-eval imports it for every model; and who imports it does not get what lmms-eval changes for its own runs."""
    code = f"""
import sys, warnings
from PIL import ImageFile
from agevlm.evaluation.lmms import AgeVlmSimple, manifest
manifest()
heavy = {{"agevlm.modeling_agevlm.modeling_agevlm", "datasets", "timm", "lmms_eval.api.task", "lmms_eval.evaluator"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert AgeVlmSimple({str(checkpoint)!r}, device="cpu").loglikelihood([]) == []
assert not ImageFile.LOAD_TRUNCATED_IMAGES
assert ("ignore", None, Warning, None, 0) not in warnings.filters
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_harness_that_is_imported_later_keeps_log_likelihoods(simple, monkeypatch):
    """As `lmms_eval.evaluator` is, without what its import does to this process."""
    evaluator = types.ModuleType("lmms_eval.evaluator")
    evaluator.unwrap_generation_output = unwrap_generation_output
    monkeypatch.setitem(sys.modules, evaluator.__name__, evaluator)
    assert isinstance(evaluator.unwrap_generation_output((0.5, True))[0], str)
    for _ in range(2):
        (score,) = simple.loglikelihood([choice_request(1, " Paris")])
        assert evaluator.unwrap_generation_output(score) == (score, None)
        assert evaluator.unwrap_generation_output(list(score)) == (score, None)
        assert evaluator.unwrap_generation_output(["one", "two"]) == (["one", "two"], None)


# Answers


def test_answers_keep_the_order_of_requests_with_different_settings(chat, parts):
    lengths = [9, 4, 9, 4, 9, 4]
    requests = [chat_request(i, max_new_tokens=length) for i, length in enumerate(lengths)]
    answers = chat.generate_until([*requests, requests[0]])  # a request may come twice, where a task has repeats
    expected = [answer(parts, messages_of(DOCUMENTS[i]), length) for i, length in enumerate(lengths)]
    assert [one.text for one in answers] == [*expected, expected[0]]


def test_answers_by_the_simple_interface_are_those_by_chat(chat, simple):
    def by_simple(i):
        question, images = DOCUMENTS[i]["question"], lambda document: document["images"] or None
        return request("generate_until", question, {"max_new_tokens": 8}, images, doc_id=i)

    numbers = range(len(DOCUMENTS))
    expected = chat.generate_until([chat_request(i, max_new_tokens=8) for i in numbers])
    assert simple.generate_until([by_simple(i) for i in numbers]) == expected


def test_conversations_of_several_messages_with_images_between(chat, parts):
    first, second = picture(1), picture(2)
    conversation = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": "First"}, {"type": "image", "url": first}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": [{"type": "image", "url": second}, {"type": "text", "text": "And this?"}]},
    ]
    spelled_out = [{"role": "system", "content": [{"type": "text", "text": conversation[0]["content"]}]}]
    spelled_out += conversation[1:]
    (found,) = chat.generate_until([chat_request(0, lambda document: conversation, max_new_tokens=10)])
    assert found.text == answer(parts, spelled_out, 10)
    swapped = [dict(message) for message in spelled_out]
    swapped[1]["content"] = [spelled_out[1]["content"][0], {"type": "image", "url": second}]
    assert found.text != answer(parts, swapped, 10)


def test_until(chat, parts):
    whole = answer(parts, messages_of(DOCUMENTS[1]), 12)
    early, late = whole[3:5], whole[6:8]
    assert 0 < whole.find(early) < whole.find(late)

    def ask(until):
        return chat.generate_until([chat_request(1, max_new_tokens=12, until=until)])[0].text

    assert ask([late, early]) == whole[: whole.find(early)]
    assert ask(late) == whole[: whole.find(late)]
    assert ask(["nowhere", "", "\n\n"]) == ask([]) == ask(None) == whole


def test_a_blank_line_ends_no_answer(chat, monkeypatch):
    monkeypatch.setattr(chat.processor, "batch_decode", lambda tokens, **kwargs: ["First.\n\nSecond. Third"])
    assert chat.generate_until([chat_request(0, until=["\n\n"])])[0].text == "First.\n\nSecond. Third"
    assert chat.generate_until([chat_request(0, until=["\n\n", "."])])[0].text == "First"


def test_answers_reach_the_harness_with_their_prompts_and_lengths(chat, parts):
    _, processor = parts
    settings = {"max_new_tokens": 5, "until": ["nowhere"]}
    answers = chat.generate_until([chat_request(i, **settings) for i in range(3)])
    for i, one in enumerate(answers):
        inputs = prompt_inputs(processor, messages_of(DOCUMENTS[i]))
        assert one.token_counts.input_tokens == inputs["input_ids"].shape[1]
        assert one.token_counts.output_tokens == 5
    recorded = {prompt: (method, gen_kwargs, text) for method, (prompt, gen_kwargs), text in chat.cache_hook.calls}
    for i, one in enumerate(answers):
        (prompt,) = [prompt for prompt in recorded if DOCUMENTS[i]["question"] in prompt]
        assert recorded[prompt] == ("generate_until", settings, one.text)


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.7}, True),
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 3}, True),
    ],
)
def test_sampling(chat, monkeypatch, settings, sampled):
    """Seen where it counts, in what `generate` decides on, for a checkpoint that would sample by itself."""
    seen = []

    def note(generation_config, *args, **kwargs):
        seen.append(generation_config)
        return original(generation_config, *args, **kwargs)

    original = chat.model._get_logits_processor
    monkeypatch.setattr(chat.model, "_get_logits_processor", note)
    chat.generate_until([chat_request(1, max_new_tokens=1, **settings)])
    (config,) = seen
    assert bool(config.do_sample) is sampled
    if sampled:
        own = {"temperature": 0.6, "top_p": 0.9}
        wanted = {**own, **{name: value for name, value in settings.items() if name != "do_sample"}}
        assert {name: getattr(config, name) for name in wanted} == wanted


def test_settings_that_are_not_of_generation_are_left_out(chat, monkeypatch):
    generate, seen = chat.model.generate, []
    monkeypatch.setattr(chat.model, "generate", lambda **given: seen.append(given) or generate(**given))
    settings = {"image_aspect_ratio": "original", "until": ["."], "max_new_tokens": 3, "num_beams": 2, "top_p": None}
    chat.generate_until([chat_request(0, **settings)])
    (given,) = seen
    options = {name: value for name, value in given.items() if isinstance(value, int | list | str)}
    pad, (check,) = chat.processor.tokenizer.pad_token_id, options.pop("logits_processor")
    assert isinstance(check, FiniteLogits)
    assert options == {
        "max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": pad, "remove_invalid_values": False,
    }  # fmt: skip


def test_a_model_that_has_diverged_is_not_scored(chat, simple, monkeypatch):
    choices = [choice_request(1, "dog"), choice_request(1, "a longer cat")]
    for lm in (chat, simple):
        (norm,) = lm.model.get_decoder().norm.parameters()
        monkeypatch.setattr(norm, "data", torch.full_like(norm, torch.nan))
    message = r"not finite .* document 1 of task 't'.* choose an earlier checkpoint"
    for beams in (1, 3):
        with pytest.raises(ValueError, match=message):
            chat.generate_until([chat_request(1, max_new_tokens=2, num_beams=beams)])
    with pytest.raises(ValueError, match=message):
        simple.loglikelihood(choices)


def test_beams(chat, parts):
    found = chat.generate_until([chat_request(i, max_new_tokens=6, num_beams=3) for i in range(3)])
    assert [one.text for one in found] == [answer(parts, messages_of(DOCUMENTS[i]), 6, num_beams=3) for i in range(3)]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_anything_but_text_and_images_is_refused_by_chat(chat, kind):
    def doc_to_messages(document):
        return [{"role": "user", "content": [{"type": kind, "url": "file"}, {"type": "text", "text": "What?"}]}]

    with pytest.raises(ValueError, match=f"document 2 of task 't'.*{kind}"):
        chat.generate_until([chat_request(2, doc_to_messages)])


@pytest.mark.parametrize(
    ("visual", "kind"),
    [("clip.mp4", "video"), ("clip", "video"), ("voice.wav", "audio"), ({"array": [0.0]}, "audio")],
)
def test_anything_but_text_and_images_is_refused_by_simple(simple, visual, kind):
    with pytest.raises(ValueError, match=f"document 2 of task 't'.*{kind}"):
        simple.generate_until([request("generate_until", "What?", {}, lambda document: [visual], doc_id=2)])


def test_images_may_be_files(simple, tmp_path):
    picture(5).save(tmp_path / "picture.PNG")

    def ask(visual):
        return simple.generate_until([request("generate_until", "What?", {"max_new_tokens": 6}, lambda _: [visual])])

    assert ask(str(tmp_path / "picture.PNG")) == ask(picture(5))


# Log-likelihoods


def test_log_likelihoods_are_those_of_the_model(simple, parts):
    model, processor = parts
    continuations = [*CHOICES, "What?\n\nYes, é and \U0001f600."]
    requests = [(i, text) for i in range(len(DOCUMENTS)) for text in continuations]
    # What greedy decoding would write: its first token, where the tokenizer makes the same one of its text.
    greedy = 0
    for i, document in enumerate(DOCUMENTS):
        inputs = prompt_inputs(processor, messages_of(document))
        with torch.no_grad():
            text = processor.decode(model(**inputs).logits[0, -1].argmax())
        if text.strip() == text != "" and "\ufffd" not in text:
            requests.append((i, text))
            greedy += 1
    assert greedy > 1
    found = simple.loglikelihood([choice_request(i, f" {text}") for i, text in requests])
    expected = [log_probability(parts, messages_of(DOCUMENTS[i]), text) for i, text in requests]
    np.testing.assert_allclose([-value for value, _ in found], [value for value, _ in expected], rtol=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert sum(flag for _, flag in found) >= greedy
    hook = {request[0] + request[1]: result for method, request, result in simple.cache_hook.calls}
    assert len(hook) == len(set(requests))
    assert set(hook.values()) == set(found)


def test_a_continuation_may_come_from_the_document(simple):
    with_function = choice_request(1, lambda document: document["question"])
    assert simple.loglikelihood([with_function]) == simple.loglikelihood([choice_request(1, QUESTIONS[1])])


def test_an_empty_continuation_is_certain(simple):
    found = simple.loglikelihood([choice_request(1, " "), choice_request(2, " Paris")])
    assert found[0] == (0.0, True)
    assert found[1][0] > 0


def test_log_likelihoods_do_not_depend_on_the_batch(checkpoint, simple):
    requests = [choice_request(i, f" {choice}") for i in range(len(DOCUMENTS)) for choice in CHOICES]
    alone = with_documents(AgeVlmSimple(str(checkpoint), device="cpu"))
    np.testing.assert_allclose(
        [value for value, _ in simple.loglikelihood(requests)],
        [value for value, _ in alone.loglikelihood(requests)],
        rtol=1e-4,
    )


def test_each_interface_says_what_the_other_is_for(chat, simple):
    with pytest.raises(NotImplementedError, match="--force_simple"):
        chat.loglikelihood([])
    with pytest.raises(NotImplementedError, match="leave --force_simple out"):
        simple.generate_until_multi_round([])


# Arguments


def test_dtype(checkpoint, chat):
    assert chat.model.dtype == torch.float32
    assert AgeVlmChat(str(checkpoint), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_adapter(checkpoint, chat, tmp_path):
    """Its folder names the model that it is for; it answers as the two together do."""
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    (found,) = with_documents(AgeVlmChat(str(tmp_path), device="cpu")).generate_until(
        [chat_request(1, max_new_tokens=8)]
    )
    assert found.text == answer((model, chat.processor), messages_of(DOCUMENTS[1]), 8)
    assert found.text != chat.generate_until([chat_request(1, max_new_tokens=8)])[0].text


def test_answers_in_bfloat16(checkpoint):
    lm = with_documents(AgeVlmSimple(str(checkpoint), device="cpu", dtype="bfloat16", batch_size=6))
    found = lm.loglikelihood([choice_request(i, " Two cats") for i in range(len(DOCUMENTS))])
    assert all(np.isfinite(value) and value > 0 for value, _ in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be a whole number, at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got '0'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_bad_arguments(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        AgeVlmChat(str(checkpoint), device="cpu", **arguments)


def test_another_model_is_refused(tmp_path):
    for part in llava():
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlavaForConditionalGeneration, not an AGE-VLM"):
        AgeVlmChat(str(tmp_path), device="cpu")


def test_a_processor_without_chat_template_is_refused(checkpoint, tmp_path, parts):
    model, _ = parts
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.chat_template = processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        AgeVlmChat(str(tmp_path), device="cpu")
