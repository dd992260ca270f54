# SPDX-License-Identifier: Apache-2.0
"""The command line, `agevlm`. Each command calls one public function; each module has a group of commands."""

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from . import ask, build, data, eval, features, train

app = typer.Typer(
    help="AGE-VLM: vision-language models that are taught where to look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"agevlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (
    build.build,
    data.scenes,
    data.masks,
    features.features,
    train.train,
    ask.ask,
    ask.attention,
    eval.similarity,
):
    app.command()(command)

data_app = typer.Typer(help="Check and convert grounding data.", no_args_is_help=True)
for data_command in (data.check, data.convert):
    data_app.command()(data_command)
app.add_typer(data_app, name="data")

eval_app = typer.Typer(help="Evaluate models on benchmarks.", no_args_is_help=True)
for name, eval_command in eval.COMMANDS.items():
    eval_app.command(name)(eval_command)
app.add_typer(eval_app, name="eval")


def main() -> None:
    """Entry point: a user's mistake ends in a message and exit code 2, never in a traceback."""
    from huggingface_hub.errors import StrictDataclassError

    # What schedulers send: an exception, so that unfinished work is removed on the way out. 128 + 15 is what shells say of it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        Console(stderr=True).print(
            f"[red]agevlm: error:[/red] {type(error).__name__ if not str(error) else ''}", end=""
        )
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("agevlm: interrupted", file=sys.stderr)
        sys.exit(130)
