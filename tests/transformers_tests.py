# SPDX-License-Identifier: Apache-2.0
"""Transformers' common test mixins, which are in its source distribution but not in the installed package.

`load("test_modeling_common")` imports that module of the `tests` folder which belongs to the *installed* version. The
source distribution is fetched once, by pip from whatever index it is configured for, into `.cache` at the root of the
repository. The environment variable `TRANSFORMERS_TESTS` may name another folder, such as the `tests` folder of an
unpacked source distribution or of a checkout.

What the source distribution lacks but its modules import is replaced, unless the folder has it:
`GenerationTesterMixin` and `ExportTesterMixin` by empty classes (so nothing of them is tested), `run_distributed` by a
function that raises, the common configuration arguments by a few, and the fixture images on the Hub, always, by
generated ones of the same format. `test_pipeline_mixin` and `test_fsdp_mixin` need more files than that of Transformers'
repository and cannot be loaded from the source distribution.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import numpy as np
import transformers
from PIL import Image

PACKAGE = "transformers_common_tests"
CACHE = Path(__file__).resolve().parents[1] / ".cache"
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
MEND = "Set TRANSFORMERS_TESTS to the `tests` folder of an unpacked source distribution of that version instead."
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config) -> None:
    """Pytest hook for `conftest.py`: makes the marks of the common tests known to `--strict-markers`."""
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: mark of Transformers' common tests")


def load(name: str) -> ModuleType:
    """The module `name` of the installed Transformers' `tests` folder, `"test_processing_common"` say.

    Raises:
        RuntimeError: if the tests are not at hand and cannot be fetched; a test module then fails to import, and is
            not skipped.
    """
    _create_package()
    return importlib.import_module(f"{PACKAGE}.{name}")


def tests_folder() -> Path:
    """The folder of Transformers' tests, fetched if need be."""
    if "TRANSFORMERS_TESTS" in os.environ:
        folder = Path(os.environ["TRANSFORMERS_TESTS"])
        if not (folder / "test_modeling_common.py").is_file():
            raise RuntimeError(f"TRANSFORMERS_TESTS={folder} has no test_modeling_common.py.")
        return folder
    folder = CACHE / f"transformers-tests-{transformers.__version__}"
    if not folder.is_dir():
        _fetch(transformers.__version__, folder)
    return folder


def _fetch(version: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        # pip also builds the package's metadata, hence needs its build backend; there is no option against it.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        result = subprocess.run(
            [*command, "--dest", tmp, f"transformers=={version}"], capture_output=True, text=True, check=False
        )
        archives = list(Path(tmp).glob("*.tar.gz"))
        if result.returncode != 0 or len(archives) != 1:
            raise RuntimeError(
                f"Cannot fetch the source distribution of transformers {version}, whose common tests are run here.\n"
                f"{result.stderr.strip()}\n{MEND}"
            )
        with tarfile.open(archives[0]) as archive:
            members = [member for member in archive.getmembers() if Path(member.name).parts[1:2] == ("tests",)]
            archive.extractall(tmp, members=members, filter="data")
        source = next(Path(tmp).glob("transformers-*/tests"), None)
        if source is None:
            raise RuntimeError(f"The source distribution of transformers {version} has no tests. {MEND}")
        try:
            source.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


@functools.cache
def _create_package() -> None:
    package = _create_module(PACKAGE, path=[str(tests_folder())])
    stubs: dict[str, dict[str, Any]] = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
        "distributed_testing_utils": {"run_distributed": _run_distributed},
    }
    for name, attributes in stubs.items():
        parent, _, _ = name.rpartition(".")
        if importlib.util.find_spec(f"{PACKAGE}.{name.partition('.')[0]}") is None:
            if parent:
                _create_module(f"{package.__name__}.{parent}", path=[])
            vars(_create_module(f"{package.__name__}.{name}")).update(attributes)
    vars(_create_module("fetch_hub_objects_for_ci")).update(url_to_local_path=url_to_local_path)


def _create_module(name: str, path: list[str] | None = None) -> ModuleType:
    spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=path is not None)
    if path is not None:
        spec.submodule_search_locations = path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    return module


def _run_distributed(*args, **kwargs):
    raise RuntimeError("The source distribution of Transformers does not contain `run_distributed`.")


def url_to_local_path(url: str) -> str:
    """A generated picture in place of the image at `url`; other URLs as they are."""
    name = Path(urlparse(url).path).name
    if not name.lower().endswith((".jpg", ".jpeg", ".png")):
        return url
    path = CACHE / "test-images" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            _picture().save(Path(tmp) / name)
            (Path(tmp) / name).replace(path)
    return str(path)


def _picture(width: int = 640, height: int = 480) -> Image.Image:
    """Soft colours with some hard edges and a little noise, as photographs have them."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    pixels = np.stack([x, y, (1 + np.sin(12 * x * y)) / 2], axis=-1)
    for cx, cy, radius, colour in [(0.3, 0.4, 0.2, (0.9, 0.7, 0.2)), (0.7, 0.6, 0.15, (0.1, 0.3, 0.6))]:
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = colour
    pixels += np.random.default_rng(0).normal(0, 0.02, pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
