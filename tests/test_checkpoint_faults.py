"""A real process that saves at every step is killed again and again; a real file system fills up; runs end badly.

`JAXCOMPUTE_KILLS=200 pytest tests/test_checkpoint_faults.py` for the long form.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxcompute import checkpoint, log
from jaxcompute.core import State

HERE = Path(__file__).parent
KILLS = int(os.environ.get("JAXCOMPUTE_KILLS", "4"))


def state_at(step: int) -> State:
    """What an unbroken run has at a step."""
    params = {f"Dense_{i}": {"kernel": jnp.full((32, 32), step + i, jnp.float32)} for i in range(4)}
    return State(
        step=jnp.int32(step),
        params=params,
        mutable={},
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
        key=jax.random.key(step),
    )


def live(directory: str) -> None:
    """One life: resume, then save at every step, and print each one that is on disk. Runs until it is killed."""
    newest = checkpoint.restore_newest(directory, jax.eval_shape(lambda: state_at(0)), sys.exit)
    step, state = newest or (0, state_at(0))
    if checkpoint.digest(state) != checkpoint.digest(state_at(step)):
        sys.exit("another State")
    with checkpoint.Saver(directory, keep_last=3, keep_best=1) as saver:
        while True:
            step += 1
            saver.save(state_at(step), {"accuracy": (step * 7919 % 100) / 100})
            saver.wait()
            print(step, flush=True)


def test_killed_anywhere_every_listed_step_restores_and_none_reported_is_lost(tmp_path):
    directory = tmp_path / "checkpoints"
    shape = jax.eval_shape(lambda: state_at(0))
    rng, reported = random.Random(0), 0
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(checkpoint.__file__).parents[1],
            env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        )
        assert child.stdout
        first = child.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        out, err = child.communicate()
        assert first and not err, err  # it lived, and nothing of Orbax reached the screen
        reported = max(reported, *map(int, (first + out).split()))
        listed = checkpoint.steps(directory)
        assert reported <= listed[-1] <= reported + 1
        for step in listed:
            assert checkpoint.digest(checkpoint.restore(directory, step, shape)) == checkpoint.digest(state_at(step))
    with checkpoint.Saver(directory):
        pass
    assert {path.name for path in directory.iterdir()} == set(map(str, checkpoint.steps(directory)))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB of its own; root may mount one, others skip, except in CI."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_then_read_only_then_well(small_disk, capfd):
    directory = small_disk / "checkpoints"
    shape = jax.eval_shape(lambda: state_at(0))
    with checkpoint.Saver(directory, keep_last=9) as saver:
        saver.save(state_at(1))
        saver.wait()
        for free in (0, 60_000, 1_000_000):
            space = os.statvfs(small_disk)
            (small_disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_bsize - free))
            saver.save(state_at(2))
            with pytest.raises(OSError, match=r"step 2 was not saved in .*No space left on device") as error:
                saver.wait()
            assert "\n" not in str(error.value)
            (small_disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        saver.save(state_at(2))
        with pytest.raises(OSError, match="Read-only file system"):
            saver.wait()
        assert checkpoint.steps(directory) == [1]  # and a run can be read, not only written
        assert checkpoint.digest(checkpoint.restore(directory, 1, shape)) == checkpoint.digest(state_at(1))
        with pytest.raises(OSError, match="Read-only file system"), checkpoint.Saver(small_disk / "other"):
            pytest.fail("entered")
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        saver.save(state_at(2))
    assert checkpoint.steps(directory) == [1, 2]
    assert capfd.readouterr() == ("", "")


def run(workdir: Path, **fields: object) -> subprocess.CompletedProcess[str]:
    """launch.py with faults/faulty.py, which ends one way or another."""
    fields = {"features": "64,64", "steps": 10**6, "eval_every": 10**6} | fields
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.run(
        [sys.executable, str(HERE / "faults/faulty.py"), "--experiment=faulty", f"--workdir={workdir}", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "JAX_PLATFORMS": "cpu"},
    )


def test_a_run_whose_disk_is_full_ends_within_a_save_period_and_says_why(tmp_path):
    ended = run(tmp_path, save_every=500, log_every=25, full_at=700)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.splitlines()[-1]
    failed = f"step 1000 was not saved in {tmp_path / 'checkpoints'}; older steps are as they were: "
    assert last.startswith(failed) and "to go on: " in last
    assert log.read_status(tmp_path)["state"] == "failed" and failed in log.read_status(tmp_path)["message"]
    assert 1000 <= max(log.read(tmp_path)) < 1500
    assert checkpoint.steps(tmp_path / "checkpoints") == [500]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["500"]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"by": "exit", "end_at": 7}, 1, "step 5 was not saved"),
        ({"by": "bad input", "end_at": 7}, 2, "the batch is damaged; step 5 was not saved"),
        (
            {"save_every": 2, "learning_rate": 1e30, "steps": 10},
            1,
            "step 3: .* not finite; step 2 was not saved.*--mode=replay",
        ),
    ],
    ids=["sys.exit", "bad input", "not finite"],
)
def test_no_way_out_hides_a_save_that_failed_under_way(fields, code, words, tmp_path):
    ended = run(tmp_path, **{"save_every": 5, "full_at": 1} | fields)
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert re.search(words, ended.stderr.splitlines()[-1]), ended.stderr
    assert re.search(words.removesuffix(".*--mode=replay"), log.read_status(tmp_path)["message"])
    assert not checkpoint.steps(tmp_path / "checkpoints")


def test_sys_exit_waits_for_the_save_under_way(tmp_path):
    ended = run(tmp_path, save_every=5, by="exit", end_at=7, slow=1.0)
    assert ended.returncode == 0, ended.stderr
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]


if __name__ == "__main__":
    live(sys.argv[1])
