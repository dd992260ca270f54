# SPDX-License-Identifier: Apache-2.0
"""Registration with Transformers' Auto classes, put off until Transformers itself loads them.

Registering needs the classes, and the classes need torch, which `import agevlm` must not load. So this waits for the
modules that hold the Auto classes: whoever calls `AutoModel.from_pretrained` has loaded those, and torch with them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

# Every Auto class loads this one first.
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Makes the Auto classes know AGE-VLM. Calling it again changes nothing."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .modeling_agevlm.configuration_agevlm import AgeVlmConfig, AgeVlmTextConfig
    from .modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmTextModel
    from .processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil
    from .processing.processing_agevlm import AgeVlmProcessor

    AutoConfig.register(AgeVlmConfig.model_type, AgeVlmConfig, exist_ok=True)
    AutoConfig.register(AgeVlmTextConfig.model_type, AgeVlmTextConfig, exist_ok=True)
    AutoModel.register(AgeVlmConfig, AgeVlmModel, exist_ok=True)
    AutoModel.register(AgeVlmTextConfig, AgeVlmTextModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(AgeVlmConfig, AgeVlmForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        AgeVlmConfig,
        image_processor_classes={"torchvision": AgeVlmImageProcessor, "pil": AgeVlmImageProcessorPil},
        exist_ok=True,
    )
    AutoProcessor.register(AgeVlmConfig, AgeVlmProcessor, exist_ok=True)


def _is_loading(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of both packages as Python would, and registers as soon as none of them is partly imported.

    The latter matters: the import that brings the Auto classes may have begun in a file that ours import from, or in
    one of ours.
    """

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("transformers.", "agevlm.")):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader_state, spec.loader = spec.loader, self
                return spec
        return None

    def get_code(self, fullname):  # of the module that `python -m` runs
        return importlib.util.find_spec(fullname).loader_state.get_code(fullname)

    def create_module(self, spec):
        return spec.loader_state.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        spec.loader = module.__loader__ = spec.loader_state
        spec.loader.exec_module(module)
        loading = [
            name
            for name, other in list(sys.modules.items())
            if name.startswith(("transformers.", "agevlm.")) and other is not module and _is_loading(other)
        ]
        if self in sys.meta_path and _AUTO_CONFIG in sys.modules and not loading:
            sys.meta_path.remove(self)
            register()


def register_when_transformers_loads() -> None:
    if _AUTO_CONFIG in sys.modules and not _is_loading(sys.modules[_AUTO_CONFIG]):
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
