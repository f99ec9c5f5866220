"""The benchmarks beside peers: they compute the same, take turns, and leave their figures; PyTorch where it is."""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loop, peers, side_by_side
from jaxcompute import train

ROOT = Path(__file__).parents[1]
WHOS = {"ours", "linen", *(["torch eager"] if peers.torch else [])}


def test_one_command_leaves_a_table_a_picture_and_json(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/side_by_side.py"), "--work=tiny", "--jobs=train,loop,2"]
    ended = subprocess.run(
        [*command, "--no-compile", "--rounds=2", "--seconds=0.01", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("side-by-side-*-float32-tiny-train+loop+2.json")
    timings = json.loads(file.read_text())["timings"]
    jobs = "train", "loop", "inference b2"
    assert {(t["job"], t["who"]) for t in timings} == set(itertools.product(jobs, WHOS))
    assert all(t["low"] <= t["ratio"] <= t["high"] for t in timings)
    assert all(t["ms"] > 0 and t["loss"] > 1 and 0 <= t["apart"] < 1e-5 for t in timings)
    assert file.with_suffix(".png").stat().st_size > 5_000


def options(**fields):
    return argparse.Namespace(**{"precision": "float32", "compile": False, "rounds": 1, "seconds": 0.01, **fields})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_peer_that_computes_something_else_ends_it(monkeypatch, precision):
    """Whatever precision is timed: in bfloat16 a percent would be rounding."""
    monkeypatch.setattr(train, "BROKEN_BFLOAT16", ())  # nothing is computed in it here
    checked = side_by_side.check(side_by_side.start("tiny", precision), pytest.fail)
    assert max(apart for _, apart in checked.values()) < 1e-5
    other = side_by_side.WORKS["tiny"]._replace(plain=lambda p: Wrong((8,)))
    monkeypatch.setitem(side_by_side.WORKS, "tiny", other)
    with pytest.raises(SystemExit, match="tiny: linen computes something else"):
        side_by_side.compare("tiny", options(precision=precision, jobs=""))


class Wrong(peers.MLP):
    def __call__(self, x, train=False):
        return 1.01 * super().__call__(x, train)


def test_a_peer_that_fails_is_left_out_and_what_is_timed_is_kept(monkeypatch, capsys):
    def refuse(*_):
        raise MemoryError("it is all\nspent")

    monkeypatch.setattr(peers, "linen_loop", refuse)
    kept = []
    jobs = "loop", "train"
    found = side_by_side.compare("tiny", options(jobs="loop,train"), keep=lambda timings: kept.append(list(timings)))
    wanted = set(itertools.product(jobs, WHOS)) - {("loop", "linen")}
    assert {(t.job, t.who) for t in found} == wanted
    assert kept == [[t for t in found if t.job == "loop"], found]
    assert "tiny, loop: linen is left out, as it fails: it is all spent" in capsys.readouterr().out

    monkeypatch.setattr(loop, "of_fit", refuse)
    with pytest.raises(MemoryError):
        side_by_side.compare("tiny", options(jobs="loop"))


def test_of_a_network_at_two_batch_sizes_one_is_inferred_with():
    found = side_by_side.plan(["mlp", "tiny", "resnet18", "resnet18_b256"], ["train", "loop", "32"])
    whole = ["train", "loop", "32"]
    assert found == {"mlp": whole, "tiny": whole, "resnet18": whole, "resnet18_b256": ["train"]}


@pytest.mark.parametrize("peer", ["linen", "torch"])
def test_a_peers_loop_learns(peer):
    if peer == "torch" and not peers.torch:
        pytest.skip("no PyTorch here")
    same = side_by_side.start("tiny", "float32")
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 4, 4, 1), np.uint8)  # of batches of 8 two an epoch
    label = (image[:, 0, 0, 0] > 127).astype(np.int32)
    if peer == "linen":
        step = peers.linen_step(same.model, np.float32, peers.normalized)
        losses = peers.linen_loop(step, image, label, 8, side_by_side.linen_state(same), same.mutable, 40)
    else:
        step = peers.torch_step(side_by_side.torch_net(same, "torch eager"), "float32")
        losses = peers.torch_loop(step, image, label, 8, 40)
    first, *_, last = itertools.islice(losses, 5)
    assert last < first / 2


def test_the_loops_cost_is_measured_beside_its_bare_call():
    found = loop.measure("digits_mlp", argparse.Namespace(steps=40, turns=1))
    assert (found.experiment, found.batch_size, found.steps_per_call) == ("digits_mlp", 128, 1)
    assert 0 < found.batch_ms < found.bare_ms
    assert 0.1 < found.share < 3
    assert found.cost_us == pytest.approx(1e3 * (found.loop_ms - found.bare_ms))
