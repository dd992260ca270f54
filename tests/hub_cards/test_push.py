# SPDX-License-Identifier: Apache-2.0
"""Pushing through the real client to a stand-in of the Hub; see `test_pushed.py` for what others do with what has arrived."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from command_line import check_refused, run
from hub_server import HubServer, front_matter, refusal
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from starlette.responses import Response
from tiny import tiny_tokenizer
from tiny_laboratory import tiny_checkpoint
from tiny_models import tiny_llama, tiny_vision

from agevlm import AgeVlmForConditionalGeneration, build_checkpoint, load_trained, save_trained
from agevlm.hub import load_pretrained, load_processor
from agevlm.hub_cards.model import render_model_card
from agevlm.hub_cards.push import push
from agevlm.inference.grounding import CALIBRATION_FILE, FEATURES, Calibration, find_calibration, trained_fingerprint
from agevlm.parts import read_fingerprint

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "weights" / "demo"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint among all that training leaves beside it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny_checkpoint(folder)
    for name in (
        "training_args.bin", "optimizer.pt", "rng_state.pth", "old.ckpt", "data.pkl", "checkpoint-10/model.safetensors",
        "checkpoint-10/optimizer.pt", ".unfinished-1/x.json", ".cache/huggingface/x.lock", "runs/events.out.tfevents.1",
        ".eval_results/pope.yaml", "figures/heat.png",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(name.encode())
    return folder


LEFT_OUT = {
    "training_args.bin", "optimizer.pt", "rng_state.pth", "old.ckpt", "data.pkl", "checkpoint-10/model.safetensors",
    "checkpoint-10/optimizer.pt", ".unfinished-1/x.json", ".cache/huggingface/x.lock", "runs/events.out.tfevents.1",
}  # fmt: skip


def contents(folder) -> dict[str, bytes]:
    return {
        path: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and (path := file.relative_to(folder).as_posix()) not in LEFT_OUT
    }


def arrived(hub: HubServer, repo: str = "me/mine", kind: str = "models") -> dict[str, bytes]:
    return {path: content for path, content in hub.head(repo, kind).items() if path != ".gitattributes"}


def test_one_commit_of_all_but_pickles(hub, trained, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "push", trained, "me/mine", "--private")
    assert code == 0, printed
    found, expected = arrived(hub), contents(trained)
    assert {**found, "README.md": b""} == {**expected, "README.md": b""}
    assert front_matter(found["README.md"])["pipeline_tag"] == "image-text-to-text"
    assert len(hub.messages) == 1
    assert hub.private == {("models", "me/mine")}
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-10/", "runs/"):
        assert f"left out  {name}" in printed or f"left out {name}" in printed, printed
    assert hub.url in printed


def test_pickles_and_checkpoints_stay_whatever_their_names_and_places_are(hub, trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "copy")
    names = {"exported/decoder.pt2", "Old.PT", "data.PKL", "align/checkpoint-5/model.safetensors"}
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x")
    (folder / "exported/graphs.json").write_text("{}")
    code, printed = run(monkeypatch, capsys, "push", folder, "me/mine")
    assert code == 0, printed
    assert not names & arrived(hub).keys()
    assert "exported/graphs.json" in arrived(hub)
    assert "left out  exported/decoder.pt2: a pickle" in printed  # and not all of its folder


def test_a_model_without_a_processor_is_noted(hub, trained, tmp_path, monkeypatch, capsys):
    assert not push(trained, "me/mine").notes
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "processor_config.json").unlink()
    code, printed = run(monkeypatch, capsys, "push", folder, "me/other")
    assert code == 0, printed
    assert "the folder has no processor" in printed


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n\nMine", b"\xff\xfe"])
def test_a_card_that_is_none_is_named(hub, trained, card, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "README.md").write_bytes(card)
    check_refused(monkeypatch, capsys, tmp_path, "copy/README.md is no card", "push", folder, "me/mine")
    assert not hub.messages


def test_a_name_alone_is_the_users_own(hub, trained):
    assert push(trained, "mine").repo_id == "me/mine"
    assert ("models", "me/mine") in hub.repos


def test_a_second_push_sends_what_has_changed(hub, trained, tmp_path):
    push(trained, "me/mine")
    sent = len(hub.writes())
    again = push(trained, "me/mine")
    assert len(hub.messages) == 1  # nothing has changed
    assert again.url is not None
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "notes.json").write_text("{}")
    push(copy, "me/mine")
    assert [len(hub.messages), arrived(hub)["notes.json"]] == [2, b"{}"]
    assert not [path for method, path in hub.writes()[sent:] if method == "PUT"]  # of weights


def test_old_shards_go_and_all_else_stays(hub, trained):
    push(trained, "me/mine")
    others = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "demo.ipynb": b"{}"}
    hub.head("me/mine").update(others)
    done = push(trained, "me/mine")
    assert set(done.removed) == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert set(arrived(hub)) == {*contents(trained), "README.md", "demo.ipynb"}
    assert len(hub.messages) == 2
    done = push(trained, "me/mine", replace_content=True)
    assert done.removed == ["demo.ipynb"]
    assert set(arrived(hub)) == {*contents(trained), "README.md"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}, "a model of another type (llama)"),
        ({"data/train.csv": b"a,b"}, "other content (data/train.csv)"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "has a adapter"),
    ],
)
def test_other_content_is_refused_unless_it_is_to_be_replaced(hub, trained, files, message, monkeypatch, capsys):
    hub.add("me/mine", {**files, "README.md": b"Mine."})
    check_refused(monkeypatch, capsys, trained, message, "push", trained, "me/mine")
    check_refused(monkeypatch, capsys, trained, message, "push", trained, "me/mine", "--dry-run")
    assert len(hub.repos["models", "me/mine"]) == 1
    assert not hub.writes()
    push(trained, "me/mine", replace_content=True)
    assert set(arrived(hub)) == {*contents(trained), "README.md"}


def test_a_repository_with_nothing_but_a_card_is_empty(hub, trained):
    hub.add("me/mine", {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"})
    push(trained, "me/mine")
    assert {"LICENSE", "model.safetensors"} <= set(arrived(hub))


def test_a_dry_run_sends_nothing_that_writes(hub, trained, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "push", trained, "me/mine", "--dry-run")
    assert code == 0, printed
    assert hub.requests  # it has asked
    assert not hub.writes()
    assert not hub.repos
    for part in (
        "model.safetensors",
        "training_args.bin: a pickle",
        "pipeline_tag: image-text-to-text",
        "would be made",
    ):
        assert part in printed
    size = (trained / "tokenizer.json").stat().st_size
    assert f"{size / 1000:.1f} kB  tokenizer.json" in printed


def test_a_dry_run_without_the_hub(hub, trained, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_TOKEN")
    code, printed = run(monkeypatch, capsys, "push", trained, "me/mine", "--dry-run")
    assert code == 0, printed
    assert "model.safetensors" in printed
    assert "The Hub cannot be reached" in printed


def test_a_public_repository_does_not_take_what_should_be_private(hub, trained, monkeypatch, capsys):
    push(trained, "me/mine")
    check_refused(monkeypatch, capsys, trained, "exists and is public", "push", trained, "me/mine", "--private")


# --- the card ---


def card(hub) -> str:
    return arrived(hub)["README.md"].decode()


def test_a_card_that_someone_wrote_stays(hub, trained, tmp_path):
    own = "---\nlicense: mit\n---\n\n# Ours\n\nBy hand.\n"
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "README.md").write_text(own)
    push(folder, "me/mine")
    assert card(hub) == own
    for _ in range(2):  # the folder has a card that the package wrote, or none
        done = push(trained, "me/mine")
        assert card(hub) == own
        assert "someone wrote" in done.left_out["README.md"]
    push(trained, "me/mine", replace_content=True)
    assert card(hub) != own
    assert not (trained / "README.md").exists()  # nothing is written in the folder


def test_what_was_added_to_the_metadata_on_the_hub_stays(hub, trained):
    """In a repository that was made on the Hub's pages, and in the editor for metadata there."""
    hub.add("me/mine", {"README.md": b"---\nlicense: mit\n---\n"})
    push(trained, "me/mine")
    assert front_matter(card(hub).encode())["license"] == "mit"
    written = card(hub)
    edited = written.replace("license: mit", "license: mit\nlanguage: en\npipeline_tag: other").replace(
        "tags:", "tags:\n- mine"
    )
    hub.head("me/mine")["README.md"] = edited.replace("pipeline_tag: image-text-to-text\n", "").encode()
    push(trained, "me/mine")
    before, after = (front_matter(text.encode()) for text in (written, card(hub)))
    assert after.pop("language") == "en"
    assert set(after.pop("tags")) == {*before.pop("tags"), "mine"}
    assert after == before  # what the files say is said anew


