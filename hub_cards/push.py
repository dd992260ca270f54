# SPDX-License-Identifier: Apache-2.0
"""Pushing checkpoints and data sets to the Hub: one commit, without pickles, or nothing at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .. import __version__
from ..hub import MODEL_TYPE, PATIENCE, damaged_file, traveling_files
from ..provenance import identify
from .dataset import render_dataset_card
from .model import collect_results, is_generated, read_json, render_model_card, result_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoCard

Kind = Literal["model", "adapter", "delta", "data set"]

_KINDS: dict[str, Kind] = {
    "dataset_dict.json": "data set", "state.json": "data set", "parts.json": "delta", "config.json": "model",
    "adapter_config.json": "adapter",
}  # fmt: skip
_SHARDS = ("*.safetensors", "*.safetensors.index.json", "*.arrow")
LICENSE = ("license", "license_name", "license_link")
"""What a card says of the license."""

_TELLING = (
    "adapter_config.json", "training.json", "trainer_state.json", "provenance.json", "results.json", "report.md",
    "answers.jsonl", "grounding.json", "attention.json", "similarity.json", "prepared.json", "bad.jsonl",
)  # fmt: skip
"""Files that this package and PEFT write, and that have places of models and data."""

# An absolute path up to the end of a JSON text or a line, and its last part.
_PATH = re.compile(r'(?<=["\s])/([^/"\n]+)/(?:[^"\n]*/)?([^/"\n]+)/*(?=["\n]|$)')
_PROCESSORS = {"processor_config.json", "preprocessor_config.json"}
_EVERYWHERE = (".git*", "README.md", "LICENSE*", "ATTRIBUTION.md")


@dataclass(frozen=True)
class Push:
    """What a push has done, or would do.

    Args:
        repo_id: OWNER/NAME on the Hub.
        kind: what the folder has. A data set goes to a data set's repository, all else to a model's.
        sizes: what goes up, by path in the repository, in bytes.
        left_out: what stays here, by path in the folder, with the reason.
        removed: what a former push has left in the repository, and this one removes.
        card: the card that the repository has then.
        repository: "new", "exists", or why the Hub could not be asked.
        url: of the commit; None where nothing was pushed.
        notes: what to know of files that go up, by path.
    """

    repo_id: str
    kind: Kind
    sizes: dict[str, int]
    left_out: dict[str, str]
    removed: list[str] = field(default_factory=list)
    card: str = ""
    repository: str = "new"
    url: str | None = None
    notes: dict[str, str] = field(default_factory=dict)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    replace_content: bool = False,
    delta: bool = False,
    results: str | os.PathLike | Sequence[str | os.PathLike] = (),
    dry_run: bool = False,
    token: str | None = None,
) -> Push:
    """Pushes a checkpoint or a data set to the Hub in one commit, with its card.

    A repository that does not exist is made. In one that exists, the files of the folder replace those of the same name,
    weights and tables of a former push that the folder does not have are removed in the same commit, and all else
    stays. Until the commit the repository is as it was, whatever happens. Of absolute paths in the files of [`_TELLING`] the last
    part goes up.

    Args:
        folder: a checkpoint with its processor, a PEFT adapter, or a data set of `save_to_disk`.
        repo_id: OWNER/NAME, or NAME alone for your own.
        private: make a new repository private.
        replace_content: remove all that the repository has and the folder does not have, whatever it is.
        delta: push what was trained in a whole checkpoint, and the names and digests of its parts ([`~agevlm.deltas`]).
        results: files or folders with results of `agevlm eval` for the model's card, beside those in the folder itself.
        dry_run: only find out what would be done; nothing is sent.
        token: of the Hub; by default HF_TOKEN or that of `hf auth login`.

    Raises:
        ValueError: if the folder is no checkpoint and no data set, one of its files is damaged, the id is none, the repository
            has other content, or it is public and should be private; or if `results` cannot be in a card.
        PermissionError: if there is no token, the Hub does not accept it, or it may not write there.
        OSError: if the Hub cannot be reached, or refuses the commit for another reason.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is no id of a repository: write it as OWNER/NAME, as me/my-age-vlm.") from error
    folder = Path(folder)
    kind = _folder_kind(folder)
    if not dry_run and token is None and get_token() is None:
        raise PermissionError(
            "There is no token of the Hub here: log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    if delta and kind == "model":
        from ..deltas import write_as_delta

        with tempfile.TemporaryDirectory() as work:
            made = Path(work, folder.resolve().name)
            write_as_delta(folder, made)
            done = push(
                made, repo_id, private=private, replace_content=replace_content, results=results, dry_run=dry_run,
                token=token,
            )  # fmt: skip
        return replace(done, left_out=traveling_files(folder)[1] | done.left_out)
    if delta and kind != "delta":
        raise ValueError(
            f"Only a model can be pushed as a delta, and {folder} has none but {kind} files: leave --delta out."
        )
    api = HfApi(token=token, library_name="agevlm", library_version=__version__)
    repo_type = "dataset" if kind == "data set" else "model"
    found, left_out = traveling_files(folder)
    files: dict[str, Path | bytes] = {**found}
    notes = _shorten_paths(files)
    if kind == "adapter" and (base := _local_base(folder)) is not None:
        notes["adapter_config.json"] = (
            f"its base model {base} is a folder of this machine, which others do not have. Push that first, set "
            "base_model_name_or_path to its id, and push this again."
        )
    if kind in ("model", "delta") and not files.keys() & _PROCESSORS:
        notes["config.json"] = (
            "the folder has no processor, without which nobody can ask the model: save it here with "
            "`processor.save_pretrained`, and push this again."
        )
    scores, outdated = ([], []) if kind == "data set" else collect_results(folder, results)
    for path in set(outdated) & files.keys():
        del files[path]
        left_out[path] = "results of other weights"
    info, removed, former, repository = None, [], "", "new"
    try:
        with _explained(repo_id):
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            info = _repo_info(api, repo_id, repo_type)
            if info is not None:
                repository = "exists"
                removed = _former_files(api, info, kind, files, replace_content, outdated)
                former = "" if replace_content else _read_card(api, info, repo_type)
    except OSError as error:
        if not dry_run:
            raise
        repository = str(error)
    if private and info is not None and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private in its settings on the Hub first, or leave --private out."
        )
    card = _make_card(folder, kind, repo_id, former, scores)
    if results and (kind == "data set" or not is_generated(_split((card or {}).get("README.md", former))[1])):
        raise ValueError(
            "--results go into a model's card that agevlm writes, and "
            + ("this is a data set" if kind == "data set" else "someone has written this card")
            + ": leave them out."
        )
    if card is None:
        files.pop("README.md", None)
        left_out["README.md"] = "the repository has a card that someone wrote"
    else:
        files |= {path: text.encode() for path, text in card.items()}
    sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files.items()}
    plan = Push(
        repo_id, kind, sizes, left_out, removed, former if card is None else card.get("README.md", ""), repository,
        notes=notes,
    )  # fmt: skip
    if dry_run:
        return plan
    with _explained(repo_id):
        if info is None:
            api.create_repo(repo_id, repo_type=repo_type, private=private or None)
        commit = api.create_commit(
            repo_id,
            [CommitOperationDelete(path) for path in removed]
            + [CommitOperationAdd(path, file) for path, file in files.items()],
            commit_message=f"Upload {kind} with agevlm {__version__}",
            repo_type=repo_type,
            parent_commit=info.sha if info is not None else None,
        )
    return replace(plan, url=str(commit.commit_url))


