"""A real process that saves at every step is killed again and again; a real file system fills up.

`JAXCOMPUTE_KILLS=200 pytest tests/test_checkpoint_faults.py` for the long form.
"""

import os
import random
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

from jaxcompute import checkpoint
from jaxcompute.core import State

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
    """A file system of 4 MiB of its own; root may mount one, others skip."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
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


if __name__ == "__main__":
    live(sys.argv[1])
