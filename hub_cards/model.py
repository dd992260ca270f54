# SPDX-License-Identifier: Apache-2.0
"""Cards of models: `README.md` and the Hub's files of results, from what lies in a checkpoint's folder."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from ..files import update_folder
from ..parts import PARTS_FILE, read_fingerprint, read_parts, unnamed_parts
from ..provenance import read_provenance

logger = logging.getLogger(__name__)

MARK = "Written by agevlm from the files in this folder. Delete this line to keep changes of your own."
"""The last line of a card that is written again, whenever there is more to tell."""

# What other writers of cards leave in theirs.
_BLANK = (MARK, "[More Information Needed]", "generated automatically according to the information the Trainer had")

_TEMPLATES = Path(__file__).parent / "templates"

TAGS = ("agevlm", "vision-language-model", "visual-grounding")


def tidy(card: Any) -> Any:
    """A card without the lines that conditions in its template leave empty."""
    card.text = "\n" + re.sub(r"\n{3,}", "\n\n", card.text).strip() + "\n"
    return card


class AgeVlmModelCard(ModelCard):
    """The card of an AGE-VLM, of what training added to one (a delta), or of a PEFT adapter for one."""

    default_template_path = _TEMPLATES / "model.md.jinja"

    @classmethod
    def from_template(cls, *args: Any, **kwargs: Any) -> Any:
        return tidy(super().from_template(*args, **kwargs))


def write_model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    results: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    needs_agevlm: bool = False,
    title: str | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    **fields: Any,
) -> AgeVlmModelCard | None:
    """Writes the card of a checkpoint, `README.md`, from what lies in its folder: the configuration, where it comes from
    ([`agevlm.provenance`]), results of `agevlm eval`, `training.png` and a figure of `agevlm attention`.

    Results on data sets of the Hub are written to `.eval_results/*.yaml` as well.

    Args:
        folder: of a model, of a delta or of a PEFT adapter.
        repo_id: where it is going to be on the Hub; by default the folder's name stands for it.
        results: folders or files with `results.json`, beside those in the folder itself ([`collect_results`]).
        needs_agevlm: the folder has the trained part only, which `agevlm` loads; known by itself where it has a `parts.json`.
        title: by default the name of the repository or the folder.
        overwrite: also replace a card that someone wrote.
        config, adapter: the content of `config.json` and `adapter_config.json`, of a model that is not saved yet.
        fields: metadata that replace those found, such as `license`, `language`, `datasets` and `base_model`; `tags` are
            added.

    Returns:
        The card; None where there is one that someone wrote, which stays.

    Raises:
        OSError: if the folder cannot be read or written, or `results` have none.
        ValueError: if a file in it, or one of the results, is damaged.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    if not overwrite and readme.is_file() and not is_generated(readme.read_text(encoding="utf-8")):
        return None
    found, outdated = collect_results(folder, results or [])
    card = render_model_card(
        folder,
        found,
        repo_id=repo_id,
        needs_agevlm=needs_agevlm,
        title=title,
        config=config,
        adapter=adapter,
        **fields,
    )
    with update_folder(folder) as partial:
        card.save(partial / "README.md")
        for path, text in result_files(found).items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
    for path in outdated:
        (folder / path).unlink(missing_ok=True)
    return card


def is_generated(text: str) -> bool:
    """Whether a program wrote a card, and nobody has claimed it since."""
    return not text.strip() or any(mark in text for mark in _BLANK)


