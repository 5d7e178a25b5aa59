"""Errors that a person reads. Every other exception is a bug and shows its traceback.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """The work failed for a reason that the message names, in one line; exit code 1."""

    exit_code = 1


class BadInput(EdgepruneError):
    """What the user gave cannot be used; nothing was changed; exit code 2."""

    exit_code = 2


class Interrupted(EdgepruneError):
    """The user stopped the work; what was done is kept; exit code 130."""

    exit_code = 130


class Left(KeyboardInterrupt):
    """The worker was interrupted, and its work goes on on another machine: the run has not ended."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the message of somebody else's exception as one line, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