# --- the folder ---


def _kind(names: Collection[str]) -> Kind | None:
    """What files of these names are, in a folder or a repository."""
    return next((kind for name, kind in _KINDS.items() if name in names), None)


def _folder_kind(folder: Path) -> Kind:
    """
    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is no checkpoint of an AGE-VLM and no data set, or a file is damaged or missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: name a checkpoint or a data set.")
    names = {file.name for file in folder.iterdir() if file.is_file()}
    kind = _kind(names)
    if kind is None:
        inside = sorted(place.parent.name for place in folder.glob("*/config.json"))
        raise ValueError(
            f"{folder} is no checkpoint and no data set: it has neither of {', '.join(_KINDS)}. "
            + (f"It has checkpoints in {', '.join(inside)}: name one of them." if inside else "Name another folder.")
        )
    if (damaged := damaged_file(folder)) is not None:
        raise ValueError(f"{damaged}: replace the file before you push the folder.")
    if kind == "data set":
        return kind
    if kind == "model":
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"{folder} has a model of the type {model_type}, and no AGE-VLM: push it with `hf upload`, or name another folder."
            )
    needed = {
        name for index in folder.glob("*.index.json") for name in read_json(index).get("weight_map", {}).values()
    }
    if missing := sorted(needed - names):
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which its index of weights names: save the model again."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder} has no weights as safetensors: save the model with `save_pretrained`.")
    return kind


def _shorten_paths(files: dict[str, Path | bytes]) -> dict[str, str]:
    """Puts the last part in place of paths of this machine; says in which files."""
    notes = {}
    for path, file in files.items():
        if path.split("/")[-1] in _TELLING and isinstance(file, Path):
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
            public = _PATH.sub(lambda found: found[2] if os.path.exists(f"/{found[1]}") else found[0], text)
            if public != text:
                files[path] = public.encode(errors="surrogateescape")
                notes[path] = "of paths of this machine only the last part goes up"
    return notes


def _local_base(folder: Path) -> str | None:
    """The folder that an adapter was trained on; None where it is a model of the Hub."""
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    return base if os.path.isabs(base) or os.path.isdir(base) else None


# --- the card ---


def _make_card(
    folder: Path, kind: Kind, repo_id: str, former: str, results: Sequence[Mapping[str, Any]]
) -> dict[str, str] | None:
    """The card and the Hub's files of results, by path, made anew from a folder whose card nobody has written by hand.

    Args:
        former: the card in the repository, of which metadata are kept that the folder does not tell.
        results: of the model.

    Returns:
        None where someone has written the card in the repository.
    """
    here = folder / "README.md"
    try:
        own = here.read_text(encoding="utf-8") if here.is_file() else ""
        fields, _ = _split(own)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{here} is no card that the Hub takes ({' '.join(str(error).split())}): correct it."
        ) from error
    if not is_generated(own):
        return {"README.md": own}
    if not is_generated(_split(former)[1]):
        return None
    card = (
        render_dataset_card(folder, repo_id=repo_id)
        if kind == "data set"
        else render_model_card(folder, results, repo_id=repo_id, needs_agevlm=kind == "delta")
    )
    for known in (fields, _split(former)[0]):
        _keep_metadata(card, known)
    return {"README.md": str(card), **result_files(results)}


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    from huggingface_hub import RepoCard

    if not card.strip():
        return {}, ""
    read = RepoCard(card, ignore_metadata_errors=True)
    return read.data.to_dict(), read.text


def _keep_metadata(card: RepoCard, former: Mapping[str, Any]) -> None:
    """Gives a card the metadata of a former one that it lacks, such as a license that someone chose on the Hub."""
    others = [name for name in LICENSE if card.data.get(name) not in (None, former.get(name))]
    for name, value in former.items():
        if name in LICENSE and others:  # a name and a link are of one license
            continue
        if name == "tags":
            tags = [value] if isinstance(value, str) else value
            # The Hub makes tags of base models itself.
            tags = [tag for tag in tags if not str(tag).startswith("base_model:")]
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
        elif name == "base_model" and not all(
            "id" in identify(str(base)) for base in ([value] if isinstance(value, str) else value)
        ):  # PEFT writes folders of this machine
            continue
        elif name != "model-index" and card.data.get(name) is None:  # results are of the weights that they came with
            card.data[name] = value


# --- the repository ---


def _repo_info(api: HfApi, repo_id: str, repo_type: str) -> Any:
    """What the Hub knows of a repository; None if it has none, or none that the token sees."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(repo_id, repo_type=repo_type, timeout=PATIENCE)
    except RepositoryNotFoundError:
        return None


