# SPDX-License-Identifier: Apache-2.0
"""The attention of any image-text-to-text model of Transformers: see it and guide it, at the speed of SDPA."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
