# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM: attention-guided alignment in efficient vision-language models, for Hugging Face Transformers.

Importing this package imports no torch. Its classes load when they are first touched, and Transformers' Auto classes
learn of them as soon as Transformers' own auto modules are loaded, before or after.
"""

import lazy_loader

from ._auto import register_when_transformers_loads

__version__ = "0.1.0"

# `__init__.pyi` lists the public names; type checkers read it too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_transformers_loads()
