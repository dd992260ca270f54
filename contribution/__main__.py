# SPDX-License-Identifier: Apache-2.0
"""Lays AGE-VLM out in Transformers' source tree, runs its tests there, and prints what passed and what did not run."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .layout import REPOSITORY, TARGET, TESTS, lay_out
from .source import source_distribution

NOT_RUN = {
    "tests/generation/test_utils.py": "GenerationTesterMixin, about generate() of every kind",
    "tests/exporters/test_export.py": "ExportTesterMixin",
    "tests/pipelines": "PipelineTesterMixin, which tests/test_pipeline_mixin.py builds on",
    "tests/distributed_testing_utils.py": "FSDPTesterMixin and distributed tests of tensor parallelism",
    "tests/utils/test_configuration_utils.py": "the list of common configuration arguments; a short one stands in",
    "tests/causal_lm_tester.py": "CausalLMModelTester",
    "utils/check_repo.py": "`make fix-repo`: consistency of the repository, docstrings, tables and dummy objects",
    "utils/modular_model_converter.py": "the converter that expands the classes imported from Llama into the modeling file",
    "docs/source/en/_toctree.yml": "building the documentation, and its doctests",
}
"""What a pull request must pass besides, by the file that a source distribution lacks."""


def run_tests(folder: Path) -> tuple[int, dict[str, Counter]]:
    """Runs the model's tests in a laid out tree.

    Returns:
        pytest's exit code, and by file the numbers of tests with the outcomes `passed`, `failed` (errors as well) and
        `skipped`.
    """
    for package in (
        folder / "tests",
        folder / TESTS.parent,
    ):  # without these two the distribution's tests are no package
        (package / "__init__.py").touch()
    paths = [folder / "src", REPOSITORY, REPOSITORY / "tests" / "fixtures"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "RUN_SLOW": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "contribution.in_tree",
        "-o",
        "log_cli=0",
        str(TESTS),
    ]
    with tempfile.TemporaryDirectory() as tmp:
        command.append(f"--junitxml={tmp}/results.xml")
        code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
        results = ElementTree.parse(f"{tmp}/results.xml")
    counts: dict[str, Counter] = {}
    for case in results.iter("testcase"):
        file = next(part for part in case.get("classname", "").split(".") if part.startswith("test_"))
        outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        outcome = next((outcomes[child.tag] for child in case if child.tag in outcomes), "passed")
        counts.setdefault(f"{file}.py", Counter())[outcome] += 1
    return code, counts


def main() -> int:
    console = Console()
    source = source_distribution()
    files = lay_out(source)
    console.print(f"A pull request, in {TARGET.relative_to(REPOSITORY)}:", *files, sep="\n  ")
    code, counts = run_tests(TARGET)
    table = Table("", "passed", "failed", "skipped", title=f"{TESTS} in the tree of {source.name}")
    total: Counter = Counter()
    for file, outcomes in counts.items():
        table.add_row(file, *(str(outcomes[name]) for name in ("passed", "failed", "skipped")))
        total += outcomes
    table.add_section()
    table.add_row("all", *(str(total[name]) for name in ("passed", "failed", "skipped")))
    console.print(table)
    console.print("NOT RUN, because the source distribution does not contain it:")
    for file, contents in NOT_RUN.items():
        if not (source / file).exists():
            console.print(f"  {file}: {contents}", highlight=False, soft_wrap=True)
    return 1 if code != 0 or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
