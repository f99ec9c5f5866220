"""A checkpoint gives back every bit, or says which file or parameter is at fault."""

import asyncio
import dataclasses
import errno
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny import full_disk

from jaxcompute import checkpoint
from jaxcompute.checkpoint import Damaged, Saver
from jaxcompute.core import State
from jaxcompute.errors import BadInput


def make_state(step: int = 0, size: int = 8, kernel=None, key=None) -> State:
    kernel = jnp.arange(size * 4, dtype=jnp.float32).reshape(size, 4) + step if kernel is None else kernel
    params = {"Dense_0": {"kernel": kernel, "bias": jnp.full(4, jnp.nan, jnp.bfloat16)}}
    return State(
        step=jnp.int32(step),
        params=params,
        mutable={"batch_stats": {"mean": jnp.zeros(4), "seen": jnp.array(True)}},
        opt_state=optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params),  # holds EmptyState
        key=jax.random.key(7) if key is None else key,
    )


def like(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(directory: Path, *states: State, metrics=None, **policy) -> None:
    with Saver(directory, **policy) as saver:
        for state in states:
            saver.save(state, metrics)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_leaf_comes_back_in_every_bit(tmp_path):
    state = make_state(3, key=jax.random.key(7, impl="rbg"))
    save(tmp_path, state, metrics={"accuracy": 0.5, "loss": float("nan")})
    back = checkpoint.restore(tmp_path, 3, like(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (state, back)), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        if a is not state.key:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    assert jnp.array_equal(jax.random.bits(back.key, (4,)), jax.random.bits(state.key, (4,)))
    content = checkpoint.manifest(tmp_path, 3)
    assert content["digest"] == checkpoint.digest(state) == checkpoint.digest(back) != checkpoint.digest(make_state(4))
    assert content["metrics"] == {"accuracy": 0.5, "loss": None} and content["step"] == 3


def test_digest_tells_paths_shapes_and_dtypes_apart():
    states = [
        make_state(kernel=kernel)
        for kernel in (jnp.zeros((2, 4)), jnp.zeros((4, 2)), jnp.zeros((2, 4), jnp.int32), -jnp.zeros((2, 4)))
    ]
    states.append(dataclasses.replace(states[0], ema=states[0].params))
    renamed = states[0].params["Dense_0"]
    states.append(dataclasses.replace(states[0], params={"Dense_1": renamed}))
    assert len({checkpoint.digest(state) for state in states}) == len(states)


def test_float64_is_kept_or_refused(tmp_path):
    with jax.enable_x64(True):
        state = make_state(1, kernel=jnp.full((2, 2), 1 / 3, jnp.float64))
        shape = like(state)
        save(tmp_path, state)
        assert checkpoint.digest(checkpoint.restore(tmp_path, 1, shape)) == checkpoint.digest(state)
    with pytest.raises(BadInput, match=r"kernel is float64\[2,2\] there and float32\[2,2\] in this run"):
        checkpoint.restore(tmp_path, 1, shape)


def test_save_is_exact_while_training_goes_on_with_donation(tmp_path):
    def advance(state: State) -> State:
        params = jax.tree.map(lambda x: x * 1.5 + 1, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params)

    step, donating = jax.jit(advance), jax.jit(advance, donate_argnums=0)
    truth, state = make_state(size=50_000), make_state(size=50_000)
    digests = {}
    with Saver(tmp_path, keep_last=99) as saver:
        for _ in range(5):
            truth, state = step(truth), donating(state)
            digests[int(truth.step)] = checkpoint.digest(truth)
            saver.save(state)
            for _ in range(3):  # while it is written
                given, truth, state = state, step(truth), donating(state)
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))  # donated indeed
    assert checkpoint.digest(truth) == checkpoint.digest(state)
    assert {s: checkpoint.manifest(tmp_path, s)["digest"] for s in checkpoint.steps(tmp_path)} == digests
    back = checkpoint.restore(tmp_path, 1, like(state))
    again = donating(back)  # what was restored may be donated
    assert checkpoint.digest(again) == checkpoint.digest(step(step(make_state(size=50_000))))


