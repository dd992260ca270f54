# SPDX-License-Identifier: Apache-2.0
"""Phrases for texts that have none: what captions and conversations name in their image, for mask teachers to start from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import new_folder
from ..hub_cards.dataset import tell_step
from ..processing.rows import import_datasets, message_text, place_images, quiet_datasets, row_features
from . import english
from .masks import replace_grounding
from .readers import check_images

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features

Chunker = Callable[[str], list[tuple[int, int]]]
"""Finds the phrases of a text: the characters `(start, end)` of each, in order, without overlaps."""

# Rows that one call of the chunker's process reads: their images are not decoded, but those of a selection are copied.
_BATCH = 100


# --- sentences ---

# Code, addresses and names of files hold words that are no prose.
# They are sought at the start of a word only, so that the time is linear in the length of a word.
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|(?:(?<!\S)|(?<=`))(?:\S*(?:://|www\.|\w@\w|\\)\S*|\S+\.[a-z]{2,4}(?![\w.]))|`[^`\n]*`",
    re.DOTALL,
)
_NO_PROSE_LINE = re.compile(r"[{}\[\]<>|\\_^~$=`]|^\s*Reference OCR")
_NO_ENGLISH = re.compile(r"[^\x20-\x7e‘’“”–—…éñ°]")
_SENTENCE = re.compile(r"[^.!?;:\n]+")
_IDIOM = re.compile(rf"\b(?:{'|'.join(english.IDIOMS)})\b", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-zéñ]+(?:-[A-Za-zéñ]+)*|['’](?:s|t|re|ve|ll|d|m)\b|[\d#@][\w.,:/%-]*|[^\s]")
_BEFORE_NOUNS = ("a", "an", "the", "no", "class")
_CLOSED = english.DETERMINERS | english.PREPOSITIONS | english.CONJUNCTIONS | english.PRONOUNS | english.AUXILIARIES
_CLOSED |= {"to", "not"}


@dataclass(frozen=True)
class _Token:
    start: int
    end: int
    text: str
    lower: str


def _sentences(text: str) -> Iterator[list[_Token]]:
    """The tokens of each sentence of English prose, with their places in the text. All else gives none."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "\0", match[0])  # no character of English: the sentence has no phrases

    start = 0
    for line in _NO_PROSE.sub(blank, text).split("\n"):
        if not _NO_PROSE_LINE.search(line):
            for sentence in _SENTENCE.finditer(_IDIOM.sub(lambda match: "," * len(match[0]), line)):
                if not _NO_ENGLISH.search(sentence[0]):
                    offset = start + sentence.start()
                    tokens = [
                        _Token(offset + token.start(), offset + token.end(), token[0], token[0].lower())
                        for token in _TOKEN.finditer(sentence[0])
                    ]
                    if tokens and _is_english(tokens):
                        yield tokens
        start += len(line) + 1


def _is_english(tokens: Sequence[_Token]) -> bool:
    """Whether function words are English ones. A few words can do without, as "a dog, a cat" or "red apple"."""
    words = [token.lower for token in tokens]
    english_words = sum(word in _CLOSED for word in words)
    foreign = sum(word in english.FOREIGN for word in words)
    longest = max(len(re.findall(r"[a-z]+", part)) for part in " ".join(words).split(","))
    return foreign < max(english_words, 1) and (english_words > 0 or longest < 5)


# --- rules ---


def _singulars(word: str) -> Iterator[str]:
    word = word.rpartition("-")[2] if word not in english.NOT_VISIBLE else word
    yield word
    if word.endswith("s") and not word.endswith("ss"):
        yield word[:-1]
        if word.endswith("es"):
            yield word[:-2]
        if word.endswith("ies"):
            yield f"{word[:-3]}y"


def _is_plural(word: str) -> bool:
    return word in english.PLURALS or (word.endswith("s") and not word.endswith(("ss", "us", "is")))


def _is_visible(head: str) -> bool:
    """Whether the last word of a phrase names something that an image can show."""
    forms = list(_singulars(head))
    if len(head) < 2 or any(form in english.NOT_VISIBLE for form in forms):
        return False
    return any(form in english.VISIBLE for form in forms) or not any(
        form.endswith(english.ABSTRACT_ENDINGS) for form in forms
    )


