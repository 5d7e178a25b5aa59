"""One process of several, for ``test_distributed.py``; started by torchrun, which takes a while, once for all.

Usage: two_processes.py FOLDER.
"""

import sys
from pathlib import Path

from tests import two_pruners, two_trainers

if __name__ == "__main__":
    two_pruners.main(Path(sys.argv[1]))
    two_trainers.main(Path(sys.argv[1]))
