"""The mode as a user calls it, and that it would notice."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcompute import verify

ROOT = Path(__file__).parents[1]


def test_a_killed_run_is_shown_to_equal_the_unbroken_one():
    flags = ["--experiment=digits_mlp", "--config.features=16", "--config.steps=40", "--mode=verify_resume"]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *flags], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"^ *(\d+)  ([0-9a-f]{16})  ([0-9a-f]{16}) +(\d)  yes$", ended.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(5, 41, 5))
    assert all(one == other for _, one, other, _ in rows)
    assert int(rows[-1][3]) >= 1  # a kill came before the last
    assert "8 of 8 States equal in every bit, 0 metrics differ" in ended.stdout


def test_what_differs_is_named(tmp_path):
    runs = [tmp_path / "unbroken", tmp_path / "killed"]
    log = [
        {"step": 4, "time": 1.0, "train/loss": 0.5, "perf/step_ms": 1.0},
        {"step": 8, "time": 2.0, "train/loss": None},
    ]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"time": 9.0}) + "\n" for row in log))
    assert verify.differences(*runs) == []
    more = [log[0] | {"train/loss": 0.5000000000000001, "perf/step_ms": 2.0}, log[1], {"step": 8, "time": 0, "a": 1.0}]
    runs[1].joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*more, log[1]]))
    assert verify.differences(*runs) == [
        "step 8: train/loss stands 2 times",
        "step 4: train/loss is 0.5 in unbroken and 0.5000000000000001 in killed",
        "step 8: a is absent in unbroken and 1.0 in killed",
    ]


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ("max(checkpoint.steps(workdir / 'checkpoints'), default=0)", "time.time() % 1000", "0 of 8 States equal"),
        ("0", "0", "a run began anew, and the State of step "),
    ],
    ids=["another run each time", "always from the start"],
)
def test_a_run_that_does_not_resume_is_noticed(at, value, words, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where both runs are kept
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import jax, jax.numpy as jnp, time\n"
        "from jaxcompute import checkpoint\n"
        "from jaxcompute.core import State\n"
        "workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))\n"
        "def state(step, value): return State(jnp.int32(step), jnp.float32(value), {}, (), jax.random.key(0))\n"
        "with checkpoint.Saver(workdir / 'checkpoints', keep_last=99) as saver:\n"
        f"    at, value = {at}, {value}\n"
        "    print('resuming at step', at, 'of 8; compiled in 0 s', flush=True)\n"
        "    for step in range(at + 1, 9):\n"
        "        saver.save(state(step, value))\n"
        "        time.sleep(0.1)\n"
        "(workdir / 'metrics.jsonl').write_text('')\n"
    )
    said = []
    assert not verify.resume([sys.executable, str(program)], [], kills=2, say=said.append)
    assert any(words in line for line in said), said
