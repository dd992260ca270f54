# SPDX-License-Identifier: Apache-2.0
"""A model that many people use at once: server, chat and app."""
