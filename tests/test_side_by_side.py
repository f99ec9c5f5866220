"""The benchmarks beside peers: they compute the same, take turns, and leave their figures; PyTorch where it is."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loop, peers, side_by_side

ROOT = Path(__file__).parents[1]


def test_one_command_leaves_a_table_a_picture_and_json(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/side_by_side.py"),
        "--work=tiny",
        "--jobs=train,2",
        "--no-compile",
    ]
    ended = subprocess.run(
        [*command, "--rounds=2", "--seconds=0.01", f"--out={tmp_path}"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("*.json")
    timings = json.loads(file.read_text())["timings"]
    whos = {"ours", "linen", *(["torch eager"] if peers.torch else [])}
    assert {(t["job"], t["who"]) for t in timings} == {(job, who) for job in ("train", "inference b2") for who in whos}
    assert all(t["low"] <= t["ratio"] <= t["high"] for t in timings)
    assert file.with_suffix(".png").stat().st_size > 5_000


def test_a_peer_that_computes_something_else_ends_it(monkeypatch):
    other = side_by_side.WORKS["tiny"]._replace(plain=lambda p: Wrong((8,)))
    monkeypatch.setitem(side_by_side.WORKS, "tiny", other)
    with pytest.raises(SystemExit, match="tiny: linen computes something else"):
        side_by_side.compare("tiny", argparse.Namespace(precision="float32", compile=False, jobs=""))


class Wrong(peers.MLP):
    def __call__(self, x, train=False):
        return 1.01 * super().__call__(x, train)


def test_the_loops_cost_is_measured_beside_its_bare_call():
    found = loop.measure("digits_mlp", argparse.Namespace(steps=40, turns=1))
    assert (found.experiment, found.batch_size) == ("digits_mlp", 128)
    assert 0 < found.batch_ms < found.bare_ms
    assert 0.1 < found.share < 3
