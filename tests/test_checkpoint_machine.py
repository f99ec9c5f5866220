"""Saves, kills, a full disk, damage, pruning and restarts in any order: what is listed comes back in every bit, or is
named as damaged."""

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxcompute import checkpoint
from jaxcompute.checkpoint import Damaged, Saver
from jaxcompute.core import State

BASE = State(step=jnp.int32(0), params={"kernel": jnp.zeros(6)}, mutable={}, opt_state=(), key=jax.random.key(0))
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), BASE)


def state_at(step: int) -> State:
    return dataclasses.replace(BASE, step=jnp.int32(step), params={"kernel": jnp.full(6, step, jnp.float32)})


HOW = ["flip", "cut", "add", "delete"]


class Killed(BaseException):
    """No `except Exception` mends anything after it, as after kill -9."""


@contextlib.contextmanager
def killed_after(calls: int) -> Iterator[None]:
    """The process dies at one of its renames, syncs and deletions, and does none of those that follow."""
    left = calls

    def alive() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def rename(*paths: Any) -> None:
        alive()
        os.rename(*paths)
        alive()

    def fsync(handle: int) -> None:
        alive()
        os.fsync(handle)

    def rmtree(path: Any, ignore_errors: bool = False) -> None:
        for file in sorted(path.rglob("*"), reverse=True):  # the manifest last: half deleted, it would still be listed
            alive()
            if file.is_file():
                file.unlink()
        shutil.rmtree(path, ignore_errors)

    disk = SimpleNamespace(**vars(os) | {"rename": rename, "fsync": fsync})
    trees = SimpleNamespace(**vars(shutil) | {"rmtree": rmtree})
    with mock.patch.object(checkpoint, "os", disk), mock.patch.object(checkpoint, "shutil", trees):
        yield


class Checkpoints(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp()) / "checkpoints"
        self.at = 0
        self.scores: dict[int, float] = {}  # of each step ever saved
        self.damaged: set[int] = set()
        self.unranked: set[int] = set()  # their manifest is what is damaged

    def teardown(self) -> None:
        shutil.rmtree(self.directory.parent)

    @initialize(last=st.integers(1, 3), best=st.integers(0, 2))
    def policy(self, last: int, best: int) -> None:
        self.last, self.best = last, best

    def save(self, score: float) -> None:
        with Saver(self.directory, self.last, self.best) as saver:
            saver.save(state_at(self.at), {"accuracy": score})

    def kept(self, known: set[int]) -> set[int]:
        """The newest and the best of what this run has passed, and whatever lies ahead of it."""
        passed = sorted(step for step in known if step <= self.at)
        ranked = [step for step in passed if math.isfinite(self.scores[step]) and step not in self.unranked]
        ranked.sort(key=lambda step: (self.scores[step], step))
        return {*passed[-self.last :], *ranked[len(ranked) - self.best :], *(known - set(passed))}

    def listed(self) -> set[int]:
        return set(checkpoint.steps(self.directory))

    def once_saved(self) -> set[int]:
        """With those that have lost their manifest."""
        return {int(state.parent.name) for state in self.directory.glob("[0-9]*/state")} | self.listed()

    def committed(self, score: float) -> None:
        self.scores[self.at] = score
        self.damaged.discard(self.at)
        self.unranked.discard(self.at)

    def comes_back(self, step: int) -> bool:
        try:
            return checkpoint.digest(checkpoint.restore(self.directory, step, LIKE)) == checkpoint.digest(
                state_at(step)
            )
        except Damaged as error:
            assert f"{self.directory / str(step)} is damaged" in str(error)
            return False

    @rule(score=st.sampled_from([0.1, 0.5, 0.9, math.nan]))
    def save_and_prune(self, score: float) -> None:
        before = self.listed()
        self.at += 1
        self.save(score)
        self.committed(score)
        assert self.listed() == self.kept(before | {self.at})
        assert not list(self.directory.glob(".*"))

    @rule(score=st.sampled_from([0.1, 0.9]), calls=st.integers(0, 45))
    def kill_and_restart(self, score: float, calls: int) -> None:
        before, old = self.listed(), (set(self.damaged), set(self.unranked))
        self.at += 1
        with killed_after(calls), contextlib.suppress(Killed):
            self.save(score)
        if self.at in self.listed() and self.comes_back(self.at):
            self.committed(score)
            assert self.kept(before | {self.at}) <= self.listed() <= before | {self.at}
        else:
            assert before - {self.at} <= self.listed() <= before  # what was damaged there may be gone
            assert old == (self.damaged, self.unranked)
        self.restart()

    @rule()
    def full_disk(self) -> None:
        before = self.listed()
        self.at += 1
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with mock.patch.object(checkpoint.shutil, "disk_usage", full), pytest.raises(OSError, match="was not saved"):
            self.save(0.9)
        self.at -= 1
        assert self.listed() == before

    @precondition(lambda self: self.listed() - self.damaged)
    @rule(pick=st.integers(0, 999), place=st.floats(0, 0.999), bit=st.integers(0, 7), how=st.sampled_from(HOW))
    def damage(self, pick: int, place: float, bit: int, how: str) -> None:
        sound = sorted(self.listed() - self.damaged)
        step = sound[pick % len(sound)]
        files = sorted(path for path in (self.directory / str(step)).rglob("*") if path.is_file())
        file = files[pick // 3 % len(files)]  # Orbax names some of them at random, and not always as many
        content = bytearray(file.read_bytes())
        at = int(place * len(content))
        flipped = content.copy()
        flipped[at] ^= 1 << bit
        if how == "delete":
            file.unlink()
        else:
            file.write_bytes({"flip": flipped, "cut": content[:at], "add": content + b"\n"}[how])
        self.damaged.add(step)
        if file.name == "manifest.json" and file.parent.name == str(step):
            self.unranked.add(step)

    @rule()
    def restart(self) -> None:
        said: list[str] = []
        whole = self.listed() - self.damaged
        try:
            found = checkpoint.restore_newest(self.directory, LIKE, said.append)
        except Damaged as error:
            assert self.once_saved() and not whole and "\n" not in str(error)
            self.at = 0
            return
        if found is None:
            assert not self.once_saved()
            self.at = 0
            return
        self.at, state = found
        assert self.at == max(whole)
        assert checkpoint.digest(state) == checkpoint.digest(state_at(self.at))
        newer = {step for step in self.once_saved() if step > self.at}
        assert len(said) == len(newer) + bool(newer)
        assert all(any(f"{self.directory / str(step)} is damaged" in line for line in said) for step in newer)

    @invariant()
    def what_is_listed_comes_back_or_is_named(self) -> None:
        assert self.listed() <= set(self.scores)
        for step in self.listed():
            assert self.comes_back(step) == (step not in self.damaged)


Checkpoints.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=12,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
test_checkpoints_in_any_order = Checkpoints.TestCase
