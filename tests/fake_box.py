"""Both ends of a run on a box, with stages that cost nothing: what ``test_box.py`` cuts, kills and stops.

    fake_box.py FOLDER [--detached]         the run's worker here; the far Python is the file that $FAKE_PYTHON names
    fake_box.py -m edgeprune run ...        that far Python

There, stage ``second`` does what the file ``misdeed`` beside the run's folder says, as in ``fake_worker.py``.
"""

import json
import os
import sys
import time
from pathlib import Path

from edgeprune import run, worker
from edgeprune.__main__ import main
from edgeprune.errors import BadInput
from edgeprune.events import Note, Progress

NOTES = 40


def first(work):
    if os.environ.get("FAKE_REFUSAL"):
        raise BadInput(os.environ["FAKE_REFUSAL"])
    work.emit(Progress(stage="first", done=1, total=2, unit="things"))
    return {"source": {"name": "there", "path": "/nowhere"}}


def second(work):
    for number in range(NOTES):
        work.emit(Note(text=f"note {number}"))
    asked = work.folder.parent / "misdeed"
    deed = asked.read_text() if asked.exists() else ""
    if deed == "wait":
        while asked.exists():
            time.sleep(0.02)
    elif deed:
        import fake_worker

        (work.folder / "misdeed").write_text(deed)
        fake_worker.misbehave(work)
    for name in (worker.PRUNED, worker.EXPORT_DENSE, worker.EXPORT_PRUNED):
        with work.artefact(name) as folder:
            folder.mkdir()
            (folder / "weights.bin").write_bytes(name.encode() * 10_000)
    return {"value": 2}


def report(work):
    with work.artefact(worker.REPORT) as path:
        path.write_text("report")
    with work.artefact(worker.RESULTS) as path:
        path.write_text(json.dumps(work.results))
    return {}


STAGES = (
    worker.Stage("source", "First", first),
    worker.Stage("second", "Second", second),
    worker.Stage("profile", "Profile", lambda work: {"devices": {}}),
    worker.Stage("report", "Report", report, (worker.RESULTS, worker.REPORT)),
)

if __name__ == "__main__":
    worker.STAGES = STAGES
    if sys.argv[1] == "-m":
        run.WORKER = (sys.executable, __file__)
        sys.exit(main(sys.argv[3:]))
    from edgeprune.remote import environment

    environment.box = lambda link, emit: os.environ["FAKE_PYTHON"]
    sys.exit(worker.main(Path(sys.argv[1]), detached=worker.DETACHED in sys.argv))