def render_model_card(
    folder: str | os.PathLike,
    results: Sequence[Mapping[str, Any]] = (),
    *,
    repo_id: str | None = None,
    needs_agevlm: bool = False,
    title: str | None = None,
    config: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    **fields: Any,
) -> AgeVlmModelCard:
    """The card that [`write_model_card`] writes.

    Args:
        results: the content of files `results.json`.
    """
    folder = Path(folder)
    name = repo_id or os.path.basename(os.path.abspath(folder))
    provenance = read_provenance(folder)
    needs_agevlm = needs_agevlm or (folder / PARTS_FILE).is_file()
    if config is None and adapter is None:
        config, adapter = (read_json(folder / file) for file in ("config.json", "adapter_config.json"))
    config = config or {}
    adapter = {} if config else adapter or {}
    method = str(getattr(adapter.get("peft_type"), "value", adapter.get("peft_type", "PEFT")))
    exact = read_parts(folder) if (folder / PARTS_FILE).is_file() else config.get("parts") or {}
    parts, stages = provenance.get("parts") or _parts_on_hub(exact), provenance.get("stages", [])
    base, adapted = provenance.get("base"), provenance.get("adapts")
    if adapter and adapted is None and adapter.get("base_model_name_or_path"):
        from ..deltas import identify_adapted

        adapted = identify_adapted(adapter["base_model_name_or_path"])
    base = base or adapted
    data = _distinct(source for stage in stages for source in stage.get("data", []))
    untrained = not stages and bool(provenance.get("untrained"))

    licenses = _licenses(
        [("the model it began with", base), *((f"{kind} model", part) for kind, part in parts.items())]
    )
    text_config = config.get("text_config") or {}
    found = {
        "language": _flat(source.get("language") for source in (base or {}, *parts.values(), *data)) or None,
        **_license_fields([base] if base and base.get("id") else list(parts.values())),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        **_base_fields(base, parts, bool(stages), bool(adapter) or needs_agevlm),
        "datasets": [source["id"] for source in data if "id" in source] or None,
        "tags": [*TAGS, *([method.lower(), "transformers"] if adapter else [])],
    }
    given = {field: value for field, value in fields.items() if value is not None}
    given["tags"] = [*found["tags"], *_flat([stage.get("tags") for stage in stages]), *_flat([given.get("tags")])]
    evaluated = eval_results(results)
    known: dict[str, Any] = {**found, **given}
    if evaluated:
        known |= {"eval_results": evaluated, "model_name": name.split("/")[-1]}
    card_data = ModelCardData(**known)
    figure = _figure(folder)
    return AgeVlmModelCard.from_template(
        card_data,
        title=title or name.split("/")[-1],
        name=name,
        adapter=_adapter_name(method, adapter),
        base=base,
        adapted=adapted or base,
        link=link,
        needs_agevlm=needs_agevlm,
        unnamed=unnamed_parts(exact) if needs_agevlm else [],
        untrained=untrained,
        quantized=_quantization(config),
        layers=_layers(text_config),
        num_layers=text_config.get("num_hidden_layers"),
        parts=table([["", "built of"], *([f"{kind} model", link(part)] for kind, part in parts.items())]) if parts else None,
        figure=figure,
        stages=_stage_table(stages),
        curves="training.png" if (folder / "training.png").is_file() else None,
        data=_data_table(data),
        results=[_result_section(result) for result in results],
        pointing=any("pointing" in result["scores"] for result in results),
        intervals=any("interval" in row for result in results for row in result["scores"].values()),
        limits=_limits(config, stages, data, results, untrained),
        licenses=table([["", "license"], *licenses, *_licenses([(source["name"], source) for source in data])])
        if licenses or any("license" in source for source in data)
        else None,
        mark=MARK,
    )  # fmt: skip


# --- metadata ---


def _base_fields(
    base: Mapping[str, Any] | None, parts: Mapping[str, Any], trained: bool, is_adapter: bool
) -> dict[str, Any]:
    """What the Hub shows as the model tree. It knows ids only."""
    ids = [base["id"]] if base and "id" in base else [part["id"] for part in parts.values() if "id" in part]
    if not ids:
        return {}
    relation = "adapter" if is_adapter else "finetune" if trained or (base and "id" in base) else "merge"
    return {"base_model": ids[0] if len(ids) == 1 else ids, "base_model_relation": relation}


def _license_fields(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The license of a model that is made of others, where all of theirs are known."""
    known = [_flat([source.get("license")]) for source in sources]
    names = list(dict.fromkeys(name for licenses in known for name in licenses))
    if not all(known) or not names:
        return {}
    if len(names) == 1:
        return {"license": names[0]}
    return {"license": "other", "license_name": "-and-".join(names)}


def eval_results(results: Iterable[Mapping[str, Any]]) -> list[EvalResult]:
    """The scores of files `results.json` as entries of a card's `model-index`."""
    entries = []
    for result in results:
        settings, data = result["settings"], _data_of(result)
        for part, row in _scored(result["scores"]):
            metric, value = _metric(part, row)
            beside = {name: row[name] for name in ("chance", "interval", "questions") if row.get(name) is not None}
            entries.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=data.get("id") or _slug(data["name"]),
                    dataset_name=f"{settings['benchmark']} ({data['name']})",
                    dataset_split=settings.get("split"),
                    metric_type=metric,
                    metric_name=f"{part.replace('_', ' ')}: {metric.replace('_', ' ')}",
                    metric_value=value,
                    metric_args=beside or None,
                )
            )
    return entries


