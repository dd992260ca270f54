# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint or a data set comes from: one small JSON file in its folder, which later work carries on and cards are made of.

    {
      "base": {"name": …, "id": …},                    # an AGE-VLM of the Hub that training began with
      "adapts": {"name": …, "id": …, "delta": true},   # of a PEFT adapter, the model that it is put on
      "parts": {"text": {"name": …, "id": …, "license": …}, "vision": {…}},
      "stages": [{"name": "align", "trainer": …, "settings": {…}, "data": [{"name": …, "id": …, "license": …}], …}]
    }

It names models and data sets by their ids on the Hub, or by the last part of their paths. What is not known is left out. What a part
is exactly, its revision and its digests, is told by the configuration ([`agevlm.parts`]).
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .files import PACKAGE_PREFIX, new_file, resolve_package_file
from .hub import Kind, ask_hub, within_patience
from .parts import is_hub_id

FILE = "provenance.json"

# A folder of the Hub's cache: models--OWNER--NAME/snapshots/REVISION
_SNAPSHOT = re.compile(r"(?:models|datasets)--([^/]+)/snapshots/([0-9a-f]{40})/?$")

# Licenses in texts of people, and their identifiers on the Hub.
_LICENSES = (
    (r"\bCC[ -](BY(?:[ -](?:SA|NC|ND))*)[ -](\d\.\d)", lambda m: f"cc-{m[1].replace(' ', '-')}-{m[2]}"),
    (r"\bCC0\b", lambda m: "cc0-1.0"),
    (r"\b([AL]?)GPL(?:[ -]?v?|, version )(\d(?:\.\d)?)", lambda m: f"{m[1]}gpl-{m[2] if '.' in m[2] else m[2] + '.0'}"),
    (r"\bApache(?:[ -]?(?:Software )?License)?[, -]*(?:version )?2(?:\.0)?\b", lambda m: "apache-2.0"),
    (r"\bBSD[ -]([23])[ -]Clause\b", lambda m: f"bsd-{m[1]}-clause"),
    (r"\bMIT\b", lambda m: "mit"),
)  # fmt: skip


def read_provenance(folder: str | os.PathLike) -> dict[str, Any]:
    """The provenance in a folder; empty where there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    file = Path(folder, FILE)
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): replace it, or delete it and with it what it tells") from error
    return found


def write_provenance(folder: str | os.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the provenance of what is in a folder."""
    with new_file(Path(folder, FILE)) as partial:
        partial.write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def model_provenance(name: str | os.PathLike) -> dict[str, Any]:
    """Where an AGE-VLM comes from that training begins with: the provenance in its folder, or of the Hub's model, which is then
    the `base` and whose own stages are told by its own card.

    Args:
        name: as in `model.name_or_path`: a folder, a Hub id, or empty.
    """
    if not name or (os.path.isdir(name) and not _SNAPSHOT.search(os.fspath(name))):
        return read_provenance(name) if name else {}
    base = describe(name)
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = read_provenance(
            name if os.path.isdir(name) else Path(_hub_file(os.fspath(name), "model", FILE)).parent
        )
    return {"base": base, **({"parts": found["parts"]} if "parts" in found else {})}


def identify(name: str | os.PathLike) -> dict[str, str]:
    """What to call a model or a data set in public: its `name`, and its `id` and `revision` on the Hub where it is from there.

    Args:
        name: a folder, a file, `package:MODULE/FILE`, an address, or a Hub id. Of paths the last part is the name.
    """
    name = os.fspath(name)
    if match := _SNAPSHOT.search(os.path.abspath(name)):
        return {"name": (id := match[1].replace("--", "/")), "id": id, "revision": match[2]}
    if name.startswith(PACKAGE_PREFIX) or "://" in name or os.path.exists(name) or not is_hub_id(name):
        return {"name": re.split(r"[/\\]", (os.path.abspath(name) if os.path.exists(name) else name).rstrip("/"))[-1]}
    return {"name": name, "id": name}


def describe(name: str | os.PathLike, kind: Kind = "model") -> dict[str, Any]:
    """[`identify`], and the `license` (an identifier of the Hub, or a list of them) and `language` as far as they are known
    without loading it: from its card, its `ATTRIBUTION.md` or its GGUF file."""
    found: dict[str, Any] = dict(identify(name))
    name = resolve_package_file(name)
    facts: dict[str, Any] = {}
    if os.path.isdir(name):
        facts = _card_facts(Path(name, "README.md"))
        if (made := read_provenance(name).get("kind")) is not None:
            facts["kind"] = made
        attribution = Path(name, "ATTRIBUTION.md")
        if "license" not in facts and attribution.is_file():
            facts |= _one_or_all("license", find_licenses(attribution.read_text(encoding="utf-8")))
    elif name.endswith(".gguf"):
        facts = _gguf_facts(Path(name))
    elif "id" in found:
        with contextlib.suppress(OSError, ValueError):
            facts = _card_facts(Path(_hub_file(name, kind, "README.md")))
    return found | facts


def find_licenses(text: str) -> list[str]:
    """The licenses that a text names, as identifiers of the Hub, in the order of the text."""
    found = [(m.start(), name(m).lower()) for pattern, name in _LICENSES for m in re.finditer(pattern, text, re.I)]
    return list(dict.fromkeys(license for _, license in sorted(found)))


def _hub_file(id: str, kind: Kind, file: str) -> str:
    """
    Raises:
        OSError: if neither the Hub nor its cache has it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo_type = kind.replace(" ", "")
    if isinstance(cached := try_to_load_from_cache(id, file, repo_type=repo_type), str):
        return cached
    if (error := ask_hub(id, kind)) is not None:
        raise OSError(str(error)) from error
    return within_patience(lambda: hf_hub_download(id, file, repo_type=repo_type))


def _card_facts(file: Path) -> dict[str, Any]:
    """License and language of a card, where it has them."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if data.get("license") == "other":
        data["license"] = data.get("license_name") or "other"
    return {name: data[name] for name in ("license", "language") if data.get(name)}


def _gguf_facts(file: Path) -> dict[str, Any]:
    """The license in the head of a GGUF file: a key, the number 8 for a text in 4 bytes, its length in 8, and the text.

    The library reads the whole vocabulary before that, which takes seconds.
    """
    key = b"general.license\x08\0\0\0"
    with file.open("rb") as opened:
        _, found, rest = opened.read(1 << 16).partition(key)
    license = rest[8 : 8 + int.from_bytes(rest[:8], "little")].decode(errors="replace")
    return {"license": license} if found and license else {}


def _one_or_all(name: str, values: list[str]) -> dict[str, Any]:
    return {name: values[0] if len(values) == 1 else values} if values else {}