@pytest.mark.parametrize(
    ("on_the_hub", "kept"),
    [
        ({"license": "mit", "license_link": "https://me.example/mit"}, {"license": "apache-2.0"}),
        ({"license": "other", "license_name": "mine", "license_link": "LICENSE"}, {"license": "apache-2.0"}),
        ({"license": "apache-2.0", "license_link": "LICENSE"}, {"license": "apache-2.0", "license_link": "LICENSE"}),
    ],
)
def test_the_fields_of_a_license_go_together(hub, trained, tmp_path, on_the_hub, kept):
    folder = shutil.copytree(trained, tmp_path / "copy")
    hub.add("me/mine", {"README.md": f"---\n{json.dumps(on_the_hub)}\n---\n".encode()})
    push(folder, "me/mine")
    assert license_of(hub) == on_the_hub  # the folder knows none
    (folder / "provenance.json").write_text(
        json.dumps({"base": {"name": "a/b", "id": "a/b", "license": "apache-2.0"}})
    )
    push(folder, "me/mine")
    assert license_of(hub) == kept


def license_of(hub) -> dict[str, str]:
    return {key: value for key, value in front_matter(card(hub).encode()).items() if key.startswith("license")}


# --- results ---


def results_of(accuracy: float, **more) -> str:
    score = {"accuracy": accuracy, "chance": 0.5, "questions": 9000}
    settings = {"benchmark": "POPE", "model": "m", "limit": None, "data": "lmms-lab/POPE"}
    data = {"name": "lmms-lab/POPE", "id": "lmms-lab/POPE"}
    return json.dumps(
        {"settings": settings, "versions": {"agevlm": "1"}, "scores": {"mean": score}, "data": data, **more}
    )


