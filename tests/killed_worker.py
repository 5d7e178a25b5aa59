"""A run's real worker that is killed by SIGKILL at a given moment, for ``test_run.py``.

Usage: killed_worker.py STAGE MOMENT FOLDER. MOMENT ``begun`` is the first thing that the stage
tells, ``iteration`` the second pruning iteration, ``unrecorded`` the stage's end, its artefacts in
place but its result not yet kept.
"""

import os
import signal
import sys
from pathlib import Path

from edgeprune import worker
from edgeprune.events import PruneIteration, StageStarted
from edgeprune.log import LogWriter

stage, moment, folder = sys.argv[1:]
stages = []


class DeadlyLog(LogWriter):
    def __call__(self, event):
        super().__call__(event)
        if isinstance(event, StageStarted):
            stages.append(event.stage)
        elif stages and stages[-1] == stage and is_it(event):
            die()


def is_it(event):
    if moment == "iteration":
        return isinstance(event, PruneIteration) and event.iteration == 2
    return moment == "begun"


def write_state(folder, finished, write=worker.write_state):
    if moment == "unrecorded" and stage in finished:
        die()
    write(folder, finished)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


worker.LogWriter = DeadlyLog
worker.write_state = write_state

if __name__ == "__main__":
    sys.exit(worker.main(Path(folder)))
