# SPDX-License-Identifier: Apache-2.0
"""What is printed for people, as it is: a name such as `[/b]` or `:cat:` is no markup."""

import os

from rich.console import Console
from rich.text import Text


def console() -> Console:
    """A console that prints texts, also those in tables, as they are."""
    return Console(markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Prints a text, without line breaks of its own."""
    console().print(text, soft_wrap=True)


def say_saved(place: str | os.PathLike, what: str) -> None:
    """Prints where output is, and what it is."""
    console().print(Text.assemble(("Saved", "green"), f" {os.fspath(place)}: {what}"), soft_wrap=True)
