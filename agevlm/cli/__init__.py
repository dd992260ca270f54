# SPDX-License-Identifier: Apache-2.0
"""The command line, `agevlm`: `commands` has all commands, each of which calls one public function.

Nothing else is imported here, so that from the first moment an interrupt ends in a message.
"""

import io
import logging
import signal
import sys
from types import FrameType
from typing import NoReturn

WRONG_INPUT, UNEXPECTED, INTERRUPTED, TERMINATED = 2, 70, 130, 143
"""Exit codes, beside 0 and the 1 of `agevlm data check`, which has found bad rows."""

_INTERRUPTED = "agevlm: interrupted"


def main() -> None:
    """Entry point: whatever goes wrong ends in one message and an exit code, and never in a traceback without `--debug`."""
    # SIGTERM, which clusters send, ends the work as Ctrl-C does, so that what it has begun is removed.
    before = signal.signal(signal.SIGTERM, _terminate)
    for name in (
        "torch.utils._pytree",
        "bitsandbytes",
    ):  # they tell of torchao's own code, and of every layer of every pass
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from .commands import app

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A name or an answer that the terminal's encoding lacks must not end a command whose work is done.
                stream.reconfigure(errors="backslashreplace")
        app(prog_name="agevlm")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer has caught the interrupt
            print(_INTERRUPTED, file=sys.stderr)
        raise
    except BaseException as error:
        _end(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    print("agevlm: terminated", file=sys.stderr)
    sys.exit(TERMINATED)


def _end(error: BaseException) -> NoReturn:
    """Says what went wrong, and exits."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(link, KeyboardInterrupt) for link in chain):  # libraries make other errors of it
        print(_INTERRUPTED, file=sys.stderr)
        sys.exit(INTERRUPTED)

    # A module of torch that is not loaded cannot have raised the error.
    out_of_memory = (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError))
    message = str(error) or type(error).__name__
    if isinstance(error, out_of_memory):
        message = f"There is not enough memory: make the batches, the images or the model smaller. ({message})"
    expected = isinstance(error, (ValueError, OSError, ImportError, *out_of_memory))
    words = sys.argv[1:]
    if words[:1] == ["--debug"]:
        import traceback

        traceback.print_exception(error)
    if expected:
        print(f"agevlm: error: {message}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    print(
        f"agevlm: unexpected error: {type(error).__name__}: {message} (This is a fault of agevlm: please report it with "
        f"the traceback, which `agevlm --debug {next((word for word in words if word != '--debug'), '')} …` prints.)",
        file=sys.stderr,
    )
    sys.exit(UNEXPECTED)