def result_entries(results: Iterable[Mapping[str, Any]]) -> dict[str, EvalResultEntry]:
    """The whole scores on benchmarks of the Hub, by the names of their files in `.eval_results`.

    Scores of the first questions only, or of some categories, are left out: others would compare them with whole ones.
    """
    entries = {}
    for result in results:
        settings, data, scores = result["settings"], _data_of(result), result["scores"]
        whole = next((scores[name] for name in ("overall", "mean") if name in scores), None)
        if whole is None or "id" not in data or whole.get("accuracy") is None:
            continue
        if any(settings.get(name) is not None for name in ("limit", "categories", "tasks")):
            continue
        notes = f"accuracy from 0 to 1, {whole['questions']} questions, agevlm {result['versions']['agevlm']}"
        if whole.get("chance") is not None:
            notes += f", chance {whole['chance']:.4f}"
        entries[_slug(settings["benchmark"])] = EvalResultEntry(
            dataset_id=data["id"], task_id="default", value=whole["accuracy"], notes=notes
        )
    return entries


def result_files(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The Hub's files of results, by path in the repository: [`result_entries`] as YAML."""
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True
        )
        for name, entry in result_entries(results).items()
    }


# --- results ---


def collect_results(
    folder: str | os.PathLike, named: str | os.PathLike | Sequence[str | os.PathLike] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results for a checkpoint's card: those in its folder, unless they are of other weights than it has now, and those named.

    Results without a fingerprint of the weights count as the folder's own.

    Returns:
        The results, and the paths of the Hub's files that those of other weights have left.

    Raises:
        OSError, ValueError: as [`read_results`].
    """
    own, given = read_results([folder], required=False), read_results(named)
    weights = read_fingerprint(folder) if any("weights" in result for result in own) else None
    found = [result for result in own if weights is None or result.get("weights", weights) == weights]
    found += [result for result in given if result not in found]
    if others := [result for result in own if result not in found]:
        names = ", ".join(dict.fromkeys(result["settings"]["benchmark"] for result in others))
        logger.warning(
            f"{folder} has other weights now than those that these results are of, and its card leaves them out: {names}. Run "
            "`agevlm eval` again into a new folder, or delete them."
        )
    return found, sorted(result_files(others).keys() - result_files(found).keys())


def read_results(
    places: str | os.PathLike | Sequence[str | os.PathLike], required: bool = True
) -> list[dict[str, Any]]:
    """The results of `agevlm eval` in files, in folders and in their folders, two floors deep.

    Raises:
        FileNotFoundError: if one of the places has none, and `required`.
        ValueError: if a file is damaged.
    """
    found = []
    for place in [places] if isinstance(places, str | os.PathLike) else places:
        path = Path(place)
        patterns = ("results.json", "*/results.json", "*/*/results.json")
        files = [path] if path.is_file() else [file for pattern in patterns for file in sorted(path.glob(pattern))]
        files = [file for file in files if not file.parent.name.startswith(("checkpoint-", "."))]
        read = [(file, read_json(file)) for file in files]
        known = [content for _, content in read if {"settings", "scores", "versions"} <= content.keys()]
        if required and not known:
            raise FileNotFoundError(
                f"{path} has no results: name a folder that `agevlm eval` has written, which has a results.json"
            )
        found += [content for content in known if "benchmark" in content["settings"]]
    return found


def _data_of(result: Mapping[str, Any]) -> dict[str, Any]:
    return result.get("data") or {
        "name": os.path.basename(str(result["settings"].get("data", "its data")).rstrip("/"))
    }


def _scored(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(part, row) for part, row in scores.items() if _metric(part, row)[1] is not None]


def _metric(part: str, row: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name and the value of a row's first metric."""
    if "accuracy" in row:
        return "accuracy", row["accuracy"]
    return {"objects": "f1", "pointing": "pointing_accuracy"}.get(part, "accuracy"), row.get("score")


def _result_section(result: Mapping[str, Any]) -> dict[str, Any]:
    settings, scored, data = result["settings"], _scored(result["scores"]), _data_of(result)
    columns = [("interval", "95 % interval"), ("chance", "chance"), ("f1", "F1"), ("yes_ratio", "yes ratio"), ("questions", "questions")]  # fmt: skip
    columns = [(key, label) for key, label in columns if any(row.get(key) is not None for _, row in scored)]
    rows = [["", "metric", "score", *(label for _, label in columns)]]
    for part, row in scored:
        metric, value = _metric(part, row)
        rows.append(
            [part.replace("_", " "), metric.replace("_", " "), _number(value), *(_number(row.get(key)) for key, _ in columns)]
        )  # fmt: skip
    facts = [f"Data: {link(data, 'datasets/')}"]
    if settings.get("split"):
        facts.append(f"split {settings['split']}")
    if settings.get("limit") is not None:
        facts.append(f"**the first {settings['limit']} questions of each kind only**")
    facts += [f"weights in {settings['dtype']}"] if "dtype" in settings else []
    facts.append(f"measured with agevlm {result['versions']['agevlm']}")
    return {"title": settings["benchmark"], "facts": ", ".join(facts) + ".", "rows": table(rows)}


# --- text ---


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return " to ".join(_number(part) for part in value)
    return str(value) if isinstance(value, int | str) else f"{value:.3f}"


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str | None:
    """A column for each stage, and a row for each of its settings."""
    if not stages:
        return None
    keys = list(dict.fromkeys(key for stage in stages for key in stage.get("settings", {})))
    rows = [[key, *(setting(stage.get("settings", {}).get(key)) for stage in stages)] for key in keys]
    return table([["", *(stage["name"] for stage in stages)], *rows])


def setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value)
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _data_table(data: Sequence[Mapping[str, Any]]) -> str | None:
    if not data:
        return None
    columns = [
        key
        for key in ("configuration", "split", "rows", "weight", "settings", "license")
        if any(source.get(key) for source in data)
    ]
    rows = [[link(source, "datasets/"), *(setting(source.get(key)) for key in columns)] for source in data]
    return table([["data set", *columns], *rows])