def _is_verb_form(word: str) -> bool:
    """Whether a word is the third person of a verb: rides, catches, flies."""
    return word.endswith("s") and any(form in english.VERBS for form in _singulars(word))


# Kinds of words, each a letter: D determiner or number, P preposition, T "to", C conjunction, R pronoun or adverb, X auxiliary,
# V verb in its base form, S in its third person, I participle or past, G -ing, E -ed, A adjective, N noun, "," comma, B anything else.
_KINDS: dict[str, str] = {
    **dict.fromkeys(english.VERBS, "V"),
    **dict.fromkeys(english.ADJECTIVES, "A"),
    **dict.fromkeys(english.PARTICIPLES, "I"),
    **dict.fromkeys(english.ING_NOUNS | english.ED_NOUNS | english.LY_NOUNS | english.ABLE_NOUNS, "N"),
    **dict.fromkeys(english.ADVERBS | english.PRONOUNS, "R"),
    **dict.fromkeys(english.CONJUNCTIONS, "C"),
    **dict.fromkeys(english.PREPOSITIONS, "P"),
    **dict.fromkeys(english.AUXILIARIES, "X"),
    **dict.fromkeys(english.DETERMINERS, "D"),
    "to": "T",
    ",": ",",
}


_ENDINGS = (
    ("ing", "G", 5), ("ed", "E", 4), ("ly", "R", 4), ("less", "A", 6), ("ful", "A", 6), ("ous", "A", 5), ("able", "A", 6), ("ible", "A", 6), ("ize", "V", 5), ("izes", "V", 6),
)  # fmt: skip


def _kind(word: str) -> str:
    if (kind := _KINDS.get(word)) is not None:
        return kind
    if not word[0].isalpha():
        return "D" if word[0].isdigit() and word.isdecimal() else "B"
    if _is_verb_form(word):
        return "S"
    for ending, kind, least in _ENDINGS:
        if word.endswith(ending) and len(word) >= least:
            return kind
    return "N"


def _resolve(tokens: Sequence[_Token]) -> list[str]:
    """The kind of each word in its sentence: after this there are no G, E, I, S and V that are nouns or adjectives."""
    words = [token.lower for token in tokens]
    kinds = [_kind(word) for word in words]
    for i, word in enumerate(words[:-1]):
        if word in english.QUANTITIES and words[i + 1] == "of":
            kinds[i] = "D"
        elif words[i + 1] in ("'s", "’s"):  # "the man's hat", and not "it's"
            kinds[i + 1] = "D" if kinds[i] == "N" else "X"
    determiner, verbs = "", 0  # the determiner of the noun phrase that is being read; verbs before
    for i, kind in enumerate(kinds):
        before = kinds[i - 1] if i else "^"
        after = kinds[i + 1] if i + 1 < len(kinds) else "$"
        is_imperative = i == 0 and words[i] in english.IMPERATIVES and after in "DPT"
        if words[i] in english.COLOR_NOUNS and (
            after in "AN" or (words[i + 1 : i + 2] == ["and"] and kinds[i + 2 : i + 3] == ["A"])
        ):
            kind = "A"  # "an orange and white cat"
        elif words[i] in english.COMPOUND_PARTICIPLES and before == "N" and after in "AN":
            kind = "N"  # "tree covered mountains"
        elif is_imperative or (kind in "AN" and _follows_infinitive(words, i, after)):
            kind = "V"
        elif kind == "G":
            if words[i] in english.ING_MODIFIERS and after == "N" and before not in "NRX":
                kind = "N"
            elif (before == "A" or words[max(i - 1, 0)] in english.ARTICLES) and after in "NAV":
                kind = "A"
        elif kind in "EI":
            if (
                kind == "I"
                and after not in "NAVS"
                and (words[max(i - 1, 0)] in _BEFORE_NOUNS or (before in "^," and after in ",$"))
            ):
                kind = "N"  # "the rose", "a lamp, a rose"
            else:
                kind = "A" if before not in "NRX" and after in "NAVS" else "I"  # "a parked car"
        elif (
            words[i] == "can" and before == "N" and (after in "$,BPCT" or words[i + 1] in ("is", "are"))
        ):  # "the garbage can"
            kind = "N"
        elif kind in "VS":
            kind = _verb_or_noun(kind, before, after, words[i - 1] if i else "", determiner, verbs)
        if kind == "D":
            determiner = words[i] if i == 0 or words[i - 1] != "and" else "and"
        elif kind not in "AN":
            determiner = ""
        verbs += kind in "VSI"
        kinds[i] = kind
    return kinds


