# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs: pages from elsewhere in the repository, and links that work on GitHub and on the site."""

import posixpath
import re
import shutil
import tomllib
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages of the site that lie outside of docs/, by their names there.
ELSEWHERE = {
    "model.md": "contribution/agevlm.md",
    "recipes.md": "examples/recipes/age_vlm_1b/README.md",
    "scripts.md": "examples/scripts/README.md",
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_ARGUMENT = re.compile(r"^( +)(\w+) (\(`.*\)):$", re.MULTILINE)
_AUTODOC = re.compile(r"^## \w+\n\n\[\[autodoc\]\] (\w+)((?:\n {4}- \w+)*)", re.MULTILINE)
_NAME = re.compile(r"\[`~?([\w.]+)`\]")  # Transformers' links to names
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_startup(command, dirty):
    """Lays the folders out as a package, which mkdocstrings reads without importing it. It follows no links."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    package = ROOT / ".cache" / "site_package"
    shutil.rmtree(package, ignore_errors=True)
    for name, folder in sorted(folders.items()):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, package / name.replace(".", "/"), ignore=ignore, dirs_exist_ok=True)
    for file in [*package.glob("agevlm/modeling_agevlm/*.py"), *package.glob("agevlm/processing/*.py")]:
        parts = file.read_text(encoding="utf-8").split('"""')
        # Transformers adds the heading of arguments in `auto_docstring`, at run time: a list, so that they can be read.
        parts[1::2] = [part if "Args:" in part else _ARGUMENT.sub(r"\1- **\2** \3:", part) for part in parts[1::2]]
        file.write_text(_NAME.sub(r"`\1`", '"""'.join(parts)), encoding="utf-8")


def on_files(files, config):
    """Adds the pages that lie elsewhere, and the figures of results."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for figure in sorted((ROOT / "research" / "results").rglob("*.png")):
        name = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at pages of the site. A link to a file that is none becomes the name of the file."""
    uri = page.file.src_uri
    source = ELSEWHERE.get(uri, f"docs/{uri}")
    if source == ELSEWHERE["model.md"]:
        markdown = _model_page(markdown)
    pages = {place: name for name, place in ELSEWHERE.items()}

    def place(link: str) -> tuple[str, str]:
        target, _, anchor = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target)) if target else source
        return path, f"#{anchor}" if anchor else ""

    def link(match: re.Match) -> str:
        text, target = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path, anchor = place(target)
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text if path in text else f"{text} (`{path}`)"

    def image(match: re.Match) -> str:
        if re.match(r"\w+:", match[2]):
            return match[0]
        path, _ = place(match[2])
        return f"![{match[1]}]({path.removeprefix('docs/')})"

    parts = _FENCE.split(markdown)  # code stays as it is
    parts[::2] = [_LINK.sub(link, _IMAGE.sub(image, part)) for part in parts[::2]]
    return "".join(parts)


def _model_page(markdown: str) -> str:
    """Transformers' form of a model page in that of MkDocs: `[[autodoc]]` by mkdocstrings."""
    markdown = re.sub(r"<!--.*?-->\s*", "", markdown, count=1, flags=re.DOTALL)
    markdown = re.sub(r"<div.*?</div>\s*", "", markdown, count=1, flags=re.DOTALL)  # badges from another host

    def autodoc(match: re.Match) -> str:
        members = re.findall(r"- (\w+)", match[2])
        return f"::: {_module(match[1])}.{match[1]}\n    options:\n      members: {members}\n"

    markdown = _AUTODOC.sub(autodoc, markdown)
    return _NAME.sub(r"`\1`", markdown)


def _module(name: str) -> str:
    """The module that defines a class."""
    for file in sorted([*ROOT.glob("modeling_agevlm/*.py"), *ROOT.glob("processing/*.py")]):
        if f"\nclass {name}(" in file.read_text(encoding="utf-8"):
            return f"agevlm.{file.parent.name}.{file.stem}"
    raise LookupError(name)