def _licenses(sources: Iterable[tuple[str, Mapping[str, Any] | None]]) -> list[list[str]]:
    return [
        [f"{label} ({link(source)})" if label != source["name"] else label, setting(source["license"])]
        for label, source in sources
        if source and source.get("license")
    ]


def _limits(
    config: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    data: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    untrained: bool,
) -> list[str]:
    languages = _flat(source.get("language") for source in data)
    limits = [
        "A map shows where the cross-attention looks while a word is read. It does not show why an answer was given.",
        "It can report what is not in the image, and be wrong about what is. Do not let it decide about people.",
    ]
    if languages:
        limits.append(f"The texts that it was trained with are in: {', '.join(languages)}. Others were not tried.")
    if stages and any(source.get("kind") == "grounded scenes" for source in data):
        limits.append(
            "It was trained on composed scenes, with few wordings. Expect little on photographs and other questions."
        )
    if not results and not untrained:
        limits.append("It was not evaluated, so nothing is known about how good it is.")
    return limits


def _figure(folder: Path) -> dict[str, str] | None:
    """A figure of `agevlm attention` in the folder or in one of its folders."""
    files = [*sorted(folder.glob("attention*.png")), *sorted(folder.glob("*/attention.png"))]
    if not files:
        return None
    told = read_json(files[0].with_suffix(".json"))
    asked = (
        f": “{_line(told['question'])}” – “{_line(told['answer'])}”" if {"question", "answer"} <= told.keys() else ""
    )
    return {
        "path": files[0].relative_to(folder).as_posix(),
        "caption": f"Where words of a question and its answer look{asked}",
    }


def _layers(text_config: Mapping[str, Any]) -> list[int]:
    merged = text_config.get("cross_attention_layers") or []
    return [layer - number for number, layer in enumerate(merged)]


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What has quantized a model, the package that loading it needs, and the bits where its settings name them."""
    settings = config.get("quantization_config") or {}
    if (method := settings.get("quant_method")) is None:
        return None
    method = str(getattr(method, "value", method))
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None)
    return {"method": method, "package": "optimum-quanto" if method == "quanto" else method, "bits": bits}


def _parts_on_hub(exact: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The parts that are models of the Hub, where a folder says nothing else of them."""
    ids = {kind: exact.get(f"{kind}_model", {}).get("hub_id") for kind in ("text", "vision")}
    return {kind: {"name": id, "id": id} for kind, id in ids.items() if id}


def _adapter_name(method: str, adapter: Mapping[str, Any]) -> str | None:
    rank = f" of rank {adapter['r']}" if adapter.get("r") else ""
    return f"{'LoRA' if method == 'LORA' else method} adapter{rank}" if adapter else None


def link(source: Mapping[str, Any], kind: str = "") -> str:
    return (
        f"[{source['id']}](https://huggingface.co/{kind}{source['id']})" if source.get("id") else _line(source["name"])
    )


def _line(text: Any) -> str:
    return " ".join(str(text).split())


def table(rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, its columns of numbers to the right."""
    lines = [[_line(cell).replace("|", r"\|") for cell in row] for row in rows]
    numbers = [all(re.match(r"[\d–-]", cell) for cell in column) for column in zip(*lines[1:], strict=True)]
    lines.insert(1, ["---:" if is_number else "---" for is_number in (False, *numbers[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _distinct(sources: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: dict[tuple, Mapping[str, Any]] = {}
    for source in sources:
        found.setdefault((source["name"], source.get("split")), source)
    return list(found.values())


def _flat(values: Iterable[Any]) -> list[str]:
    """The different texts among values, which are texts, lists of texts or None."""
    found: dict[str, None] = {}
    for value in values:
        found |= dict.fromkeys([value] if isinstance(value, str) else value or [])
    return list(found)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): replace or delete it") from error
    return found if isinstance(found, dict) else {}
