# SPDX-License-Identifier: Apache-2.0
"""How recipes and training scripts are configured: YAML 1.2, `key=value` overrides, and names and types that are checked.

PyYAML alone reads YAML 1.1, in which `1e-4` is a string and `no` is False.
"""

import dataclasses
import difflib
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

# What a recipe may have: references make a small text large, or endless.
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """A safe loader with the numbers and booleans of YAML 1.2, to which a key that stands twice is an error, as YAML says."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: names the text in errors.

    Raises:
        ValueError: if it is not YAML, or has more than a hundred thousand values or a hundred levels, as references to
            one's own place have.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None
    except Exception as error:  # PyYAML's constructors raise whatever they meet in a value with a wrong tag
        raise ValueError(f"{where} is not YAML: {error or type(error).__name__}") from error
    level, number = [value], 0
    for _ in range(100):
        number += len(level)
        level = list(itertools.islice(itertools.chain.from_iterable(map(_items, level)), _MOST_VALUES))
        if not level or number >= _MOST_VALUES:
            break
    if level:
        raise ValueError(f"{where} is nested too deeply, or has more than {_MOST_VALUES} values.")
    return value


def _items(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def read_mapping(path: str | os.PathLike, contents: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        contents: what the file must have, for errors.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not YAML, or not a mapping.
    """
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not UTF-8 ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping with {contents}, got {_shown(values)}.")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts the value of `key=value` in its place in nested mappings and lists; [`parse`] checks names and types.

    Args:
        values: changed in place.
        override: a dotted key and a YAML value, as `training.learning_rate=1e-4`. An entry of a list is named by its
            position, or by its `name`: `data.0.path=rows`, `stages.guide.training.max_steps=10`.

    Raises:
        ValueError: if it has no `=`, there is no such place, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"'{override}' is no override: write key=value, as training.learning_rate=1e-4.")
    *parents, last = key.split(".")
    place: Any = values
    for depth, name in enumerate((*parents, last)):
        where = ".".join(parents[:depth])
        if not isinstance(place, (list, dict)):
            raise ValueError(f"{override}: {where} is {_shown(place)}, in which there is no '{name}'.")
        step: Any = _find_entry(place, name, f"{override}: {where}") if isinstance(place, list) else name
        if depth == len(parents):
            place[step] = read_yaml(text, override)
        else:
            if isinstance(place, dict) and place.get(step) is None:
                place[step] = {}
            place = place[step]


def _find_entry(entries: list, name: str, where: str) -> int:
    if name.isdecimal() and int(name) < len(entries):
        return int(name)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if name in names:
        return names.index(name)
    if not entries:
        raise ValueError(f"{where} is empty, so it has no '{name}'.")
    named = "".join(f" ({', '.join(known)})" for known in [[str(n) for n in names if n is not None]] if known)
    raise ValueError(f"{where} has the entries 0 to {len(entries) - 1}{named}, no '{name}'.")


def parse(hint: Any, value: Any, where: str = "") -> Any:
    """A value as what a type hint says, whose dataclasses are mappings in YAML.

    Args:
        hint: a dataclass, a list of one, either or None, or any other type, which the value must have.
        where: dotted place of the value, for errors; empty for the whole.

    Raises:
        ValueError: for an unknown or missing name, or a value of the wrong type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            if not isinstance(value, dict):
                raise ValueError(f"{where} must be a mapping, got {_shown(value)}.")
            hints = typing.get_type_hints(option)
            fields = dataclasses.fields(option)
            check_names(value, [f.name for f in fields], where)
            needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
            if missing := [name for name in needed if name not in value]:
                raise ValueError(f"{where or 'The recipe'} has no {' and no '.join(missing)}.")
            return option(**{name: parse(hints[name], item, _join(where, name)) for name, item in value.items()})
        if typing.get_origin(option) is list and dataclasses.is_dataclass(typing.get_args(option)[0]):
            if not isinstance(value, list):
                raise ValueError(f"{where} must be a list, got {_shown(value)}.")
            return [parse(typing.get_args(option)[0], item, _join(where, str(i))) for i, item in enumerate(value)]
    check_type(hint, value, where)
    return value


def check_names(names: Iterable[Any], known: Iterable[str], where: str = "") -> None:
    """
    Raises:
        ValueError: for the first name that is not known; says the nearest one that is.
    """
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            nearest = f": did you mean '{close[0]}'?" if close else "."
            raise ValueError(f"There is no '{_join(where, str(name))}'{nearest} Known are {', '.join(known)}.")


def check_type(hint: Any, value: Any, where: str) -> None:
    """
    Raises:
        ValueError: if the value is not of the type that `hint` says.
    """
    if not _fits(hint, value):
        raise ValueError(f"{where} must be {_described(hint)}, got {_shown(value)}.")


def check_fields(values: dict[str, Any], classes: Sequence[type], where: str = "") -> None:
    """
    Raises:
        ValueError: if `values` has a name that is no field of these dataclasses, or a value of the wrong type.
    """
    known: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        known |= {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    check_names(values, known, where)
    for name, value in values.items():
        check_type(known[name], value, _join(where, name))


def parse_script(classes: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The configuration of a training script: `script.py [FILE.yaml] [KEY=VALUE]... [--FLAG VALUE]...`.

    Overrides replace values of the file, and flags, which TRL's parser reads, replace both. `--config FILE.yaml` names
    the file as well, and its mapping `env` sets environment variables.

    Args:
        classes: dataclasses, whose fields are the names.
        arguments: by default the command line's.

    Returns:
        An instance of each class. A mistake ends the program with a message and exit code 2.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            print(f"{self.prog}: error: {message}", file=sys.stderr)  # without the usage of hundreds of flags
            raise SystemExit(2)

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(classes)
    try:
        values: dict[str, Any] = {}
        if "--config" in arguments:
            place = arguments.index("--config")
            arguments = [*arguments[place + 1 : place + 2], *arguments[:place], *arguments[place + 2 :]]
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            values = read_mapping(arguments.pop(0), "names and values")
            os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
        while arguments and not arguments[0].startswith("-"):
            apply_override(values, arguments.pop(0))
        check_fields(values, classes)
        parser.set_defaults_with_config(**values)
        fields = [field.name for cls in classes for field in dataclasses.fields(cls)]
        unknown = parser.parse_known_args(arguments)[1]
        check_names([text.partition("=")[0].lstrip("-").replace("-", "_") for text in unknown], fields)
        return parser.parse_args_into_dataclasses(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, args)))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is list:
        return f"a list of {_described(args[0])}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint) or ("a mapping" if dict in (hint, origin) else hint.__name__)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