def test_results_that_lie_elsewhere(hub, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "results.json").write_text(results_of(0.875, weights="of a copy in another place"))
    code, printed = run(monkeypatch, capsys, "push", trained, "me/mine", "--results", tmp_path / "pope")
    assert code == 0, printed
    assert "| mean | accuracy | 0.875 |" in card(hub)
    assert b"value: 0.875" in arrived(hub)[".eval_results/pope.yaml"]
    assert "pope/results.json" not in arrived(hub)
    check_refused(
        monkeypatch, capsys, tmp_path, "has no results", "push", trained, "me/mine", "--results", tmp_path / "x"
    )
    hub.head("me/mine")["README.md"] = b"# Ours"
    message = "someone has written this card"
    check_refused(
        monkeypatch, capsys, tmp_path / "pope", message, "push", trained, "me/mine", "--results", tmp_path / "pope"
    )


def test_results_of_former_weights_are_no_results_of_these(hub, trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "pope").mkdir()
    (folder / "pope" / "results.json").write_text(results_of(0.875, weights=read_fingerprint(folder)))
    push(folder, "me/mine")
    assert "0.875" in card(hub)
    assert b"0.875" in arrived(hub)[".eval_results/pope.yaml"]
    assert not caplog.messages
    model = AgeVlmForConditionalGeneration.from_pretrained(folder)
    torch.nn.init.normal_(next(model.model.multi_modal_projector.parameters()))
    model.save_pretrained(folder)
    done = push(folder, "me/mine")
    assert "0.875" not in card(hub)
    assert ".eval_results/pope.yaml" not in arrived(hub)
    assert done.left_out[".eval_results/pope.yaml"] == "results of other weights"
    assert "its card leaves them out: POPE" in caplog.text
    push(folder, "me/mine", results=folder / "pope")  # someone knows better
    assert "0.875" in card(hub)


