# SPDX-License-Identifier: Apache-2.0
"""What the documentation names exists: functions, commands, recipes, files, versions."""

import ast
import importlib
import re
import tomllib
from typing import Any

import pytest
import typer
import yaml
from documents import (
    MOVED,
    PAGES,
    README,
    REPORTS,
    ROOT,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    name_of,
    prose,
    resolve,
    resolve_in,
)

import agevlm
from agevlm.cli.commands import app
from agevlm.trainer.recipe import load_recipe

PACKAGES = ("modeling_agevlm", "processing", "hub_cards", "data", "inference", "trainer", "evaluation", "serving")
SOURCES = sorted(
    file
    for folder in ("agevlm", *PACKAGES, "research")
    for file in (ROOT / folder).rglob("*.py")
    if file.name != "__main__.py"
)
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def imports(code: str) -> list[tuple[str, str]]:
    """`(module, name)` of what a piece of Python imports from this repository; the name is empty for the module itself."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in ("agevlm", "research")]


def module_name(source) -> str:
    parts = list(source.relative_to(ROOT).with_suffix("").parts)
    if parts[0] not in ("agevlm", "research"):
        parts.insert(0, "agevlm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_pages_import(page):
    names = [".".join(filter(None, pair)) for code in blocks(page, "python") for pair in imports(code)]
    for code in inline_code(page):
        names += re.findall(r"^~?((?:agevlm|research)(?:\.[A-Za-z_]\w*)+)", code)
    for name in names:
        resolve(name)


def test_the_check_of_names_fails_for_a_wrong_name():
    for name in ("agevlm.trainer.AgeVlmTeacher", "agevlm.nowhere.train", "research.nothing"):
        with pytest.raises(LookupError):
            resolve(name)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_names_of_docstrings_import(source):
    module = importlib.import_module(module_name(source))
    tree = ast.parse(source.read_text(encoding="utf-8"))
    texts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    for text in texts:
        for name in re.findall(r"\[`~?([A-Za-z_][\w.]*)`\]", text):
            resolve_in(module, name)


def test_readme_names_are_public():
    """The README needs one import: each name is in `agevlm` itself."""
    for code in blocks(README, "python"):
        for module, name in imports(code):
            assert module == "agevlm", (module, name)
            assert not name or name in agevlm.__all__, name
    tree = "\n".join(blocks(README, "python"))
    used = set(re.findall(r"agevlm\.(\w+)", tree))
    stubs = "\n".join((ROOT / folder / "__init__.pyi").read_text(encoding="utf-8") for folder in PACKAGES[:5])
    public = set(re.findall(r" as (\w+)$", stubs, re.MULTILINE))
    used |= {code for code in inline_code(README) if code in public or code.startswith("AgeVlm")}
    assert used
    assert used <= set(agevlm.__all__)


def test_old_names_are_gone():
    """No shims: a module that moved does not import under its old name."""
    rows = [
        line.split(" | ") for line in MOVED.read_text(encoding="utf-8").splitlines() if line.startswith("| `agevlm.")
    ]
    old = [match.group(1) for row in rows if (match := re.match(r"\| `(agevlm(?:\.\w+)+)`$", row[0]))]
    assert len(old) > 15
    new = {"agevlm.cli"}  # was a module, is a package
    for name in set(old) - new:
        with pytest.raises(LookupError):
            resolve(name)


UsageError = typer.BadParameter.__mro__[1]  # of the click that typer brings


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words after `agevlm` begin with, and the words after it."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and re.match(r"[a-z]", words[0]):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse_command(words: list[str]) -> tuple[Any, dict]:
    """The command that the words after `agevlm` run, and its parameters. Unknown or missing options raise."""
    command, rest = find_command(words)
    return command, command.make_context(command.name, list(rest)).params


def test_commands_of_pages_parse():
    parsed = 0
    for page in PAGES:
        for block in blocks(page, "sh"):
            for words in commands(block):
                if "agevlm" in words and "--model" not in words[: words.index("agevlm")]:
                    command, values = parse_command(words[words.index("agevlm") + 1 :])
                    if command.name == "train" and (ROOT / str(values["recipe"])).is_file():
                        load_recipe(ROOT / values["recipe"], values["overrides"] or ())
                    parsed += 1
                elif words[0] == "make":
                    assert words[1] in TARGETS, (name_of(page), words)
                elif words[:2] == ["python", "-m"]:
                    if not words[2].startswith("sglang."):  # not installed with agevlm
                        resolve(words[2])
                elif words[0].endswith("python"):
                    assert (ROOT / words[1]).is_file(), (name_of(page), words)
    assert parsed > 30


@pytest.mark.parametrize("words", [["build", "--txet", "a"], ["aks", "x"], ["ask", "Is it?"]], ids=str)
def test_the_check_of_commands_fails_for_a_wrong_command(words):
    with pytest.raises((UsageError, AssertionError)):
        parse_command(words)


def test_commands_in_the_text_exist():
    for page in PAGES:
        for code in inline_code(page):
            if code.startswith("make "):
                assert code.split()[1] in TARGETS, (name_of(page), code)
            if re.match(r"agevlm [a-z]", code):
                command, words = find_command(code.split()[1:])
                options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
                assert {word for word in words if word.startswith("--")} <= options, (name_of(page), code)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_commands_of_recipes_parse(recipe):
    comments = re.findall(r"^ *# ?(.*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(
        "\n".join(line for line in comments if re.match(r" *(agevlm|accelerate|--|\$|examples)", line))
    ):
        if "agevlm" in words:
            parse_command(words[words.index("agevlm") + 1 :])


def test_recipes_of_pages_load(tmp_path):
    found = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for page, block in found:
        assert isinstance(yaml.safe_load(block), dict), name_of(page)
        file = tmp_path / "recipe.yaml"
        file.write_text(block, encoding="utf-8")
        load_recipe(file)


@pytest.mark.parametrize("page", [*PAGES, *REPORTS], ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert set((ROOT / "docs").glob("*.md")) - {index} <= listed


def test_versions_of_the_first_screen_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    transformers = next(name for name in project["dependencies"] if name.startswith("transformers>="))
    badges = re.findall(r"!\[([^]]*)\]\((docs/figures/badge_\w+\.svg)\)", README.read_text(encoding="utf-8"))
    stated = {
        "badge_license": project["license"],
        "badge_python": project["requires-python"].removeprefix(">="),
        "badge_transformers": transformers.removeprefix("transformers>="),
    }
    assert len(badges) == len(stated)
    for alternative, file in badges:
        name = (ROOT / file).stem
        assert stated[name] in alternative
        assert stated[name] in (ROOT / file).read_text(encoding="utf-8")


def test_citations_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    bibtex = "\n".join(blocks(README, "bibtex"))
    assert cited["version"] == agevlm.__version__
    assert paper["title"] in bibtex
    assert paper["journal"] in bibtex
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(authors) in bibtex


def test_first_screen_has_no_remote_picture():
    assert not re.search(r"!\[[^]]*\]\(\w+:", prose(README))
