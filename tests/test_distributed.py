"""Two processes train and prune as one does: with whole weights in each (DDP) and spread (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edgeprune
from edgeprune import machine
from edgeprune.provenance import read_provenance
from edgeprune.recovery import checkpoints
from tests import tiny, two_pruners, two_trainers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder in which two processes did everything."""
    folder = tmp_path_factory.mktemp("together")
    tiny.save("llama", folder / "dense")
    tiny.save("llama", folder / "teacher", seed=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.two_processes", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_two_processes_prune_and_train_as_one_does(together):
    dense = edgeprune.load(together / "dense")
    alone = two_pruners.interleave(together, "alone")
    wanted = edgeprune.load(together / "alone").state_dict()
    assert wanted["model.norm.weight"].sub(dense.model.norm.weight).norm() > 0
    for way in ("replicated", "sharded"):
        assert read_provenance(together / way)["layers"] == alone["layers"], way
        found = edgeprune.load(together / way).state_dict()
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), f"{way}: {name}"
        assert not (together / f"{way}-work").exists()


def test_two_processes_train_as_one_does(together):
    alone = two_trainers.train()
    assert len(alone) == 7
    found = json.loads((together / "losses.json").read_text())
    assert found.pop("kept in half precision")
    # the same kernels and the same norm: a bit of either, and all losses of 8 bits differ by 1e-3
    replicated, sharded = found.pop("in bfloat16")
    assert sharded == pytest.approx(replicated, abs=1e-6)
    assert "cannot be shared by 2 processes" in found.pop("refused")
    data = two_trainers.recorded(together)
    taught = two_trainers.train(settings=two_trainers.RECORDED, data=data)
    for way in ("replicated, recorded", "sharded, recorded"):
        assert found.pop(way) == pytest.approx(taught, abs=1e-3), way
    assert set(found) == {"replicated", "sharded"}
    for way, losses in found.items():
        assert losses == pytest.approx(alone, abs=1e-3), way
    # what was spread is whole in its checkpoint: one process goes on from it
    last = checkpoints.all_of(together / "kept")
    assert [path.name for path in last] == ["step-00000003", "step-00000006"]
    last[1].rename(together / "aside")
    assert two_trainers.train(folder=together / "kept") == pytest.approx(alone[3:], abs=1e-3)
