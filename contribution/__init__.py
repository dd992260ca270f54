# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM inside Transformers' own source tree: what a pull request would hold, and the common tests run there.

`python -m contribution` (or `make contribution`) does both.
"""
