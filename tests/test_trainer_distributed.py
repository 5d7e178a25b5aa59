"""Two processes train as one does: with whole weights in each (DDP) and with spread ones (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgeprune import machine
from edgeprune.recovery import checkpoints
from tests import tiny, two_trainers

ROOT = Path(__file__).resolve().parents[1]


def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
    tiny.save("llama", tmp_path / "teacher", seed=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.two_trainers", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = two_trainers.train()
    assert len(alone) == 7
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found.pop("kept in half precision")
    data = two_trainers.recorded(tmp_path)
    taught = two_trainers.train(settings=two_trainers.RECORDED, data=data)
    for way in ("replicated, recorded", "sharded, recorded"):
        assert found.pop(way) == pytest.approx(taught, abs=1e-3), way
    assert set(found) == {"replicated", "sharded"}
    for way, losses in found.items():
        assert losses == pytest.approx(alone, abs=1e-3), way
    # what was spread is whole in its checkpoint: one process goes on from it
    last = checkpoints.all_of(tmp_path / "kept")
    assert [path.name for path in last] == ["step-00000003", "step-00000006"]
    last[1].rename(tmp_path / "aside")
    assert two_trainers.train(folder=tmp_path / "kept") == pytest.approx(alone[3:], abs=1e-3)
