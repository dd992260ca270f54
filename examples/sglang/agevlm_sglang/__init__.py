# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM as an external package of SGLang: `model` and `processor` are what SGLang looks for. See ../README.md."""