# --- places of this machine ---


def test_no_path_of_this_machine_is_published(hub, trained, tmp_path, monkeypatch, capsys):
    folder, place = shutil.copytree(trained, tmp_path / "copy"), tmp_path / "my private" / "scenes"
    (folder / "scenes").mkdir()
    told = {"settings": {"data": f"{place}", "images": f"{place}/"}, "title": f"scenes: {place}", "answer": "a / b and/or c", "url": "https://x.example/a/b"}  # fmt: skip
    for name in ("training.json", "scenes/results.json", "scenes/answers.jsonl"):
        (folder / name).write_text(json.dumps(told))
    (folder / "scenes/report.md").write_text(f"# scenes: {place}\n\n- data: {place}\n")
    (folder / "mine.txt").write_text(f"{place}")  # is none of ours
    before = contents(folder)
    code, printed = run(monkeypatch, capsys, "push", folder, "me/mine")
    assert code == 0, printed
    assert contents(folder) == before
    found = arrived(hub)
    assert [name for name, content in found.items() if str(tmp_path).encode() in content] == ["mine.txt"]
    expected = {**told, "settings": {"data": "scenes", "images": "scenes"}, "title": "scenes: scenes"}
    assert json.loads(found["training.json"]) == json.loads(found["scenes/results.json"]) == expected
    assert found["scenes/report.md"].decode() == "# scenes: scenes\n\n- data: scenes\n"
    assert found["tokenizer.json"] == before["tokenizer.json"]
    assert printed.count("only the last part goes up") == 4


# --- failures ---