@pytest.mark.parametrize("to", [PartitionSpec(), PartitionSpec("data")])
@pytest.mark.parametrize("at", [PartitionSpec(), PartitionSpec("data")])
def test_restores_onto_another_mesh(tmp_path, at, to):
    devices = jax.devices()
    assert len(devices) >= 4

    def placed(state: State, count: int, spec: PartitionSpec) -> State:
        mesh = Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))
        whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.device_put(x, cut if x.ndim == 2 else whole), state)

    state, target = placed(make_state(1), 4, at), placed(make_state(0), 2, to)
    save(tmp_path, state)
    back = checkpoint.restore(tmp_path, 1, like(target))
    assert checkpoint.digest(back) == checkpoint.digest(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(target), strict=True):
        assert a.sharding == b.sharding


def test_a_part_alone_is_restored_and_is_as_strict(tmp_path):
    state = make_state(1)
    save(tmp_path, state)
    back = checkpoint.restore(tmp_path, 1, like(make_state(0)).params, part="params")
    assert checkpoint.digest(back) == checkpoint.digest(state.params)
    for change, named in (
        (dict(size=9), r"params/Dense_0/kernel is float32\[8,4\] there and float32\[9,4\] in this run"),
        (dict(kernel=jnp.zeros((8, 4), jnp.int32)), "params/Dense_0/kernel is float32.* int32"),
    ):
        with pytest.raises(BadInput, match=named):
            checkpoint.restore(tmp_path, 1, like(make_state(0, **change)).params, part="params")
    with pytest.raises(BadInput, match="ema/params/Dense_0/bias is absent there"):
        checkpoint.restore(tmp_path, 1, like(make_state(0)).params, part="ema/params")
    with pytest.raises(BadInput, match=r"params/Dense_0/kernel is float32.* there and absent"):
        lacking = {"Dense_0": {"bias": like(make_state(0)).params["Dense_0"]["bias"]}}
        checkpoint.restore(tmp_path, 1, lacking, part="params")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(size=9), r"params/Dense_0/kernel is float32\[8,4\] there and float32\[9,4\] in this run \(and 2 more\)"),
        (dict(kernel=jnp.zeros((8, 4), jnp.int32)), r"kernel is float32\[8,4\] there and int32\[8,4\] in this run"),
        (dict(key=jax.random.key(0, impl="rbg")), r"key is key<fry>\[\] there and key<rbg>\[\] in this run;"),
    ],
)
def test_nothing_is_cast_padded_or_dropped(tmp_path, change, line):
    save(tmp_path, make_state(1))
    with pytest.raises(BadInput, match=line) as error:
        checkpoint.restore_newest(tmp_path, like(make_state(**change)), pytest.fail)
    assert not isinstance(error.value, Damaged) and "\n" not in str(error.value)


def test_parameters_more_or_fewer_are_named(tmp_path):
    plain = make_state(1)
    averaged = dataclasses.replace(plain, ema=plain.params)
    for number, (saved, wanted, line) in enumerate(
        [
            (plain, averaged, r"ema/Dense_0/bias is absent there and bfloat16\[4\] in this run \(and 1 more\)"),
            (averaged, plain, r"ema/Dense_0/bias is bfloat16\[4\] there and absent in this run \(and 1 more\)"),
        ]
    ):
        save(tmp_path / str(number), saved)
        with pytest.raises(BadInput, match=line):
            checkpoint.restore(tmp_path / str(number), 1, like(wanted))
    with pytest.raises(BadInput, match=r"no checkpoint of step 2 in .*; there are: 1"):
        checkpoint.restore(tmp_path / "0", 2, like(plain))


def test_the_last_and_the_best_are_kept_by_two_rules(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: float("inf"), 6: 0.1}
    with Saver(tmp_path, keep_last=2, keep_best=1) as saver:
        for step, score in scores.items():
            saver.save(make_state(step), {"accuracy": score})
        saver.save(make_state(7))
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    assert checkpoint.best(tmp_path) == 3
    assert checkpoint.best(tmp_path, ("accuracy", "min")) == 6
    assert checkpoint.best(tmp_path, ("loss", "min")) is None
    save(tmp_path, make_state(8), keep_last=0, keep_best=0)
    assert checkpoint.steps(tmp_path) == [8]
    assert [path.name for path in tmp_path.iterdir()] == ["8"]


def test_what_a_kill_leaves_behind_is_not_listed_and_goes(tmp_path):
    save(tmp_path, make_state(1))
    for name in (".tmp-2-77", ".trash-1", "3", "notes", "007"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    (tmp_path / "3" / "manifest.json").unlink()  # someone else's half copy: neither listed nor ours to delete
    assert checkpoint.steps(tmp_path) == [1]
    save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "notes", "007"}
    assert checkpoint.steps(tmp_path / "absent") == []


