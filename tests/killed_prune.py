"""A streamed pruning that is killed by SIGKILL at the given layer pass, for ``test_resume.py``.

Usage: killed_prune.py PASS SOURCE OUTPUT STATE OPTIONS, with OPTIONS as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from edgeprune import machine, pruner, scratch
from edgeprune.events import Progress

number, source, output, state, options = sys.argv[1:]
torch.set_num_threads(1)
scratch.INTERVAL = 0.0
machine.compute_dtype = lambda *_: torch.float32


def die(event):
    if isinstance(event, Progress) and event.unit == "layer passes" and event.done == int(number):
        os.kill(os.getpid(), signal.SIGKILL)


pruner.prune(source, output, state=Path(state), emit=die, **json.loads(options))
