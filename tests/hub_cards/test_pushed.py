# SPDX-License-Identifier: Apache-2.0
"""What others do with a pushed model: the real client in processes of its own, against a stand-in of the Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hub_server import front_matter
from PIL import Image
from second_environment import run_elsewhere
from tiny_laboratory import tiny_checkpoint, tiny_scenes
from transformers import AutoModelForImageTextToText, AutoProcessor

from agevlm.data import read_rows

pytestmark = pytest.mark.minutes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in shards, whose weights no other test has, with a pickle beside it."""
    folder = tmp_path_factory.mktemp("built") / "mine"
    tiny_checkpoint(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    (folder / "model.safetensors").unlink()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100kB")
    (folder / "training_args.bin").write_bytes(b"pickled")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return path


RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
from agevlm.cli import main
main()
"""


def start(environment: dict[str, str], *words) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, *map(str, words)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def agevlm(environment: dict[str, str], *words) -> str:
    process = start(environment, *words)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


LOAD = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
name, picture = sys.argv[1:]
content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is in this image?"}]
messages = [{"role": "user", "content": content}]
settings = dict(max_new_tokens=8, do_sample=False)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
answers = [
    pipeline(*task, model=name, trust_remote_code=True)(text=messages, return_full_text=False, **settings)
    for task in (["image-text-to-text"], [])
]
print(json.dumps({"tokens": tokens.tolist(), "answers": [answer[0]["generated_text"] for answer in answers]}))
"""


def test_a_pushed_model_works_where_agevlm_is_not_installed(hub_server, checkpoint, picture, tmp_path):
    environment = hub_server.environment(tmp_path / "home")
    agevlm(environment, "push", checkpoint, "me/loaded")
    arrived = {path: content for path, content in hub_server.head("me/loaded").items() if path[0] != "."}
    there = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "training_args.bin"}
    assert {**arrived, "README.md": b""} == {**there, "README.md": b""}
    assert len([name for name in arrived if name.endswith(".safetensors")]) > 1

    stranger = hub_server.environment(tmp_path / "other_home", token=None)
    found = json.loads(run_elsewhere(tmp_path, LOAD, "me/loaded", picture, **stranger).splitlines()[-1])
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What is in this image?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(tokens, skip_special_tokens=True)
    assert found["tokens"] == tokens.tolist()
    assert found["answers"] == [answer, answer]

    printed = agevlm(stranger, "ask", "--model", "me/loaded", "--image", picture, "What is in this image?", "--max-new-tokens", 8)  # fmt: skip
    assert " ".join(answer.split()) in " ".join(printed.split())


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
def test_a_client_that_dies_after_the_upload_changes_nothing(sent, hub_server, checkpoint, tmp_path, monkeypatch):
    environment, repo = hub_server.environment(tmp_path / "home"), f"me/{sent.lower()}"
    agevlm(environment, "push", checkpoint, repo)
    before = [dict(files) for files in hub_server.repos["models", repo]]
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    model = AutoModelForImageTextToText.from_pretrained(changed)
    for weight in model.parameters():
        weight.data += len(sent)  # other bytes for each, because none are sent twice
    model.save_pretrained(changed, max_shard_size="100kB")
    shards = {file.name for file in changed.glob("*.safetensors")}
    verified, processes = [], []

    def kill(request):
        if request.url.path == "/lfs/verify":
            verified.append(request)
            if len(verified) == len(shards):  # all have arrived, and the commit comes next
                processes[0].send_signal(getattr(signal, sent))
                time.sleep(0.5)

    monkeypatch.setattr(hub_server, "intercept", kill)
    processes.append(start(environment, "push", changed, repo))
    printed, _ = processes[0].communicate()
    assert processes[0].returncode == {"SIGKILL": -9, "SIGINT": 130}[sent], printed
    assert "Traceback" not in printed
    assert hub_server.repos["models", repo] == before
    monkeypatch.setattr(hub_server, "intercept", lambda request: None)
    hub_server.requests.clear()
    agevlm(environment, "push", changed, repo)
    assert {name: hub_server.head(repo)[name] for name in shards} == {n: (changed / n).read_bytes() for n in shards}
    assert not [path for method, path in hub_server.requests if method == "PUT"]  # nothing is sent twice


def test_a_pushed_data_set_is_read_by_its_name(hub_server, tmp_path):
    tiny_scenes(tmp_path)
    environment = hub_server.environment(tmp_path / "home")
    printed = agevlm(environment, "push", tmp_path / "exact", "me/scenes")
    assert "train/data-00000-of-00001.arrow" in printed
    code = "from agevlm.data import read_rows; rows = read_rows('me/scenes', 'train'); print(len(rows), rows.features, rows[0]['images'][0].size)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    rows = read_rows(tmp_path / "exact", "train")
    assert done.stdout.strip() == f"{len(rows)} {rows.features} {rows[0]['images'][0].size}", done.stderr
    assert front_matter(hub_server.head("me/scenes", "datasets")["README.md"])