def test_a_kill_between_the_old_and_the_new_of_one_step_loses_neither(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def rename(source, to, real=os.rename):
        if Path(to) == tmp_path / "1" and ".tmp-" in Path(source).name:
            raise Killed
        real(source, to)

    save(tmp_path, make_state(1))
    digest = checkpoint.manifest(tmp_path, 1)["digest"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", rename)
        save(tmp_path, make_state(1))
    assert checkpoint.steps(tmp_path) == []
    checkpoint.clean(tmp_path)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.manifest(tmp_path, 1)["digest"] == digest
    save(tmp_path, make_state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_flipped_bit_or_a_cut_in_any_file_is_named_and_passed_over(tmp_path):
    save(tmp_path, make_state(1), make_state(2))
    shape, said = like(make_state()), []
    rng = np.random.default_rng(0)
    folder = tmp_path / "2"
    assert len(files(folder)) > 5
    for path in files(folder):
        whole = path.read_bytes()
        bit = int(rng.integers(len(whole) * 8))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        for damaged in (bytes(flipped), whole[:-1], b"", whole + b" ", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            named = f"checkpoint {folder} is damaged: {path.relative_to(folder)}: "
            with pytest.raises(Damaged, match=f"^{named}"):
                checkpoint.restore(tmp_path, 2, shape)
            said.clear()
            step, state = checkpoint.restore_newest(tmp_path, shape, said.append) or pytest.fail("nothing restored")
            assert step == 1 and checkpoint.digest(state) == checkpoint.digest(make_state(1))
            assert said[0].startswith(named) and said[1:] == [f"using checkpoint {tmp_path / '1'} instead"]
            path.write_bytes(whole)
    assert (checkpoint.restore_newest(tmp_path, shape, pytest.fail) or [None])[0] == 2


def test_every_bit_of_a_manifest_counts(tmp_path):
    save(tmp_path, make_state(1), metrics={"accuracy": 0.5})
    path = tmp_path / "1" / "manifest.json"
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 101):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            checkpoint.manifest(tmp_path, 1)
    assert checkpoint.best(tmp_path) is None
    path.write_bytes(whole)
    (tmp_path / "1").rename(tmp_path / "2")
    with pytest.raises(Damaged, match=r"manifest\.json"):
        checkpoint.manifest(tmp_path, 2)


def test_a_manifest_that_cannot_be_read_is_damage_and_ends_no_run(tmp_path):
    save(tmp_path, make_state(1), metrics={"accuracy": 0.5})
    (tmp_path / "1" / "manifest.json").unlink()
    (tmp_path / "1" / "manifest.json").mkdir()  # as of a file system that is ill: an OSError, but not of a missing file
    with pytest.raises(Damaged, match=r"manifest\.json: Is a directory"):
        checkpoint.manifest(tmp_path, 1)
    save(tmp_path, make_state(2), metrics={"accuracy": 0.4})  # which ranks and prunes
    assert (checkpoint.restore_best(tmp_path, like(make_state()), ("accuracy", "max"), print) or [None])[0] == 2


def test_arrays_read_otherwise_than_saved_are_refused(tmp_path):
    save(tmp_path / "a", make_state(1))
    save(tmp_path / "b", make_state(1, kernel=jnp.zeros((8, 4))))
    folder = tmp_path / "a" / "1"
    shutil.rmtree(folder / "state")
    shutil.copytree(tmp_path / "b" / "1" / "state", folder / "state")
    content = checkpoint.manifest(tmp_path / "a", 1)
    content["files"] = checkpoint.manifest(tmp_path / "b", 1)["files"]  # every file is in order
    (folder / "manifest.json").write_bytes(checkpoint._sealed(content))
    with pytest.raises(Damaged, match="state: gives other arrays than were saved"):
        checkpoint.restore(tmp_path / "a", 1, like(make_state()))


def test_restores_where_an_event_loop_runs_as_in_a_notebook(tmp_path):
    save(tmp_path, make_state(1))

    async def cell() -> State:
        return checkpoint.restore(tmp_path, 1, like(make_state()))

    assert checkpoint.digest(asyncio.run(cell())) == checkpoint.digest(make_state(1))


def test_nothing_whole_is_an_error_and_nothing_saved_is_none(tmp_path):
    shape, said = like(make_state()), []
    assert checkpoint.restore_newest(tmp_path, shape, said.append) is None
    save(tmp_path, make_state(1))
    (tmp_path / "1" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(Damaged, match=r"no whole checkpoint .*manifest.ocdbt: No such file"):
        checkpoint.restore_newest(tmp_path, shape, said.append)
    assert not said  # all is in the one line


def test_a_damaged_step_is_replaced_when_the_run_passes_it(tmp_path):
    save(tmp_path, make_state(1), make_state(3), keep_last=2)
    (tmp_path / "3" / "state" / "manifest.ocdbt").write_bytes(b"")
    save(tmp_path, make_state(2), keep_last=1)  # 3 is newer by number only: 2 must stay
    assert checkpoint.steps(tmp_path) == [2, 3]
    save(tmp_path, make_state(3), keep_last=1)
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.restore(tmp_path, 3, like(make_state()))


@pytest.mark.parametrize("allowed", [0, 100, 2000])
def test_a_failed_save_is_told_and_leaves_the_rest(tmp_path, allowed, capfd):
    with Saver(tmp_path) as saver:
        saver.save(make_state(1))
        saver.wait()
        with full_disk(allowed):
            saver.save(make_state(2))
            with pytest.raises(OSError, match=f"step 2 was not saved in {tmp_path}; .*too large") as error:
                saver.save(make_state(3))
        assert "\n" not in str(error.value)
        assert checkpoint.steps(tmp_path) == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["1"]  # the failed one holds no space
        saver.save(make_state(3))  # the caller may go on
    assert checkpoint.steps(tmp_path) == [1, 3]
    for step in (1, 3):
        checkpoint.restore(tmp_path, step, like(make_state()))
    assert capfd.readouterr() == ("", "")


def test_leaving_the_block_waits_and_never_hides_a_lost_save(tmp_path):
    with pytest.raises(SystemExit), Saver(tmp_path) as saver:
        saver.save(make_state(1, size=10_000))
        sys.exit(0)
    assert checkpoint.steps(tmp_path) == [1]
    with full_disk(0):
        with pytest.raises(OSError, match="step 2 was not saved"), Saver(tmp_path) as saver:
            saver.save(make_state(2))
            sys.exit(0)
        with pytest.raises(ZeroDivisionError) as error, Saver(tmp_path) as saver:
            saver.save(make_state(2))
            _ = 1 / 0
    assert "step 2 was not saved" in error.value.__notes__[0]
    assert checkpoint.steps(tmp_path) == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_poll_tells_of_a_failure_without_waiting(tmp_path, monkeypatch):
    gate = threading.Event()

    def stuck(*args):
        assert gate.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    with Saver(tmp_path) as saver:
        saver.poll()
        monkeypatch.setattr(checkpoint, "_write", stuck)
        saver.save(make_state(1))
        saver.poll()  # still under way
        gate.set()
        assert saver._flight is not None
        saver._flight.exception(10)
        with pytest.raises(OSError, match="Input/output error"):
            saver.poll()
        saver.poll()  # told once


def test_a_directory_that_cannot_be_made_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), Saver(tmp_path / "file"):
        pytest.fail("entered")


def test_a_save_that_is_reported_is_on_the_disk(tmp_path, monkeypatch):
    folder = tmp_path / "1"
    done = []  # (what, path, when its bytes were last written)
    fsync, rename = os.fsync, os.rename

    def synced(handle):
        fsync(handle)
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_mtime_ns))

    def renamed(source, target):
        rename(source, target)
        done.append(("rename", str(target), 0))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    with Saver(tmp_path) as saver:
        done.clear()  # the folder's own
        saver.save(make_state(1))
        saver.wait()
        reported = list(done)
    at = reported.index(("rename", str(folder), 0))
    before = {path.partition("/.tmp-")[2].partition("/")[2]: when for what, path, when in reported[:at]}
    for path in [folder, *folder.rglob("*")]:  # every file and every folder's names, as they are now
        assert before[str(path.relative_to(folder)).removeprefix(".")] == path.stat().st_mtime_ns, path
    assert ("sync", str(tmp_path)) in [entry[:2] for entry in reported[at:]]  # and then the rename itself


def test_manifest_is_json_that_names_every_file(tmp_path):
    save(tmp_path, make_state(1))
    content = json.loads((tmp_path / "1" / "manifest.json").read_text())
    on_disk = {str(path.relative_to(tmp_path / "1")): path.stat().st_size for path in files(tmp_path / "1")}
    del on_disk["manifest.json"]
    assert {name: seal["bytes"] for name, seal in content["files"].items()} == on_disk
    assert {"jaxcompute", "jax", "orbax-checkpoint"} <= content["versions"].keys()
