"""Runs one function of a module that was sent as text, and writes its answer as one marked line.

What a login script or a child process writes beside that does no harm.
"""

from __future__ import annotations

import errno
import json
import sys
import types


def call(mark: str) -> None:
    """Read a call as JSON from stdin, make it, and write ``mark`` and the answer on a line of stdout.

    The answer is {"result": value} or {"error": message, "kind": "input", "full", "os" or "bug"}.
    """
    wanted = json.loads(sys.stdin.read())
    try:
        answer = json.dumps({"result": _result(**wanted)})
    except Exception as error:  # told to the caller, whatever it is
        answer = json.dumps({"error": str(error) or type(error).__name__, "kind": _kind(error)})
    sys.stdout.write(f"\n{mark}{answer}\n")
    sys.stdout.flush()


def _result(name: str, source: str, function: str, arguments: dict[str, object]) -> object:
    module = types.ModuleType(name)
    sys.modules[name] = module  # where dataclasses look their annotations up
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return getattr(module, function)(**arguments)


def _kind(error: Exception) -> str:
    if type(error) is ValueError:  # those of the library that derive from it are bugs
        return "input"
    if isinstance(error, OSError):
        return "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "os"
    return "bug"