def _follows_infinitive(words: Sequence[str], i: int, after: str) -> bool:
    """Whether an adjective or noun is a verb in no list, or in several: "to replace the battery", "should clean it"."""
    before = words[max(i - 2, 0) : i]
    if not before or _is_plural(words[i]):
        return False
    if len(before) == 2 and (before[1] in english.MODALS or (before[1] == "not" and before[0] in english.MODALS)):
        return True
    return before[-1] == "to" and before[0] not in english.BEFORE_TO and after in "DRNA"


def _verb_or_noun(kind: str, before: str, after: str, word_before: str, determiner: str, verbs: int) -> str:
    """What a word is that can be a verb in its base form (V) or third person (S), by the words around it and the verbs before it."""
    if word_before in ("that", "which", "what") or (kind == "S" and word_before == "this"):  # "which shows"
        return kind
    if before in "DAP":  # "the watch", "tray of drinks"
        return "N"
    if before in "VSIGEXT" and kind == "S":  # an object without a determiner: "wearing skis"
        return "N"
    if before in "C,^":  # "and catches a ball", "ride the bus"; but "cups and drinks"
        is_verb = after in "DRT" or (before == "C" and verbs and after == "P") or (kind == "V" and after == "P")
        return kind if is_verb else "N"
    if before == "N" and kind == "V" and not _is_plural(word_before) and determiner in ("a", "an"):
        return "N"  # "a fruit stand": no verb agrees with it
    return kind


def _noun_phrases(tokens: Sequence[_Token]) -> Iterator[tuple[int, int]]:
    """The runs of adjectives and nouns that end in a noun, as `(first, end)` of tokens."""
    kinds = _resolve(tokens)
    first, i = None, 0
    for i, kind in enumerate([*kinds, "$"]):
        if first is not None:
            after = kinds[i + 1] if i + 1 < len(kinds) else "$"
            is_and = kind == "," or (kind == "C" and tokens[i].lower == "and")
            only_adjectives = "N" not in kinds[first:i]
            # "large, yellow bus", "black and white cat"
            if kind in "AN" and not (kind == "A" and kinds[i - 1] == "N"):
                continue
            if is_and and only_adjectives and kinds[i - 1] == "A" and (after == "A" or (after == "N" and kind == ",")):
                continue
            if not only_adjectives:
                yield first, max(j for j in range(first, i) if kinds[j] == "N") + 1
            first = None
        if kind in "AN":
            first = i


