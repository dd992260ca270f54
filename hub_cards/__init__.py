# SPDX-License-Identifier: Apache-2.0
"""Cards of models and data sets, and pushing them to the Hub."""

import lazy_loader

# `__init__.pyi` lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
