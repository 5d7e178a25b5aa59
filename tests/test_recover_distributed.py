"""Two processes that prune and train in turns make the model that one makes: whole weights in each, and spread ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import edgeprune
from edgeprune import machine
from edgeprune.provenance import read_provenance
from tests import tiny, two_pruners

ROOT = Path(__file__).resolve().parents[1]


def test_two_processes_prune_and_train_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
    dense = edgeprune.load(tiny.save("llama", tmp_path / "dense"))
    alone = two_pruners.interleave(tmp_path, "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.two_pruners", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    wanted = edgeprune.load(tmp_path / "alone").state_dict()
    assert wanted["model.norm.weight"].sub(dense.model.norm.weight).norm() > 0
    for way in ("replicated", "sharded"):
        assert read_provenance(tmp_path / way)["layers"] == alone["layers"], way
        found = edgeprune.load(tmp_path / way).state_dict()
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), f"{way}: {name}"
        assert not (tmp_path / f"{way}-work").exists()
