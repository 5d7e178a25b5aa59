"""A run's worker with stages that cost nothing: what ``test_run.py`` kills, stops and resumes.

Usage: fake_worker.py FOLDER. Stage ``second`` does what the file ``misdeed`` in the folder says.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

from edgeprune import worker
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Note


def first(work):
    with work.artefact("one") as path:
        path.write_text("one")
    return {"value": 1}


def second(work):
    with work.artefact("two") as path:
        path.write_text("half")
        misbehave(work)
        path.write_text("whole")
    return {"value": work.results["first"]["value"] + 1}


def misbehave(work):
    file = work.folder / "misdeed"
    deed = file.read_text() if file.exists() else ""
    work.emit(Note(text=f"second: {deed or 'as it should'}"))
    if deed == "hang":
        time.sleep(600)
    while deed == "wait" and not (work.folder / "go").exists():
        time.sleep(0.02)
    if deed == "hang stubbornly":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        time.sleep(600)
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "exit":
        print("a library's last words", flush=True)
        os._exit(3)
    errors = {
        "fail": EdgepruneError("it did not work"),
        "refuse": BadInput("it cannot be used"),
        "bug": KeyError("bug"),
        "fill the disk": OSError(errno.ENOSPC, "No space left on device"),
    }
    if deed in errors:
        raise errors[deed]


def last(work):
    with work.artefact(worker.RESULTS) as path:
        path.write_text(json.dumps(work.results))
    return {}


worker.STAGES = (
    worker.Stage("first", "First", first, ("one",)),
    worker.Stage("second", "Second", second, ("two",)),
    worker.Stage("last", "Last", last, (worker.RESULTS,)),
)

if __name__ == "__main__":
    sys.exit(worker.main(Path(sys.argv[1]), detached=worker.DETACHED in sys.argv))