def _choose(tokens: Sequence[_Token], runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The runs of words that name something visible; measures are joined with what they measure."""
    has_lower = any(token.text.islower() and len(token.text) > 1 for token in tokens)
    words = [token.lower for token in tokens]
    measure: tuple[int, int] | None = None  # "group", before "of people"
    for first, end in runs:
        begin = first
        if measure is not None and measure[1] + 1 == first:
            begin = measure[0]
        elif measure is not None:
            yield measure
        measure = None
        bare = begin == first and first > 0 and _kind(words[first - 1]) != "D"
        is_name = bare and has_lower and all(token.text[0].isupper() for token in tokens[first:end])
        if is_name or (bare and not _names_a_thing(words, first, end)) or not _is_visible(words[end - 1]):
            continue
        is_measure = any(word in english.MEASURES for word in _singulars(words[end - 1]))
        if is_measure and words[end : end + 1] == ["of"]:
            measure = begin, end
        else:
            yield begin, end
    if measure is not None:
        yield measure


def _names_a_thing(words: Sequence[str], first: int, end: int) -> bool:
    """Whether a run of words without a determiner names a thing: "overcast" after "the sky is" does not, nor does what is played."""
    before = first - 1
    while before > 0 and words[before] in english.ADVERBS:
        before -= 1
    is_said_of_another = before > 0 and words[before] in english.BE and "there" not in words[:before]
    if is_said_of_another and end - first == 1 and not _is_plural(words[first]):
        return False
    return words[before] not in english.PLAYS


def find_phrases(text: str) -> list[tuple[int, int]]:
    """What an English text names that an image can show, by rules and lists of words; no model is needed.

    A phrase is a noun with its adjectives and the nouns before it, without determiners, owners and numbers: "two of the man's brown
    dogs" has the phrases "man" and "brown dogs". Measures are joined with what they measure: "group of people", "bowl of soup". Nouns
    that name nothing with a mask of its own (image, left side, atmosphere), names, code, addresses, text in other languages and
    sentences with unusual characters have none.

    Args:
        text: of one message.

    Returns:
        the characters `(start, end)` of each phrase, in order, without overlaps.
    """
    return [
        (tokens[first].start, tokens[end - 1].end)
        for tokens in _sentences(text)
        for first, end in _choose(tokens, _noun_phrases(tokens))
    ]


class SpacyChunker:
    """The noun chunks of a spaCy model in place of the rules; determiners, sentences and what is visible are treated as in [`find_phrases`].

    Args:
        model: the name or the folder of a model with a parser.

    Raises:
        ImportError: if spaCy is not installed.
        OSError: if there is no such model.
        ValueError: if the model finds no noun chunks.
    """

    def __init__(self, model: str = "en_core_web_sm"):
        try:
            import spacy
        except ImportError as error:
            raise ImportError(f"{error}; for the chunker spacy: pip install spacy") from error
        try:
            self._pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
        except OSError as error:
            raise OSError(
                f"there is no spaCy model {model}; get it: python -m spacy download {model} ({error})"
            ) from error
        try:
            list(self._pipeline("A dog.").noun_chunks)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"the spaCy model {model} has no noun chunks; name one with a parser: {error}") from error
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        return SpacyChunker, (self.model,)  # each process loads the model

    def __call__(self, text: str) -> list[tuple[int, int]]:
        sentences = list(_sentences(text))
        found = []
        parsed = self._pipeline.pipe([text[tokens[0].start : tokens[-1].end] for tokens in sentences])
        for tokens, sentence in zip(sentences, parsed, strict=True):
            offset = tokens[0].start
            runs = [
                run
                for chunk in sentence.noun_chunks
                for run in _inner_runs(tokens, offset + chunk.start_char, offset + chunk.end_char)
            ]
            found += [(tokens[first].start, tokens[end - 1].end) for first, end in _choose(tokens, runs)]
        return found


def _inner_runs(tokens: Sequence[_Token], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of tokens in characters `start` to `end`, without determiners; owners are runs of their own."""
    inside = [i for i, token in enumerate(tokens) if start <= token.start and token.end <= end]
    first: int | None = None
    for i in [*inside, None]:
        is_word = i is not None and tokens[i].lower[0].isalpha() and tokens[i].lower not in _CLOSED
        if i is not None and tokens[i].lower == "and" and first is not None:
            is_word = _kind(tokens[i - 1].lower) == "A"  # "a black and white cat"
        if is_word and first is None:
            first = i
        elif not is_word and first is not None:
            yield first, inside[-1] + 1 if i is None else i
            first = None


# --- data sets ---

_ROLES = ("user", "assistant")


def add_phrases(
    dataset: Dataset | DatasetDict,
    chunker: Chunker,
    output_dir: str | os.PathLike,
    *,
    roles: Collection[str] = _ROLES,
    max_phrases: int | None = None,
    num_proc: int | None = None,
    attribution: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Dataset | DatasetDict, Counter[str]]:
    """Add the phrases of its texts to a data set, and write it as a new one: the same rows in the same order.

    Each phrase becomes an entry of `grounding` without box and mask, for a mask teacher that starts from phrases. Existing entries stay,
    and none is added that overlaps one. Only rows with one image get phrases, since of several nobody knows which one a phrase means,
    and only texts after the image, since earlier ones cannot attend to it.

    Args:
        dataset: with the columns of `agevlm.processing.rows`, `grounding` or none; others are kept.
        chunker: [`find_phrases`], a [`SpacyChunker`], or a function of your own; it is sent to the processes.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        roles: whose texts get phrases, of `user` and `assistant`.
        max_phrases: the most new phrases of a row: its first ones.
        num_proc: processes that share the work; by default this one does it. The result is the same.
        attribution: text for the data set's `ATTRIBUTION.md`.
        provenance: of the data set, which the new one carries on (`agevlm.provenance`).
        progress: show progress bars.

    Returns:
        the data set, read from `output_dir`, and counts: new `phrases`, `kept` ones, `rows`, `labeled` rows (with a new phrase),
        rows that got none because they are `text_only`, have `several_images` or are `invalid`.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder.
        ValueError: if a column is missing or of another type, an argument is out of range, or an image is a URL.
        ImportError: if `datasets` is not installed.
    """
    datasets = import_datasets()
    import pyarrow.compute as pc
    from datasets.fingerprint import Hasher

    if not set(roles) <= set(_ROLES) or not roles:
        raise ValueError(f"roles is {', '.join(roles) or 'empty'}, but must be of {', '.join(_ROLES)}")
    for name, value in (("max_phrases", max_phrases), ("num_proc", num_proc)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    splits = {split: check_images(part.with_format(None), split or "the data set") for split, part in splits.items()}
    features = {split: _result_features(part, split) for split, part in splits.items()}
    options = {"chunker": chunker, "roles": tuple(roles), "max_phrases": max_phrases}
    counts: Counter[str] = Counter()
    labeled = datasets.DatasetDict()
    output_dir = Path(output_dir).absolute()
    with new_folder(output_dir) as partial, contextlib.nullcontext() if progress else quiet_datasets(datasets):
        for split, part in splits.items():
            # `datasets` would derive a fingerprint from paths and times; this one depends on the rows.
            fingerprint = Hasher.hash(
                [part._fingerprint, features[split], options, importlib.metadata.version("agevlm")]
            )
            columns = [name for name in (*_TEXTS, "images", "grounding") if name in part.column_names]
            results = []
            if len(part):
                results = [
                    part.select_columns(columns).with_format("arrow").map(
                        _label_rows,
                        fn_kwargs=options | {"entry": features[split]["grounding"].feature},
                        batched=True,
                        batch_size=_BATCH,
                        remove_columns=columns,
                        features=features[split],
                        cache_file_name=str(partial.parent / f"{len(labeled)}.arrow"),
                        num_proc=num_proc,
                        new_fingerprint=fingerprint,
                        desc=f"Phrases {split}".strip(),
                    )
                ]  # fmt: skip
                for name in _COUNTS:
                    counts[name] += pc.sum(results[0].data.column(name)).as_py()
                counts["rows"] += len(part)
            labeled[split] = replace_grounding(part, results, fingerprint)
        (labeled if isinstance(dataset, datasets.DatasetDict) else labeled[""]).save_to_disk(partial)
        if attribution:
            (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        found = {name.replace("_", " "): counts[name] for name in ("rows", "labeled", "phrases", "kept")}
        tell_step(partial, provenance, "agevlm data phrases", {"texts of": ", ".join(roles), **found})
    return datasets.load_from_disk(output_dir), counts


_TEXTS = ("messages", "prompt", "chosen")
_COUNTS = ("phrases", "kept", "labeled", "text_only", "several_images", "invalid")


def _result_features(part: Dataset, split: str) -> Features:
    """The columns of the work: `grounding`, as the split has it, and what is counted.

    Raises:
        ValueError: if the split lacks a column, or its `grounding` is not a list of entries.
    """
    from datasets import Features, Value

    texts = {"messages"} if "messages" in part.column_names else {"prompt", "chosen"}
    if missing := {"images", *texts} - set(part.column_names):
        raise ValueError(f"the data set{split and f' ({split})'} lacks the column(s) {', '.join(sorted(missing))}")
    own = row_features()["grounding"]
    grounding = part.features.get("grounding", own)
    entry = getattr(grounding, "feature", grounding)
    if entry == Value("null"):  # all lists are empty
        grounding = own
    elif not isinstance(entry, dict) or not {"message", "start", "end", "image"} <= set(entry):
        raise ValueError(f"grounding{split and f' of {split}'} must be a list of entries, but is {grounding}")
    return Features(grounding=grounding, **{name: Value("int32") for name in _COUNTS})


def _label_rows(
    table: pa.Table, *, chunker: Chunker, roles: Collection[str], max_phrases: int | None, entry: Collection[str]
) -> dict[str, list[Any]]:
    """The columns of the work for some rows."""
    import pyarrow.compute as pc

    images = pc.fill_null(pc.list_value_length(table["images"]), 0).to_pylist()
    rows = table.drop_columns("images").to_pylist()
    labeled: dict[str, list[Any]] = {name: [] for name in ("grounding", *_COUNTS)}
    for row, num_images in zip(rows, images, strict=True):
        grounding = row.get("grounding") or []
        counts = Counter(kept=len(grounding))
        if num_images == 1:
            try:
                spans = _row_phrases(row, grounding, chunker, roles)
            except (ValueError, TypeError, KeyError):
                spans = []
                counts["invalid"] = 1
            new = [dict.fromkeys(entry) | span | {"image": 0} for span in itertools.islice(spans, max_phrases)]
            grounding = grounding + new
            counts |= Counter(phrases=len(new), labeled=min(len(new), 1))
        else:
            counts["several_images" if num_images else "text_only"] = 1
        labeled["grounding"].append(grounding)
        for name in _COUNTS:
            labeled[name].append(counts[name])
    return labeled


def _row_phrases(
    row: dict[str, Any], grounding: Sequence[dict[str, Any]], chunker: Chunker, roles: Collection[str]
) -> list[dict[str, int]]:
    """The new phrases of a row with one image: `message`, `start` and `end`.

    Raises:
        ValueError: if its messages are none, or show another number of images.
    """
    prompt = row["messages"] if row.get("messages") is not None else row["prompt"]
    messages = [*place_images(prompt, 1), *([] if row.get("messages") is not None else row["chosen"])]
    taken = [(known["message"], known["start"], known["end"]) for known in grounding]
    found = []
    shown = False
    for number, message in enumerate(messages):
        text, first = message_text(message), 0
        if not shown:
            parts = message["content"]
            place = next((i for i, part in enumerate(parts) if part["type"] == "image"), None)
            if place is None:
                continue
            first, shown = len(message_text({"content": parts[:place]})), True
        if message["role"] in roles:
            found += [
                {"message": number, "start": start, "end": end}
                for start, end in chunker(text)
                if start >= first and not any(n == number and a < end and start < b for n, a, b in taken)
            ]
    return found


def preview_phrases(dataset: Dataset, number: int) -> Iterator[str]:
    """Texts of some rows, evenly spread, with their phrases in brackets.

    Args:
        dataset: with phrases; rows without any are left out.
        number: the most texts.
    """
    import numpy as np
    import pyarrow.compute as pc

    columns = [name for name in (*_TEXTS, "grounding") if name in dataset.column_names]
    rows, phrased, first = dataset.select_columns(columns), [], 0
    for batch in rows.with_format("arrow").select_columns("grounding").iter(10_000):
        lengths = pc.fill_null(pc.list_value_length(batch["grounding"]), 0)
        phrased += [first + place for place in pc.indices_nonzero(lengths).to_pylist()]
        first += len(lengths)
    for place in np.linspace(0, len(phrased) - 1, min(number, len(phrased))).round().astype(int):
        row = rows[phrased[place]]
        shown = row["grounding"][0]["message"]
        messages = row["messages"] if row.get("messages") is not None else row["prompt"] + row["chosen"]
        spans = sorted((entry["start"], entry["end"]) for entry in row["grounding"] if entry["message"] == shown)
        text = message_text(messages[shown])
        for start, end in reversed(spans):
            text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
        yield " ".join(text.split())
