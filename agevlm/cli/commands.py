# SPDX-License-Identifier: Apache-2.0
"""All commands of `agevlm`. Each calls one public function; each of the other modules has a group of commands."""

from typing import Annotated

import typer

from .. import __version__
from . import app as app_command
from . import ask, build, data, eval, export, features, push, serve, train

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
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of whatever goes wrong, of your own mistakes too.")
    ] = False,
) -> None:
    pass


for command in (
    build.build,
    data.scenes,
    data.masks,
    features.features,
    train.train,
    push.push,
    ask.ask,
    ask.attention,
    eval.similarity,
    export.export,
    serve.serve,
    serve.chat,
    app_command.app,
    eval.calibrate,
):
    app.command()(command)

data_app = typer.Typer(help="Check, convert and prepare grounding data, and find its phrases.", no_args_is_help=True)
for data_command in (data.check, data.convert, data.phrases, data.prepare):
    data_app.command()(data_command)
app.add_typer(data_app, name="data")

eval_app = typer.Typer(help="Evaluate models on benchmarks.", no_args_is_help=True)
for name, eval_command in eval.COMMANDS.items():
    eval_app.command(name)(eval_command)
app.add_typer(eval_app, name="eval")