def test_no_token(hub, trained, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    check_refused(monkeypatch, capsys, trained, "There is no token of the Hub here", "push", trained, "me/mine")
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", "me/mine", "does not accept your token"),
        ("hf_wrong", "mine", "does not accept your token"),
        ("hf_reader", "me/mine", "may not write to me/mine"),
        ("hf_me", "others/mine", "may not write to others/mine"),
        ("hf_me", "me/no/name", "is no id of a repository"),
        ("hf_me", "me/-", "is no id of a repository"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_tokens_and_names_that_are_wrong(hub, trained, token, repo, message, there, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    if there:
        for name in ("me/mine", "others/mine"):
            hub.add(name, {})
    check_refused(monkeypatch, capsys, trained, message, "push", trained, repo)
    assert not hub.messages


def test_a_private_repository_that_the_token_does_not_see(hub, trained, monkeypatch, capsys):
    hub.add("team/mine", {})
    monkeypatch.setattr(
        hub,
        "intercept",
        lambda r: refusal(404, "RepoNotFound", "No") if r.url.path.startswith("/api/models") else None,
    )
    check_refused(monkeypatch, capsys, trained, "team/mine exists on the Hub", "push", trained, "team/mine")


def test_no_network(hub, trained, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    check_refused(monkeypatch, capsys, trained, "The Hub cannot be reached", "push", trained, "me/mine")


@pytest.mark.parametrize(
    ("place", "answer", "message"),
    [
        ("preupload", refusal(403, None, "Over quota"), "Over quota"),
        ("/lfs/", Response(status_code=400), "me/mine is as it was"),
        ("objects/batch", refusal(403, None, "Storage is full"), "Storage is full"),
        ("commit", refusal(500, None, "Internal"), "me/mine is as it was"),
        ("commit", refusal(412, None, "A commit has happened since"), "push again"),
        ("validate-yaml", Response('{"errors": [{"message": "bad license"}]}', 400), "bad license"),
    ],
)
def test_an_upload_that_fails_changes_nothing(hub, trained, place, answer, message, monkeypatch, capsys):
    hub.add("me/mine", {"LICENSE": b"MIT"})
    monkeypatch.setattr(hub, "intercept", lambda request: answer if place in request.url.path else None)
    check_refused(monkeypatch, capsys, trained, message, "push", trained, "me/mine")
    assert arrived(hub) == {"LICENSE": b"MIT"}
    monkeypatch.setattr(hub, "intercept", lambda request: None)
    push(trained, "me/mine")
    assert set(arrived(hub)) == {*contents(trained), "README.md", "LICENSE"}


def test_a_commit_of_someone_else_meanwhile_is_noticed(hub, trained, monkeypatch, capsys):
    hub.add("me/mine", {})

    def meanwhile(request):
        if "/commit/" in request.url.path:
            hub.repos["models", "me/mine"].append({"theirs.txt": b"x"})

    monkeypatch.setattr(hub, "intercept", meanwhile)
    check_refused(monkeypatch, capsys, trained, "Someone else has changed me/mine", "push", trained, "me/mine")
    assert hub.head("me/mine") == {"theirs.txt": b"x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "There is no folder"),
        ("file", "There is no folder"),
        ("empty", "no checkpoint and no data set"),
        ("inside", "It has checkpoints in 1_align: name one of them"),
        ("other", "a model of the type llama, and no AGE-VLM"),
        ("pickled", "no weights as safetensors"),
        ("truncated", "model.safetensors is damaged"),
        ("config", "config.json is damaged"),
        ("shards", "lacks model-00002-of-00002.safetensors"),
    ],
)
def test_a_folder_that_is_no_checkpoint(hub, trained, change, message, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "in"
    if change == "file":
        folder.write_text("x")
    elif change in ("empty", "inside"):
        folder.mkdir()
        if change == "inside":
            shutil.copytree(trained, folder / "1_align")
    elif change != "missing":
        shutil.copytree(trained, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if change == "other":
        config.write_text('{"model_type": "llama"}')
    elif change == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "config":
        config.write_text(config.read_text()[:100])
    elif change == "shards":
        shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    check_refused(monkeypatch, capsys, tmp_path, message, "push", folder, "me/mine")
    assert not hub.requests


# --- other content ---


def test_an_adapter(hub, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base", "peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert push(tmp_path, "me/mine").kind == "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(arrived(hub))


def test_an_adapter_for_a_model_that_others_do_not_have(hub, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(trained), "peft_type": "LORA"})
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    code, printed = run(monkeypatch, capsys, "push", tmp_path, "me/mine", "--dry-run")
    assert code == 0, printed
    assert "is a folder of this machine, which others do not have" in " ".join(printed.split())
    push(tmp_path, "me/mine")
    assert not [name for name, content in arrived(hub).items() if str(trained.parent).encode() in content]
    assert json.loads(arrived(hub)["adapter_config.json"])["base_model_name_or_path"] == trained.name


def test_the_card_that_peft_has_written_brings_no_folder_into_the_metadata(hub, trained, tmp_path):
    model = AgeVlmForConditionalGeneration.from_pretrained(trained)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    assert str(trained) in (tmp_path / "README.md").read_text()
    assert str(trained.parent) not in push(tmp_path, "me/mine").card
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace(str(trained), "me/base"))
    assert front_matter(push(tmp_path, "me/mine").card.encode())["base_model"] == "me/base"


# --- deltas ---


@pytest.fixture
def whole(tmp_path):
    """A whole checkpoint whose parts are in folders, with one tensor of the tower trained."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    tiny_vision().save_pretrained(tmp_path / "vision")
    model, _ = build_checkpoint(str(tmp_path / "text"), str(tmp_path / "vision"), tmp_path / "whole", image_size=64)
    torch.nn.init.normal_(next(model.model.vision_tower.parameters()))
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "training_args.bin").write_bytes(b"pickle")
    return tmp_path / "whole"


def test_a_delta_of_a_checkpoint_is_pushed_and_loaded_by_its_name(hub, whole, tmp_path, monkeypatch, capsys):
    before = contents(whole)
    code, printed = run(monkeypatch, capsys, "push", whole, "me/mine", "--delta", "--dry-run")
    assert code == 0, printed
    assert not hub.messages
    code, printed = run(monkeypatch, capsys, "push", whole, "me/mine", "--delta")
    assert code == 0, printed
    assert contents(whole) == before
    found = arrived(hub)
    assert len(hub.messages) == 1
    assert {"trained.safetensors", "parts.json", "config.json", "tokenizer.json"} <= found.keys()
    assert not {"model.safetensors", "training_args.bin"} & found.keys()
    card = found["README.md"].decode()
    assert "`agevlm` is needed" in card
    assert "agevlm build --delta me/mine --text TEXT_MODEL --vision VISION_MODEL" in card
    assert card.count("--model mine-whole ") == 2  # the commands of the card take what the one before them makes
    assert "--model me/mine" not in card
    (whole / "figures").mkdir()
    monkeypatch.chdir(whole / "figures")
    assert push("..", "me/mine", delta=True, dry_run=True).kind == "delta"
    parts = ["--text", tmp_path / "text", "--vision", tmp_path / "vision"]
    code, printed = run(monkeypatch, capsys, "build", "--delta", "me/mine", *parts, "--out", tmp_path / "again")
    assert code == 0, printed
    models = [AgeVlmForConditionalGeneration.from_pretrained(folder) for folder in (whole, tmp_path / "again")]
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())
    save_trained(models[0], tmp_path / "delta", load_processor(whole))
    push(tmp_path / "delta", "me/other", delta=True)
    assert arrived(hub, "me/other")["trained.safetensors"] == found["trained.safetensors"]


def test_a_calibration_travels_in_every_form_and_is_found(hub, whole, tmp_path, monkeypatch, capsys):
    model = AgeVlmForConditionalGeneration.from_pretrained(whole)
    features = {name: {"mean": 0.0, "scale": 1.0, "weight": 1.0} for name in FEATURES}
    calibration = Calibration(trained_fingerprint(model), features=features, threshold=0.25)
    calibration.save(whole)
    parts = [str(tmp_path / part) for part in ("text", "vision")]
    push(whole, "me/whole")
    push(whole, "me/delta", delta=True)
    assert {"parts.json", CALIBRATION_FILE} <= arrived(hub, "me/delta").keys()
    code, printed = run(monkeypatch, capsys, "build", "--delta", "me/delta", "--text", parts[0], "--vision", parts[1], "--out", tmp_path / "made")  # fmt: skip
    assert code == 0, printed
    for loaded in (
        load_pretrained(AgeVlmForConditionalGeneration, "me/whole"),
        load_trained("me/delta", *parts),
        load_pretrained(AgeVlmForConditionalGeneration, tmp_path / "made"),
    ):
        assert find_calibration(loaded) == calibration


def test_the_card_of_a_delta_with_parts_of_packages_says_how_it_is_loaded():
    card = str(render_model_card(SHIPPED, repo_id="me/demo"))
    assert "`agevlm` is needed" in card
    assert 'load_model("me/demo")' in card
    assert "agevlm build" not in card


def test_what_is_no_model_is_not_pushed_as_a_delta(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base", "peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    check_refused(
        monkeypatch, capsys, tmp_path, "Only a model can be pushed as a delta", "push", tmp_path, "me/mine", "--delta"
    )
    assert not hub.messages
