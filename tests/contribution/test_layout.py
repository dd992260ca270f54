# SPDX-License-Identifier: Apache-2.0
"""The files of a pull request to Transformers: complete, self-contained, registered; and the common tests run with them."""

import ast
import re
import subprocess
import sys

import pytest

from contribution import layout
from contribution.__main__ import NOT_RUN, run_tests
from contribution.source import source_distribution

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Transformers' source tree with the model in it, and the files of the pull request."""
    target = tmp_path_factory.mktemp("tree") / "transformers"
    return target, layout.lay_out(source_distribution(), target)


def test_the_files_of_a_pull_request(tree):
    target, files = tree
    assert {str(file) for file in files} == {
        "docs/source/en/model_doc/agevlm.md",
        "src/transformers/models/__init__.py",
        "src/transformers/models/agevlm/__init__.py",
        "src/transformers/models/agevlm/configuration_agevlm.py",
        "src/transformers/models/agevlm/image_processing_agevlm.py",
        "src/transformers/models/agevlm/image_processing_pil_agevlm.py",
        "src/transformers/models/agevlm/modeling_agevlm.py",
        "src/transformers/models/agevlm/processing_agevlm.py",
        "src/transformers/models/auto/auto_mappings.py",
        "src/transformers/models/auto/modeling_auto.py",
        "tests/models/agevlm/__init__.py",
        "tests/models/agevlm/test_image_processing_agevlm.py",
        "tests/models/agevlm/test_modeling_agevlm.py",
        "tests/models/agevlm/test_processing_agevlm.py",
        "tests/models/agevlm/tiny.py",
    }
    source = source_distribution()
    changed = {
        path.relative_to(target)
        for path in target.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (not (source / path.relative_to(target)).exists() or path.read_bytes() != (source / path.relative_to(target)).read_bytes())
    }  # fmt: skip
    assert changed == set(files)


def test_every_import_is_relative_and_exists(tree):
    """No file imports `agevlm` or `transformers` itself, and no traveling code is left behind."""
    target, _ = tree
    for path in (target / layout.MODEL).glob("*.py"):
        code = path.read_text()
        assert "register_for_auto_class" not in code
        assert not re.search(r"\bHub\b|one file", (ast.get_docstring(ast.parse(code)) or "").partition("Shapes")[0]), (
            path
        )
        assert "Licensed under the Apache License, Version 2.0" in code.split("import", 1)[0]
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] in ("transformers", "agevlm") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level > 0 or node.module.split(".")[0] not in ("transformers", "agevlm"), path
                if node.level > 0:
                    folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    assert folder.with_suffix(".py").is_file() or (folder / "__init__.py").is_file(), (
                        path,
                        node.module,
                    )
    for path in (target / layout.TESTS).glob("*.py"):
        assert not re.search(
            r"^(?:from|import) (?:agevlm|transformers_tests|tiny)\b|\bload\(", path.read_text(), re.M
        ), path


def test_transformers_itself_loads_the_model(tree):
    target, _ = tree
    script = """
import sys
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AgeVlmConfig, AgeVlmTextConfig, ConvNextConfig
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.processing_auto import processor_class_from_name
assert transformers.__file__.startswith(sys.argv[1]), transformers.__file__
text = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
config = AutoConfig.for_model(
    "agevlm", text_config=text, vision_config=ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4), image_token_id=3
)
names = [type(config), type(config.text_config), type(AutoModelForImageTextToText.from_config(config)),
         type(AutoModel.from_config(config)), type(AutoModel.from_config(config.text_config)),
         processor_class_from_name("AgeVlmProcessor"), get_image_processor_class_from_name("AgeVlmImageProcessor"),
         get_image_processor_class_from_name("AgeVlmImageProcessorPil")]
assert all(c.__module__.startswith("transformers.models.agevlm.") for c in names)
assert "agevlm" not in sys.modules
print(*(c.__name__ for c in names))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(target)],
        capture_output=True,
        text=True,
        check=False,
        cwd=target,
        env={"PYTHONPATH": str(target / "src"), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        "AgeVlmConfig", "AgeVlmTextConfig", "AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmTextModel",
        "AgeVlmProcessor", "AgeVlmImageProcessor", "AgeVlmImageProcessorPil",
    ]  # fmt: skip


def test_every_public_class_is_on_the_page(tree):
    target, _ = tree
    documented = set(re.findall(r"\[\[autodoc\]\] (\w+)", (target / layout.PAGE).read_text()))
    public = set()
    for code in layout.model_files().values():
        for match in re.finditer(r"^__all__ = (\[[^\]]*\])", code, re.M):
            public |= set(ast.literal_eval(match.group(1)))
    assert documented == public - {"AgeVlmPreTrainedModel"}


TABLE = """\
NAMES = OrderedDict(
    [
        ("albert", "AlbertModel"),
        ("bert", "BertModel"),
    ]
)
OTHERS = OrderedDict(
    [
        ("zebra", "ZebraModel"),
    ]
)
"""


@pytest.mark.parametrize(("entry", "line"), [("agevlm", 2), ("bart", 3), ("zoo", 4)])
def test_entries_are_sorted(entry, line):
    changed = layout.register(TABLE, "NAMES", f'("{entry}", "Model")').splitlines()
    assert changed[line] == f'        ("{entry}", "Model"),'
    assert changed[:line] + changed[line + 1 :] == TABLE.splitlines()
    with pytest.raises(ValueError, match="no table `MISSING`"):
        layout.register(TABLE, "MISSING", "x")


def test_definitions_are_dropped_with_their_decorators():
    code = "A = 1\n\n@one\n@two(3)\ndef f():\n    pass\n\nclass C:\n    x = 1\n\n    @one\n    def g(self):\n        pass\n"
    assert layout.drop_definitions(code, ["f", "C.g"]) == "A = 1\n\n\nclass C:\n    x = 1\n\n"
    assert layout.drop_definitions(code, ["A", "C"]) == "\n@one\n@two(3)\ndef f():\n    pass\n\n"
    with pytest.raises(ValueError, match=r"no definition of `C\.h`"):
        layout.drop_definitions(code, ["C.h"])


def test_what_is_not_run_is_what_the_distribution_lacks():
    assert not [file for file in NOT_RUN if (source_distribution() / file).exists()]


@pytest.mark.minutes
@pytest.mark.timeout(3600)
def test_the_common_tests_pass_in_tree(tree):
    target, _ = tree
    code, counts = run_tests(target)
    assert code == 0
    assert set(counts) == {"test_modeling_agevlm.py", "test_image_processing_agevlm.py", "test_processing_agevlm.py"}
    for file, outcomes in counts.items():
        assert outcomes["failed"] == 0, file
        assert outcomes["passed"] > outcomes["skipped"], file
