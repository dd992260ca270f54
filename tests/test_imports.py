# SPDX-License-Identifier: Apache-2.0
"""The rules of imports: which file may import which, read from the source, imports inside functions included."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders of the installed package from the ground up. A file imports from its own folder and from those before it.
# `agevlm` stands for build.py, files.py, hub.py, plots.py and resume.py.
ORDER = (
    *("modeling_agevlm", "processing", "agevlm", "attention", "hub_cards", "data"),
    *("inference", "trainer", "evaluation", "serving", "cli"),
)
# The front door joins all folders, so it may import from any of them.
FRONT_DOOR = {"agevlm", "agevlm._auto", "agevlm.__main__"}
# The files that are copied to the Hub with a checkpoint.
HUB_FILES = (
    "modeling_agevlm/configuration_agevlm.py",
    "modeling_agevlm/modeling_agevlm.py",
    "processing/image_processing_agevlm.py",
    "processing/processing_agevlm.py",
)


def installed_files() -> dict[str, Path]:
    """The files of the installed package by module name, such as `agevlm.data.readers`."""
    folders = {"agevlm": "agevlm", "agevlm.cli": "agevlm/cli"}
    folders |= {f"agevlm.{name}": name for name in ORDER if name not in ("agevlm", "cli")}
    folders["agevlm.data.formats"] = "data/formats"
    files = {}
    for package, folder in folders.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


FILES = installed_files()
PACKAGES = {name for name, path in FILES.items() if path.stem == "__init__"}


def public_names(package: str) -> dict[str, str]:
    """By public name of a package the module that defines it, as `__init__.pyi` says."""
    stub = FILES[package].with_suffix(".pyi")
    if not stub.is_file():
        return {}
    return {
        alias.asname or alias.name: resolve(package, is_package=True, node=node)
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def resolve(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The absolute name of the module in `from … import …`."""
    if not node.level:
        return node.module or ""
    base = module.split(".")[: None if is_package else -1]
    base = base[: len(base) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, at_runtime: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """All imports of a file, also those in functions; without those that only type checkers follow if `at_runtime`."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif is_for_type_checkers(node) and at_runtime:
            for other in node.orelse:
                found += imports(other)
        else:
            found += imports(node, at_runtime)
    return found


def imported_modules(module: str, path: Path, at_runtime: bool = True) -> set[str]:
    """Absolute names of all modules that a file imports. A name that a package re-exports counts as its module."""
    names: set[str] = set()
    for node in imports(ast.parse(path.read_text(encoding="utf-8")), at_runtime):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        source = resolve(module, path.stem == "__init__", node)
        for alias in node.names:
            if (source, alias.name) == ("agevlm", "__version__"):
                continue  # an import of any module runs the front door's `__init__` first
            if f"{source}.{alias.name}" in FILES:
                names.add(f"{source}.{alias.name}")
            elif source in PACKAGES:
                names.add(public_names(source).get(alias.name, source))
            else:
                names.add(source)
    return names


def edges(at_runtime: bool = True) -> dict[str, set[str]]:
    """By file of the installed package, without the front door and the command line: the package's files it imports."""
    return {
        module: {name for name in imported_modules(module, path, at_runtime) if name in FILES and name != module}
        for module, path in FILES.items()
        if module not in FRONT_DOOR and folder(module) != "cli"
    }


def folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and f"agevlm.{parts[1]}" in PACKAGES else "agevlm"


def test_the_package_is_read_completely():
    for module in (
        "agevlm.resume",
        "agevlm.cli.data",
        "agevlm.modeling_agevlm.modeling_agevlm",
        "agevlm.trainer.trainer",
    ):
        assert module in FILES
    assert "agevlm.data.readers" in edges()["agevlm.data.mixture"]
    assert "agevlm.processing.image_processing_agevlm" in edges()["agevlm.data.scene_builder"]  # inside a function
    assert public_names("agevlm.data")["read_dataset"] == "agevlm.data.readers"
    assert {folder(module) for module in FILES} <= set(ORDER)


def test_imports_follow_the_order_of_folders():
    wrong = [
        f"{module} imports {name}"
        for module, names in sorted(edges().items())
        for name in sorted(names)
        if folder(module) in ORDER and ORDER.index(folder(name)) > ORDER.index(folder(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_front_door_is_imported_by_nobody():
    wrong = [f"{module} imports {name}" for module, names in edges().items() for name in names & FRONT_DOOR]
    assert not wrong, "\n".join(wrong)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a graph, as its nodes in order; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if circle := visit(other, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_circles_are_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("at_runtime", [True, False], ids=["runtime", "annotations"])
def test_no_circle_between_files(at_runtime):
    circle = find_circle(edges(at_runtime))
    assert not circle, " -> ".join(circle)


def test_no_circle_between_folders():
    graph = defaultdict(set)
    for module, names in edges().items():
        graph[folder(module)] |= {folder(name) for name in names} - {folder(module)}
    circle = find_circle(graph)
    assert not circle, " -> ".join(circle)


def test_nothing_installed_imports_research():
    wrong = [
        module
        for module, path in FILES.items()
        if any(
            name.split(".")[0] in ("research", "examples", "tests") for name in imported_modules(module, path, False)
        )
    ]
    assert not wrong, wrong


def test_trainer_and_data_do_not_import_evaluation():
    wrong = [
        f"{module} imports {name}"
        for module, names in edges(at_runtime=False).items()
        for name in names
        if folder(module) in ("trainer", "data") and folder(name) == "evaluation"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", HUB_FILES)
def test_files_for_the_hub_import_libraries_and_siblings_only(file):
    """Remote code is loaded file by file: a relative import must name a sibling that is copied too."""
    siblings = {Path(other).stem for other in HUB_FILES if Path(other).parent == Path(file).parent}
    for node in imports(ast.parse((ROOT / file).read_text(encoding="utf-8")), at_runtime=False):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module in siblings, ast.unparse(node)
        else:
            assert not {name.split(".")[0] for name in names} & {"agevlm", "research"}, ast.unparse(node)


def loaded_modules(code: str) -> set[str]:
    """The modules that are loaded once a fresh process has run `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_agevlm_imports_no_torch():
    loaded = loaded_modules("import agevlm, agevlm.data, agevlm.trainer, agevlm.evaluation, agevlm.processing")
    assert not loaded & {"torch", "transformers", "datasets", "timm"}


def test_the_command_line_starts_without_torch():
    assert not loaded_modules("import agevlm.cli.commands") & {"torch", "transformers", "datasets", "timm"}


def test_reading_a_llava_file_imports_neither_scene_builder_nor_trainer(tmp_path):
    turns = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    loaded = loaded_modules(
        "import datasets; from agevlm.data import read_dataset;"
        f"datasets.config.HF_DATASETS_CACHE = {str(tmp_path)!r};"
        f"rows = read_dataset({str(tmp_path / 'llava.json')!r}, 'llava');"
        "assert rows[0]['messages'][1]['content'][0]['text'] == '4'"
    )
    assert "agevlm.data.readers" in loaded
    unwanted = ("agevlm.trainer", "agevlm.evaluation", "agevlm.modeling_agevlm", "agevlm.data.scene_builder")
    assert not {name for name in loaded if name.startswith((*unwanted, "agevlm.data.masks", "agevlm.data.teachers"))}
