# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: it is built without a warning, is complete, and needs no other host."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from documents import ROOT, anchors

# Two builds at once would lay out the package twice in the same folder.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("WARNING|ERROR", done.stderr), done.stderr
    return out


def html(site, page: str) -> str:
    return (site / ("" if page == "index" else page) / "index.html").read_text(encoding="utf-8")


def leaves(entry):
    if isinstance(entry, str):
        yield entry
    else:
        for child in entry:
            for value in child.values():
                yield from leaves(value)


def test_every_page_is_in_the_navigation(site):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *args: None)
    named = set(leaves(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= named
    assert all(html(site, page.removesuffix(".md")) for page in named)


def test_anchors_are_those_of_github(site):
    for page in (ROOT / "docs").glob("*.md"):
        ids = set(re.findall(r'<h\d id="([^"]+)"', html(site, page.stem)))
        assert anchors(page) <= ids, page.name


def test_no_other_host_is_needed(site):
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="?(https?:[^" >]+)', text)
        assert not loaded, (file.name, loaded)


def test_the_model_page_documents_the_classes(site):
    page = html(site, "model")
    assert "autodoc" not in page
    for name in ("AgeVlmConfig", "AgeVlmProcessor", "AgeVlmForConditionalGeneration"):
        assert re.search(rf'<h2 id="agevlm\.[\w.]*{name}"', page), name
    assert "cross_attention_sink" in page
    assert "map_queries" in page


def test_links_work_on_the_site(site):
    assert "examples/weights" in html(site, "quickstart")  # a folder, which is no page
    assert re.search(r'href="(\.\./)?architecture/', html(site, "index"))
