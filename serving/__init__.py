# SPDX-License-Identifier: Apache-2.0
"""A model that many people use at once: server, chat and app."""

import lazy_loader

# `__init__.pyi` lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