def _read_card(api: HfApi, info: Any, repo_type: str) -> str:
    """The card of a repository; empty if it has none."""
    if not any(file.rfilename == "README.md" for file in info.siblings):
        return ""
    file = api.hf_hub_download(info.id, "README.md", repo_type=repo_type, revision=info.sha)
    return Path(file).read_text(encoding="utf-8")


def _former_files(
    api: HfApi, info: Any, kind: Kind, files: Collection[str], replace_content: bool, outdated: Collection[str]
) -> list[str]:
    """What a push removes from a repository.

    Args:
        outdated: the Hub's files of results of other weights.

    Raises:
        ValueError: if the repository has something else than the folder.
    """
    names = [file.rfilename for file in info.siblings]
    others = [name for name in names if name not in files and name != "README.md"]
    if replace_content:
        return [name for name in others if name != ".gitattributes"]  # which says what is stored through LFS
    own = [name for name in names if not any(fnmatch(name, pattern) for pattern in _EVERYWHERE)]
    found = _kind(names)
    depth = 1 if kind == "data set" else 0  # splits have a folder each
    former = [
        name
        for name in others
        if (name.count("/") <= depth and any(fnmatch(name, pattern) for pattern in _SHARDS)) or name in outdated
    ]
    what = f"a {found}" if found else f"other content ({', '.join(own[:3])}{', …' if len(own) > 3 else ''})"
    if own and found == kind == "model":
        file = api.hf_hub_download(info.id, "config.json", revision=info.sha)
        if (model_type := read_json(Path(file)).get("model_type")) != MODEL_TYPE:
            found, what = None, f"a model of another type ({model_type})"
    if own and found != kind:
        raise ValueError(
            f"{info.id} exists on the Hub and has {what}, and the folder has a {kind}: choose another REPO_ID. With "
            "--replace all that the repository has and the folder does not have is removed (its history stays)."
        )
    return former


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Makes one plain error of all that the Hub and its client answer.

    Raises:
        PermissionError: for a token that is missing, wrong or without the right to write.
        OSError: for all else.
    """
    from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, RuntimeError, ConnectionError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
        status = None if answer is None else answer.response.status_code
        reason = (answer.server_message if answer is not None else None) or str(chain[-1]).split("\n")[0]
        reason = reason or type(chain[-1]).__name__
        unchanged = f"{repo_id} is as it was"
        if isinstance(error, LocalTokenNotFoundError):
            raise PermissionError(
                "There is no token of the Hub here: log in with `hf auth login`, or set HF_TOKEN."
            ) from error
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept your token ({reason}): log in with `hf auth login`, or correct HF_TOKEN."
            ) from error
        if status == 403:
            raise PermissionError(
                f"Your token may not write to {repo_id} ({reason}): use a token that may, and as OWNER your name or that of an "
                "organization of yours."
            ) from error
        if status == 409:
            raise OSError(
                f"{repo_id} exists on the Hub, where your token does not see it ({reason}): choose another name."
            ) from error
        if status == 412:
            raise OSError(f"Someone else has changed {repo_id} during the push ({reason}): push again.") from error
        if isinstance(answer, BadRequestError):
            raise OSError(f"The Hub refuses this push ({reason}). {unchanged}.") from error
        raise OSError(
            f"The Hub cannot be reached, or fails ({reason}). {unchanged}: push again when it answers; what has arrived is not "
            "sent twice."
        ) from error
