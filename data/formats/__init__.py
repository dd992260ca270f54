# SPDX-License-Identifier: Apache-2.0
"""Data sets in the files that their authors publish: one format a module, each a [`~agevlm.data.formats.source.Source`]."""
