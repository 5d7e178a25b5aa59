"""Deaths of a run's real worker, for ``test_run.py``.

Usage: killed_worker.py STAGE MOMENT FOLDER, which is killed by SIGKILL at that moment: ``begun`` is the first thing
that the stage tells, ``iteration`` the second pruning iteration, ``unrecorded`` the stage's end, its artefacts in place
but its result not yet kept.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeprune import worker
from edgeprune.events import PruneIteration, StageStarted
from edgeprune.log import LogWriter


@dataclass
class Death:
    """``die`` is called at the moment, if all events and states come by here."""

    stage: str
    moment: str
    die: Callable[[], None]
    at: str = ""

    def hears(self, event):
        if isinstance(event, StageStarted):
            self.at = event.stage
        elif self.at == self.stage and self._is_it(event):
            self.die()

    def _is_it(self, event):
        if self.moment == "iteration":
            return isinstance(event, PruneIteration) and event.iteration == 2
        return self.moment == "begun"

    def writes(self, folder, finished, write=worker.write_state):
        if self.moment == "unrecorded" and self.stage in finished:
            self.die()
        write(folder, finished)


def main(stage: str, moment: str, folder: str) -> int:
    death = Death(stage, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))

    class DeadlyLog(LogWriter):
        def __call__(self, event):
            super().__call__(event)
            death.hears(event)

    worker.LogWriter = DeadlyLog
    worker.write_state = death.writes
    return worker.main(Path(folder))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
