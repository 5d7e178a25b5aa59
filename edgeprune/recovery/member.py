"""One of several processes that prune and train together for a run; see ``processes``.

Usage: python -m edgeprune.recovery.member FOLDER OUTPUT
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from edgeprune import recipe, worker
from edgeprune.errors import EdgepruneError
from edgeprune.events import ignore
from edgeprune.log import LogWriter
from edgeprune.recovery import processes


def main(folder: Path, output: Path) -> int:
    """Do this process's part; the first tells what happens in the run's log."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    finished = worker.read_state(folder)
    results = {name: entry["result"] for name, entry in finished.items()}
    first = os.environ["RANK"] == "0"
    with LogWriter(folder / worker.EVENTS) as log:
        emit = worker.within("prune", log) if first else ignore
        work = worker.Work(folder, recipe.load(folder / worker.RECIPE), results, emit)
        try:
            worker.prune_and_recover(work, output)
        except EdgepruneError as error:
            processes.tell_failure(folder, error)
            return error.exit_code
    return 0


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(worker.INTERRUPTED)  # checkpoints are whole or not there


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
