"""Several processes of this machine that prune and train together for a run, one for each GPU.

The worker of a run starts them and waits. Each is ``python -m edgeprune.recovery.member FOLDER OUTPUT`` with the
variables that torchrun sets, and ends when its standard input does: none outlives the worker, however that ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from edgeprune.errors import BadInput, EdgepruneError

MEMBER = (sys.executable, "-m", "edgeprune.recovery.member")
FAILED = "recovery-failed.json"
# Seconds between two looks at the processes, and those that the others have once one has failed.
INTERVAL, PATIENCE = 0.2, 10.0


def count(wanted: int | None) -> int:
    """Return how many processes train: as many as wanted, or one for each CUDA device."""
    import torch

    return wanted or max(1, torch.cuda.device_count())


def run(folder: Path, output: Path, number: int) -> None:
    """Let ``number`` processes do the recovery of the run in ``folder`` and write ``output``.

    Raises:
        BadInput, EdgepruneError: what the first of them that failed said, or how it ended.
    """
    (folder / FAILED).unlink(missing_ok=True)
    port = _free_port()
    members = [_start(folder, output, rank, number, port) for rank in range(number)]
    try:
        while (codes := [member.poll() for member in members]) != [0] * number:
            broken = next((rank for rank, code in enumerate(codes) if code), None)
            if broken is not None:
                _wait(members)
                raise _error(folder, broken, number, members[broken].returncode)
            time.sleep(INTERVAL)
    finally:
        for member in members:
            _end(member)


def _start(
    folder: Path, output: Path, rank: int, number: int, port: int
) -> subprocess.Popen[bytes]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // number)
    variables = {name: str(value) for name, value in (own | place).items()}
    return subprocess.Popen(
        [*MEMBER, str(folder), str(output)],
        stdin=subprocess.PIPE,
        env=os.environ | variables | {"OMP_NUM_THREADS": str(threads)},
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(members: list[subprocess.Popen[bytes]]) -> None:
    """Give the others time to say more than that one of them is gone."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(member.poll() is None for member in members):
        time.sleep(INTERVAL)


def _end(member: subprocess.Popen[bytes]) -> None:
    assert member.stdin is not None
    with suppress(BrokenPipeError):
        member.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        member.wait(PATIENCE)
    member.kill()
    member.wait()


def _error(folder: Path, rank: int, number: int, code: int) -> EdgepruneError:
    try:
        said = json.loads((folder / FAILED).read_text("utf-8"))
        (folder / FAILED).unlink()
    except (OSError, ValueError):
        return EdgepruneError(
            f"process {rank + 1} of the {number} that train ended with code {code}; "
            f"its last words are in {folder / 'worker.log'}"
        )
    kind = BadInput if said["exit_code"] == BadInput.exit_code else EdgepruneError
    return kind(said["error"])


def tell_failure(folder: Path, error: EdgepruneError) -> None:
    """Leave what went wrong for the worker; the first to say it counts."""
    text = json.dumps({"error": str(error), "exit_code": error.exit_code})
    own = folder / f"{FAILED}.{os.getpid()}"
    own.write_text(text, "utf-8")
    with suppress(FileExistsError):
        os.link(own, folder / FAILED)
    own.unlink()
