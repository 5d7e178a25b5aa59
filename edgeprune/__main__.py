"""``python -m edgeprune`` and the ``edgeprune`` command.

Runs one command line, and turns its end into an exit code and at most one clear line.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from edgeprune.errors import EdgepruneError, one_line

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "EDGEPRUNE_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return its exit code."""
    if not (sys.argv[1:] if arguments is None else arguments) and has_a_terminal():
        return _app()
    from edgeprune import console

    console.prepare()
    try:
        return _run(arguments)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error, but nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            console.traceback()
        message, code = _explain(error)
        console.error(message)
        return code


def _app() -> int:
    """Show the app at once, without the command line's imports."""
    from edgeprune.tui import app

    app.main()
    return DONE


def _run(arguments: Sequence[str] | None) -> int:
    import typer

    from edgeprune.cli import app

    try:
        code = app(args=arguments, prog_name="edgeprune", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:  # how typer reports Ctrl-C
        raise KeyboardInterrupt
    sys.stdout.flush()
    return code if isinstance(code, int) else DONE


def has_a_terminal() -> bool:
    """Tell whether there is a terminal to draw the app in, or textual-serve in its place."""
    if os.environ.get("TEXTUAL_DRIVER"):
        return True
    streams = (sys.stdin, sys.stdout, sys.stderr)  # Textual draws on the last
    return all(each.isatty() for each in streams) and os.environ.get("TERM") != "dumb"


def _explain(error: Exception) -> tuple[str, int]:
    """Return the lines to show for ``error``, and the exit code."""
    from typer import TyperException

    if isinstance(error, EdgepruneError):
        return str(error), error.exit_code
    if isinstance(error, TyperException):
        return _usage(error), BAD_INPUT
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f": {error.filename} could not be written" if error.filename else ""
        return f"the disk is full{where}; free some space, or name another disk with -o", BAD_INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; see `edgeprune inspect MODEL` for what it needs", FAILED
    return (
        f"unexpected {type(error).__name__}: {one_line(error)} "
        f"(this is a bug; {TRACEBACK}=1 before the command shows where)"
    ), FAILED


def _usage(error: Exception) -> str:
    """Return what is wrong with the command line and where its help is, in one line."""
    message = one_line(error) if not hasattr(error, "format_message") else error.format_message()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "edgeprune"
    return f"{' '.join(message.split()).rstrip('.')}; see: {command} --help"


if __name__ == "__main__":
    sys.exit(main())
