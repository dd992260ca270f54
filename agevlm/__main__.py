# SPDX-License-Identifier: Apache-2.0
"""`python -m agevlm` is the command `agevlm`, for launchers that start modules."""

from .cli import main

main()
