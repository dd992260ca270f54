# SPDX-License-Identifier: Apache-2.0
"""Large JSON files without a copy in memory: read as a stream, and their lists kept as tables of an SQLite file.

SQLite is looked up by numbers and keys, by several processes at once, and holds nothing in memory that grows with the data.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...files import new_file

_CHUNK = 1 << 20


def read_json(file: Path, lists: Collection[str] = ("",)) -> Iterator[tuple[str, Any, str]]:
    """The entries of lists in a JSON file, one by one: the name of the list, the entry, and its text in the file.

    Args:
        file: a list; an object that holds lists, as COCO's; or one value after another, as in JSON lines. UTF-8.
        lists: the keys of the lists; "" where the file is a list, or JSON lines.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON, or lacks a list; names the file and the line.
    """
    with open(file, encoding="utf-8-sig") as opened:
        stream = _Stream(opened, file)
        try:
            if stream.next_character() == "[":
                found = {""}
                yield from (("", *entry) for entry in stream.values_of_list())
                stream.check_end()
            elif "" in lists:
                found = {""}
                while stream.next_character():
                    yield "", *stream.value()
            else:
                found = set()
                for key in stream.keys_of_object():
                    if stream.next_character() == "[":
                        found.add(key)
                        entries = stream.values_of_list()  # of other lists, too: none is held as a whole
                        yield from ((key, *entry) for entry in entries if key in lists)
                    else:
                        stream.value()
                stream.check_end()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}); save it in that encoding") from error
        except RecursionError as error:
            raise ValueError(f"{file}, {stream.place()}, is not JSON: nested too deeply") from error
    if missing := sorted(set(lists) - found):
        has = "is a list itself" if found == {""} else f"has the lists {', '.join(sorted(found)) or '(none)'}"
        raise ValueError(f"{file} has no list {missing[0]!r}, but {has}; name the file that the format requires")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON decoder (`object_pairs_hook`), which takes the last of several values of one key otherwise.

    Raises:
        ValueError: if it has a key twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r:.80} twice")
    return values


_OF_NUMBERS = re.compile(r"[-+.eE0-9]*")


class _Stream:
    """A JSON text that is read as far as it is needed: values are decoded one by one by the standard library."""

    _decoder = json.JSONDecoder(object_pairs_hook=unique_keys)

    def __init__(self, opened: Any, file: Path):
        self.opened, self.file = opened, file
        self.text, self.at = "", 0
        self.line = 1  # of the first character of the text

    def place(self, at: int | None = None) -> str:
        return f"line {self.line + self.text.count(chr(10), 0, self.at if at is None else at)}"

    def _more(self) -> bool:
        self.line += self.text.count("\n", 0, self.at)
        rest = self.text[self.at :]
        added = self.opened.read(max(_CHUNK, len(rest)))  # twice as much for a value that is longer: linear time
        self.text, self.at = rest + added, 0
        return bool(added)

    def next_character(self) -> str:
        """The next character that is no white space, "" at the end of the file. It stays to be read."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _take(self, expected: str) -> str:
        if (found := self.next_character()) not in tuple(expected):
            wanted = " or ".join(repr(character) for character in expected)
            raise ValueError(f"{self.file}, {self.place()}, is not JSON: {found!r} where {wanted} is expected")
        self.at += 1
        return found

    def value(self) -> tuple[Any, str]:
        """The next value and its text."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                # Else the rest of a number may come: of 1.5 the decoder takes the 1 where the text ends behind the point.
                if _OF_NUMBERS.match(self.text, end).end() < len(self.text) or not self._more():
                    text, self.at = self.text[self.at : end], end
                    return value, text
            except json.JSONDecodeError as error:
                # A text that breaks off fails at its end, except within a string.
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                problem, place = error.msg, self.place(error.pos)
                if not (cut and self._more()):
                    raise ValueError(f"{self.file}, {place}, is not JSON: {problem}") from error
            except ValueError as error:
                raise ValueError(f"{self.file}, {self.place()}, is not JSON: {error}") from error

    def values_of_list(self) -> Iterator[tuple[Any, str]]:
        self._take("[")
        if self.next_character() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def keys_of_object(self) -> Iterator[str]:
        """The keys of an object. The value of each must be read before the next key is."""
        self._take("{")
        if self.next_character() == "}":
            self._take("}")
            return
        while True:
            key, _ = self.value()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def check_end(self) -> None:
        if self.next_character():
            raise ValueError(f"{self.file}, {self.place()}, is not JSON: something follows its end")


def index_json(file: Path, place: Path, tables: Mapping[str, str | None]) -> None:
    """Keeps lists of a JSON file as tables for [`Entries`]. Where `place` exists, nothing is done.

    Args:
        file: see [`read_json`].
        place, tables: see [`index_entries`]; `tables` names the lists.

    Raises:
        OSError: if the file cannot be read, or the index not be written.
        ValueError: if it is not JSON, or lacks a list; names the file and the line.
    """
    index_entries(read_json(file, tables), place, tables)


def index_entries(entries: Iterator[tuple[str, Any, str]], place: Path, tables: Mapping[str, str | None]) -> None:
    """Keeps entries as tables for [`Entries`]. Where `place` exists, nothing is done.

    An entry that is no object becomes an empty one, which no format reads.

    Args:
        entries: the name of its table, the entry and its JSON text of each. Those of a table follow one another.
        place: the SQLite file, which appears when it is whole.
        tables: by the name of a table ("" where a file is a list itself, or JSON lines) the key that its entries are looked
            up by, or None.

    Raises:
        OSError: if the index cannot be written.
    """
    if place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(tables)}
    with new_file(place) as partial, contextlib.closing(sqlite3.connect(partial)) as index:
        try:
            index.execute("PRAGMA journal_mode = OFF")  # the file is whole or not there
            index.execute("PRAGMA synchronous = OFF")
            index.execute("CREATE TABLE names (name TEXT PRIMARY KEY, number INTEGER)")
            index.executemany("INSERT INTO names VALUES (?, ?)", numbers.items())
            for number in numbers.values():
                index.execute(f"CREATE TABLE entries{number} (number INTEGER PRIMARY KEY, key, entry TEXT)")
            for name, group in itertools.groupby(entries, key=lambda entry: entry[0]):
                insert = f"INSERT INTO entries{numbers[name]} VALUES (?, ?, ?)"
                index.executemany(insert, _table_rows(group, tables[name]))
            for name, key in tables.items():
                if key is not None:
                    index.execute(f"CREATE INDEX keys{numbers[name]} ON entries{numbers[name]} (key)")
            index.commit()
        except sqlite3.OperationalError as error:
            raise OSError(
                f"Could not write {place}: {error}. Make room, or choose a folder on another disk."
            ) from error


def _table_rows(entries: Iterator[tuple[str, Any, str]], key: str | None) -> Iterator[tuple[int, Any, str]]:
    for number, (_, entry, text) in enumerate(entries):
        if isinstance(entry, dict):
            yield number, None if key is None else _stored_key(entry.get(key)), text
        else:
            yield number, None, "{}"


def _stored_key(key: Any) -> Any:
    """A key as SQLite can hold it, None for what is no key."""
    if isinstance(key, int) and -(2**63) <= key < 2**63:
        return key
    if isinstance(key, str):
        with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair
            key.encode()
            return key
    return None


class Entries:
    """The tables that [`index_json`] or [`index_entries`] has written, read only.

    Args:
        place: the SQLite file.
    """

    def __init__(self, place: Path):
        self._index = sqlite3.connect(
            f"{place.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        weakref.finalize(
            self, self._index.close
        )  # a connection refers to itself, and would keep its 2 MB until garbage is collected
        self._tables = {name: f"entries{number}" for name, number in self._index.execute("SELECT * FROM names")}

    def count(self, table: str) -> int:
        """The number of entries."""
        return self._one(f"SELECT COUNT(*) FROM {self._tables[table]}")

    def count_keys(self, table: str) -> int:
        """The number of distinct keys."""
        return self._one(f"SELECT COUNT(DISTINCT key) FROM {self._tables[table]}")

    def slice(self, table: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The entries from `start` to before `end`, each with its number in the list."""
        found = self._index.execute(
            f"SELECT number, entry FROM {self._tables[table]} WHERE number >= ? AND number < ? ORDER BY number",
            (start, 2**63 - 1 if end is None else end),
        )
        for number, entry in found:
            yield number, json.loads(entry)

    def find(self, table: str, key: Any) -> list[dict[str, Any]]:
        """The entries with a key, in their order in the file."""
        return [entry for _, entry in self.find_numbered(table, key)]

    def find_numbered(self, table: str, key: Any) -> list[tuple[int, dict[str, Any]]]:
        """As [`find`], each entry with its number in the list."""
        found = self._index.execute(
            f"SELECT number, entry FROM {self._tables[table]} WHERE key = ? ORDER BY number", (_stored_key(key),)
        )
        return [(number, json.loads(entry)) for number, entry in found]

    def keys(self, table: str, start: int = 0, end: int | None = None) -> list[Any]:
        """The distinct keys, numbers before texts and each of them sorted, from place `start` to before `end`."""
        found = self._index.execute(
            f"SELECT DISTINCT key FROM {self._tables[table]} WHERE key IS NOT NULL ORDER BY key LIMIT ? OFFSET ?",
            (-1 if end is None else max(end - start, 0), start),
        )
        return [key for (key,) in found]

    def _one(self, query: str) -> int:
        return self._index.execute(query).fetchone()[0]
