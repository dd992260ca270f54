# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a pull request to Transformers into a copy of its source tree.

Everything but the page of the documentation is derived from this repository's own files: the traveling files with
relative imports, their tests, and the entries in Transformers' tables.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .source import CACHE

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = CACHE / "contribution"
MODEL = Path("src/transformers/models/agevlm")
PACKAGE = "transformers.models.agevlm"
TESTS = Path("tests/models/agevlm")
PAGE = Path("docs/source/en/model_doc/agevlm.md")

LICENSE = """\
# Copyright 2026 The AGE-VLM contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""

INIT = """\
from typing import TYPE_CHECKING

from ...utils import _LazyModule
from ...utils.import_utils import define_import_structure


if TYPE_CHECKING:
{imports}
else:
    import sys

    _file = globals()["__file__"]
    sys.modules[__name__] = _LazyModule(__name__, _file, define_import_structure(_file), module_spec=__spec__)
"""

REGISTRATIONS = {
    "auto_mappings.py": {
        "CONFIG_MAPPING_NAMES": ['("agevlm", "AgeVlmConfig")', '("agevlm_text", "AgeVlmTextConfig")'],
        "SPECIAL_MODEL_TYPE_TO_MODULE_NAME": ['("agevlm_text", "agevlm")'],
        "PROCESSOR_MAPPING_NAMES": ['("agevlm", "AgeVlmProcessor")'],
        "IMAGE_PROCESSOR_MAPPING_NAMES": [
            '("agevlm", {"pil": "AgeVlmImageProcessorPil", "torchvision": "AgeVlmImageProcessor"})'
        ],
    },
    "modeling_auto.py": {
        "MODEL_MAPPING_NAMES": ['("agevlm", "AgeVlmModel")', '("agevlm_text", "AgeVlmTextModel")'],
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": ['("agevlm", "AgeVlmForConditionalGeneration")'],
    },
}
"""File in `models/auto` -> table -> entries, in the order of the table."""

DERIVED_TESTS = {
    "test_modeling_agevlm.py": ("tests/modeling_agevlm/test_modeling_common_agevlm.py", ()),
    "test_image_processing_agevlm.py": (
        "tests/processing/test_image_processing_agevlm.py",
        # In-tree the classes are found by the folder's name, and the processors load without remote code.
        (
            "AgeVlmImageProcessingTester._get_image_processing_classes",
            "AgeVlmImageProcessingTest.test_pil_can_run_without_torchvision",
        ),
    ),
    "test_processing_agevlm.py": (
        "tests/processing/test_processing_agevlm.py",
        # Of loading with remote code or without, which an in-tree model does not need.
        (
            "REMOTE_SCRIPT",
            "run_remotely",
            "test_remote_code",
            "test_saved_files_and_auto_maps",
            "test_registered_classes_are_used_without_remote_code",
        ),
    ),
    "tiny.py": ("tests/fixtures/tiny.py", ("ProcessorsConfig", "register_processors")),
}
"""File in `tests/models/agevlm` -> the file it is derived from, and which definitions of it stay behind."""

# Where the image processors of one traveling file go: Transformers has a file for each backend.
TORCHVISION_CLASS = "AgeVlmImageProcessor"


def lay_out(source: Path, target: Path = TARGET) -> list[Path]:
    """Copies Transformers' source tree and writes AGE-VLM into the copy.

    Args:
        source: an unpacked source distribution ([`contribution.source.source_distribution`]), or a checkout.
        target: the folder of the copy; an earlier one is replaced.

    Returns:
        The files of the pull request, new and changed ones, relative to `target`.

    Raises:
        ValueError: if a file of this repository or of Transformers has not the form that is expected here.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    changed = _register(target)
    files = {MODEL / name: code for name, code in model_files().items()}
    files |= {TESTS / "__init__.py": "", **{TESTS / name: code for name, code in test_files().items()}}
    files[PAGE] = (REPOSITORY / "contribution" / "agevlm.md").read_text("utf-8")
    for path, content in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(content, "utf-8")
    # Transformers' own order of imports and format; names that are no longer used go.
    code = [str(path) for path in files if path.suffix == ".py"]
    for arguments in (["check", "--fix", "--select", "F401,I"], ["format"], ["check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", arguments[0], "--quiet", "--no-cache", *arguments[1:], *code],
            cwd=target, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise ValueError(f"ruff, with Transformers' settings: {result.stdout}{result.stderr}")
    return sorted([*files, *changed])


def model_files() -> dict[str, str]:
    """The files of `src/transformers/models/agevlm` by name: the traveling files with relative imports."""
    traveling = {
        name: _in_tree((REPOSITORY / folder / name).read_text("utf-8"))
        for folder, name in [
            ("modeling_agevlm", "configuration_agevlm.py"),
            ("modeling_agevlm", "modeling_agevlm.py"),
            ("processing", "image_processing_agevlm.py"),
            ("processing", "processing_agevlm.py"),
        ]
    }
    both = traveling.pop("image_processing_agevlm.py")
    traveling["image_processing_pil_agevlm.py"] = drop_definitions(both, [TORCHVISION_CLASS])
    traveling["image_processing_agevlm.py"] = _torchvision_file(both)
    imports = "\n".join(f"    from .{name.removesuffix('.py')} import *" for name in sorted(traveling))
    traveling["__init__.py"] = LICENSE + INIT.format(imports=imports)
    return {name: _public_classes(code) for name, code in traveling.items()}


def test_files() -> dict[str, str]:
    """The files of `tests/models/agevlm` by name, derived from this repository's tests."""
    derived = {}
    for name, (origin, dropped) in DERIVED_TESTS.items():
        code = drop_definitions((REPOSITORY / origin).read_text("utf-8"), dropped)
        code = re.sub(r"^register_processors\(\)\n", "", code, flags=re.M)
        code = re.sub(r"^from transformers_tests import load\n", "", code, flags=re.M)
        code = re.sub(r'^( *)(\w+) = load\("(\w+)"\)$', r"\1from ... import \3 as \2", code, flags=re.M)
        code = re.sub(r'^( *)(\w+) = load\("(\w+)"\)\.\2$', r"\1from ...\3 import \2", code, flags=re.M)
        code = re.sub(r"^from tiny import ", "from .tiny import ", code, flags=re.M)
        code = re.sub(r"^from agevlm import ", "from transformers import ", code, flags=re.M)
        code = re.sub(
            r'"agevlm\.processing\.image_processing_agevlm\.', f'"{PACKAGE}.image_processing_pil_agevlm.', code
        )
        code = re.sub(r"^from agevlm\.\w+\.", f"from {PACKAGE}.", code, flags=re.M)
        derived[name] = _split_image_imports(_license(code))
    return derived


def drop_definitions(code: str, names: Iterable[str]) -> str:
    """The code without some definitions: functions, classes or variables, or methods as `Class.method`.

    Raises:
        ValueError: if there is no such definition.
    """
    lines = code.splitlines(keepends=True)
    places = dict(_definitions(ast.parse(code).body))
    for name in names:
        if name not in places:
            raise ValueError(f"There is no definition of `{name}` to leave out; see `contribution/layout.py`.")
        first, last = places[name]
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "".join(lines)


def register(code: str, table: str, entry: str) -> str:
    """The code with one more entry, a line of Python, in a sorted table `TABLE = OrderedDict([...])`.

    Raises:
        ValueError: if there is no such table.
    """
    begin = re.search(rf"^{table} = OrderedDict\(\n    \[\n", code, flags=re.M)
    if begin is None:
        raise ValueError(f"Transformers has no table `{table}` of the expected form; see `contribution/layout.py`.")
    end = code.index("    ]\n", begin.end())
    later = (match.start() for match in re.finditer(r'^ {8}\(".*$', code, flags=re.M) if match.group().strip() > entry)
    place = next((start for start in later if begin.end() <= start < end), end)
    return f"{code[:place]}        {entry},\n{code[place:]}"


def _register(target: Path) -> list[Path]:
    """Registers the model in the copy, and returns the changed files."""
    auto = MODEL.parent / "auto"
    for name, tables in REGISTRATIONS.items():
        code = (target / auto / name).read_text("utf-8")
        for table, entries in tables.items():
            for entry in entries:
                code = register(code, table, entry)
        (target / auto / name).write_text(code, "utf-8")
    init = MODEL.parent / "__init__.py"
    code = (target / init).read_text("utf-8")
    line = "    from .agevlm import *\n"
    later = (
        match.start()
        for match in re.finditer(r"^    from \.\w+ import \*\n", code, flags=re.M)
        if match.group() > line
    )
    place = next(later)
    (target / init).write_text(code[:place] + line + code[place:], "utf-8")
    return [init, *(auto / name for name in REGISTRATIONS)]


def _definitions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and first and last line, of what a module defines, methods included."""
    for node in body:
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield owner + node.targets[0].id, (node.lineno, last)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield owner + node.name, (min([node.lineno, *(d.lineno for d in node.decorator_list)]), last)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{node.name}.")


def _in_tree(code: str) -> str:
    """A traveling file as Transformers' own: relative imports, the license in full, no registration for remote code."""
    code = re.sub(r"^from transformers\.models\.", "from ..", code, flags=re.M)
    code = re.sub(r"^from transformers\.", "from ...", code, flags=re.M)
    code = re.sub(r"^from transformers import ", "from ... import ", code, flags=re.M)
    code = re.sub(r"(?:^#.*\n)*^\w+\.register_for_auto_class\(.*\)\n", "", code, flags=re.M)
    code = re.sub(r"^( *>>> )from agevlm import ", r"\1from transformers import ", code, flags=re.M)
    code = re.sub(r"^ *>>> import agevlm\b.*\n", "", code, flags=re.M)
    return _split_image_imports(_without_hub(_license(code)))


def _without_hub(code: str) -> str:
    """The code without those paragraphs of its first docstring that say what the file is on the Hub."""
    opening, text, closing = re.match(r'((?:#[^\n]*\n)*""")(.*?)(\n?""")', code, flags=re.S).groups()  # type: ignore[union-attr]
    kept = "\n\n".join(paragraph for paragraph in text.split("\n\n") if not re.search(r"\bHub\b|one file", paragraph))
    return opening + kept + (closing if "\n" in kept else '"""') + code[len(opening + text + closing) :]


def _license(code: str) -> str:
    return re.sub(r"\A(?:#.*\n)+", LICENSE, code)


def _public_classes(code: str) -> str:
    """The code with AGE-VLM's classes alone in `__all__`, which names them in `transformers`; helpers stay in the module."""
    names = set(re.findall(r"^class (\w+)", code, flags=re.M))

    def replace(match: re.Match) -> str:
        return f"__all__ = {sorted(names & set(ast.literal_eval(match.group(1))))!r}\n"

    return re.sub(r"^__all__ = (\[[^\]]*\])\n", replace, code, flags=re.M)


def _torchvision_file(both: str) -> str:
    """The image processor on torchvision; what both backends share is in the file of the one on PIL."""
    first, last = dict(_definitions(ast.parse(both).body))[TORCHVISION_CLASS]
    lines = both.splitlines(keepends=True)
    imports = [node for node in ast.parse(both).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(
        [
            LICENSE,
            '"""Torchvision image processor class for AGE-VLM."""\n',
            *("".join(lines[node.lineno - 1 : node.end_lineno]) for node in imports),
            "from .image_processing_pil_agevlm import AgeVlmImageProcessorKwargs, AgeVlmImageProcessorMixin\n",
            *lines[first - 1 : last],
            "    valid_kwargs = AgeVlmImageProcessorKwargs\n",  # a common test looks for the type in the class's own file
            f'__all__ = ["{TORCHVISION_CLASS}"]\n',
        ]
    )


def _split_image_imports(code: str) -> str:
    """Imports from the traveling image processors' file, from the two files that Transformers has for them."""
    lines = code.splitlines(keepends=True)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("image_processing_agevlm"):
            module = "." * node.level + str(node.module)
            pil = module.replace("image_processing", "image_processing_pil")
            lines[node.lineno - 1 : node.end_lineno] = [
                "".join(
                    f"from {module if alias.name == TORCHVISION_CLASS else pil} import {alias.name}\n"
                    for alias in node.names
                ),
                *[""] * ((node.end_lineno or node.lineno) - node.lineno),
            ]
    return "".join(lines)
