# SPDX-License-Identifier: Apache-2.0
"""Cards of data sets: `README.md` from what lies in a folder that `save_to_disk` wrote."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..files import update_folder
from ..processing.rows import import_datasets
from ..provenance import find_licenses, read_provenance, write_provenance
from .model import MARK, is_generated, link, setting, table, tidy

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
"""The Hub's categories of numbers of rows."""

# The longest text of an `ATTRIBUTION.md` that a card shows itself, in lines.
_SHORT = 40

_COLUMNS = {
    "images": "the images",
    "messages": "the conversation: roles, and parts of text and images",
    "prompt": "the conversation up to the answer",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "grounding": "the phrases whose objects are known",
    "scene": "number of the scene within the split, shared by its rows",
    "kind": "kind of question",
    "answers": "the expected answers",
    "file": "file of the source",
    "row": "row of that file",
}


class AgeVlmDatasetCard(DatasetCard):
    """The card of a data set of conversations about images, with grounded phrases."""

    default_template_path = Path(__file__).parent / "templates" / "dataset.md.jinja"

    @classmethod
    def from_template(cls, *args: Any, **kwargs: Any) -> Any:
        return tidy(super().from_template(*args, **kwargs))


def tell_step(
    folder: str | os.PathLike, provenance: Mapping[str, Any] | None, step: str, settings: Mapping[str, Any]
) -> None:
    """Writes the provenance of a data set that was just made, and its card.

    Args:
        folder: that `save_to_disk` wrote.
        provenance: of what it was made of.
        step: the name of what was done.
        settings: values that JSON can hold.
    """
    former = provenance or {}
    steps = [*former.get("steps", []), {"name": step, "settings": settings}]
    write_provenance(folder, {**former, "steps": steps})
    write_dataset_card(folder)


def write_dataset_card(
    folder: str | os.PathLike, *, repo_id: str | None = None, overwrite: bool = False, **fields: Any
) -> AgeVlmDatasetCard | None:
    """Writes the card of a data set, `README.md`, from what lies in its folder: the tables, how it was made
    ([`agevlm.provenance`]) and its `ATTRIBUTION.md`.

    Args:
        folder: that `save_to_disk` wrote, with one or several splits.
        repo_id: where it is going to be on the Hub; by default the folder's name stands for it.
        overwrite: also replace a card that someone wrote.
        fields: metadata that replace those found, such as `license` and `language`.

    Returns:
        The card; None where there is one that someone wrote, which stays.

    Raises:
        OSError: if the folder has no data set, or cannot be written.
        ValueError: if a file in it is damaged.
        ImportError: if `datasets` is not installed.
    """
    readme = Path(folder) / "README.md"
    if not overwrite and readme.is_file() and not is_generated(readme.read_text(encoding="utf-8")):
        return None
    card = render_dataset_card(folder, repo_id=repo_id, **fields)
    with update_folder(folder) as partial:
        card.save(partial / "README.md")
    return card


def render_dataset_card(folder: str | os.PathLike, *, repo_id: str | None = None, **fields: Any) -> AgeVlmDatasetCard:
    """The card that [`write_dataset_card`] writes."""
    datasets, folder = import_datasets(), Path(folder)
    name = repo_id or os.path.basename(os.path.abspath(folder))
    saved = datasets.load_from_disk(os.fspath(folder))
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    tables = {split: f"{split}/*.arrow" if isinstance(saved, datasets.DatasetDict) else "*.arrow" for split in splits}
    provenance = read_provenance(folder)
    attribution = folder / "ATTRIBUTION.md"
    text = attribution.read_text(encoding="utf-8") if attribution.is_file() else ""
    counted = {split: _count(part) for split, part in splits.items()}
    columns = next(iter(splits.values())).column_names
    is_scenes = {"scene", "kind", "answers"} <= set(columns)
    card_data = DatasetCardData(
        **{
            "pretty_name": name.split("/")[-1],
            "license": find_licenses(text) or None,
            "language": provenance.get("language"),
            "task_categories": ["image-text-to-text", "visual-question-answering"],
            "size_categories": _size(sum(map(len, splits.values()))),
            "annotations_creators": ["machine-generated"] if provenance else None,
            "tags": ["agevlm", "visual-grounding", *(["synthetic"] if is_scenes else [])],
            # The Hub's own search for tables would take the JSON files for rows.
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": split, "path": path} for split, path in tables.items()],
                }
            ],
            **{field: value for field, value in fields.items() if value is not None},
        }
    )
    limits = ["Phrases and masks are as good as what made them. Look at some before you train on them."]
    if is_scenes:
        limits = [
            "The scenes are composed: cut-outs on photographs. A model that does well on them may do badly on photographs.",
            "All splits share their cut-outs, but for `zero_shot`; photographs and layouts of a test split are new.",
            "The questions have few wordings.",
        ]
    return AgeVlmDatasetCard.from_template(
        card_data,
        title=name.split("/")[-1],
        name=name,
        split=next(iter(splits)) if len(splits) > 1 else None,
        summary=_summary(is_scenes),
        counts=table([["split", *next(iter(counted.values()))], *([split, *map(setting, row.values())] for split, row in counted.items())]),
        columns=table([["column", "content"], *([f"`{column}`", _COLUMNS.get(column, str(next(iter(splits.values())).features[column]))] for column in columns)]),
        steps=[{"name": step["name"], "settings": table([["setting", "value"], *([key, setting(value)] for key, value in step["settings"].items())])} for step in provenance.get("steps", [])],
        sources=_sources(provenance.get("sources", [])),
        limits=limits,
        attribution=text.strip() if 0 < len(text.splitlines()) <= _SHORT else None,
        attribution_file=bool(text),
        mark=MARK,
    )  # fmt: skip


def _summary(is_scenes: bool) -> str:
    what = (
        "Grounded scenes: cut-outs pasted on photographs, with questions, answers, and the exact mask of what each phrase names"
        if is_scenes
        else "Conversations about images, with phrases whose objects are known by boxes or masks"
    )
    return f"{what}. Each row is a conversation."


def _sources(sources: Sequence[Mapping[str, Any]]) -> str | None:
    if not sources:
        return None
    rows = [[source.get("role", ""), link(source, "datasets/"), setting(source.get("license"))] for source in sources]
    return table([["", "name", "license"], *rows])


def _count(part: Any) -> dict[str, int]:
    """Numbers of a split, counted without reading an image."""
    import pyarrow.compute as pc

    found = {"rows": len(part)}
    if "scene" in part.column_names:
        found["scenes"] = len(pc.unique(part.data.column("scene")))
    if "grounding" in part.column_names:
        phrases = masks = 0
        for batch in part.with_format("arrow").select_columns("grounding").iter(10_000):
            entries = pc.list_flatten(batch["grounding"])
            phrases += len(entries)
            if any(field.name == "mask" for field in entries.type):
                masks += len(entries) - pc.struct_field(entries, "mask").null_count
        found |= {"phrases": phrases, "phrases with a mask": masks}
    return found


def _size(rows: int) -> str:
    return SIZES[min(max(0, len(str(rows)) - 3), len(SIZES) - 1)]
