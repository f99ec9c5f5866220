"""What fits: the forecast, the search, and an error of the runtime as the same line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from test_train import Drifting

from jaxcompute import distributed, losses, metrics, sharding, step, train
from jaxcompute.compute import memory
from jaxcompute.data import memory as data
from jaxcompute.errors import BadInput
from jaxcompute.models.mlp import MLP


def wide(**fields):
    """Activations outweigh all else."""
    return tiny.mlp(MLP((256, 256), 3), **({"batch_size": 256, "mesh_data": 1, "size": 600} | fields))


def program_of(exp):
    mesh = sharding.make_mesh(exp.config)
    return train.compile(train.resolve(exp, mesh), mesh)


def test_the_forecast_is_the_compiled_steps_own_account():
    program = program_of(wide())
    parts = program.memory()
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    assert parts["parameters"] == 4 * parameters
    assert parts["optimizer"] >= 4 * parameters  # momentum
    assert parts["data"] == (600 + 23) * (36 + 4)  # uint8 images, int32 labels
    compiled = program.steps(1).memory_analysis()
    both = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    assert sum(parts.values()) == pytest.approx(both + 23 * 40, rel=0.01)
    assert parts["activations and temporaries"] > 2 * 256 * 256 * 4


def test_batches_of_a_stream_lie_ahead_and_in_flight_too():
    exp = wide()
    parts = program_of(dataclasses.replace(exp, train=Drifting(exp.train, lambda batch: batch))).memory()
    assert parts["data"] == (1 + 2 * train.AHEAD) * 256 * 40 + 23 * 40
    assert parts["activations and temporaries"] == pytest.approx(
        program_of(exp).memory()["activations and temporaries"], rel=0.05
    )


def test_parameters_split_over_devices_count_once_a_device():
    whole, split = program_of(wide(mesh_data=1)), program_of(wide(mesh_data=1, mesh_fsdp=2))
    assert split.memory()["parameters"] < 0.6 * whole.memory()["parameters"]


def test_what_wont_fit_is_told_before_anything_is_left(tmp_path):
    said = []
    with pytest.raises(train.WontFit) as told:
        train.fit(wide(), tmp_path / "run", say=said.append, instruments=train.Instruments(free=10**6))
    assert isinstance(told.value, BadInput)
    line = str(told.value)
    for words in ("--config.batch_size=256 needs", "1 MB are free", "a smaller --config.batch_size"):
        assert words in line
    assert "accumulate" not in line  # which saves nothing on the CPU
    assert any("MB of 1 MB: parameters" in text for text in said)
    assert not (tmp_path / "run").exists()


def many_evaluated(**fields):
    """An evaluation needs 10 MB and more, a step less than 1."""
    return dataclasses.replace(wide(batch_size=8, **fields), eval=data.in_order(tiny.arrays(4096), 4096))


@pytest.mark.parametrize(
    ("exp", "free", "words"),
    [
        (many_evaluated(), 2_000_000, "an evaluation's batch of 4,096 needs .*: give Experiment.eval a smaller one"),
        (wide(), 10_000, r"the data, whole on each device, needs 24.9 kB a device, and 10 kB .*: stream it"),
    ],
    ids=["an evaluation", "the data"],
)
def test_what_needs_too_much_is_named_though_it_is_not_the_batch(exp, free, words, tmp_path):
    said = []
    with pytest.raises(train.WontFit, match=f"^{words}") as told:
        train.fit(exp, tmp_path / "run", say=said.append, instruments=train.Instruments(free=free))
    assert any("; an evaluation: " in text for text in said)
    assert memory.advice(exp, told.value) == str(told.value)  # no batch is looked for


def test_data_that_find_no_room_are_told_at_once(monkeypatch, tmp_path):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(sharding, "put", full)
    with pytest.raises(train.WontFit, match=r"^the data, whole on each device, needs 24.9 kB a device: stream it"):
        train.fit(wide(), tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()
    spent = train.OutOfMemory(wide(), sharding.make_mesh(wide().config), None, 10**6)
    assert memory.advice(wide(), spent) == str(spent)  # the search finds no room either


def test_the_largest_batch_that_fits_has_been_compiled():
    exp = wide()
    mesh = sharding.make_mesh(exp.config)
    free = memory.need(memory.with_batch(exp, 100, 1), mesh)
    fits = memory.largest_batch(exp, mesh, free)
    assert fits is not None and 95 <= fits <= 101
    assert memory.need(memory.with_batch(exp, fits, 1), mesh) <= free
    assert memory.largest_batch(exp, mesh, 1000) is None


@pytest.mark.parametrize("slope", [1.0, 1.3], ids=["a line", "bent"])
@pytest.mark.parametrize("fits", [1, 7, 100, 900, 1023])
def test_the_search_takes_few_compilations(fits, slope):
    asked = []

    def need(n: int) -> int:
        asked.append(n)
        return 5000 + int(100 * n**slope)

    found = memory.largest(need, 1024, need(fits))
    assert found is not None and 0.95 * fits <= found <= fits
    assert len(asked) - 1 <= 10, asked


def test_fit_memory_keeps_the_batch_by_accumulation(monkeypatch):
    with pytest.raises(BadInput, match="saves no memory on the cpu"):
        memory.fit(wide(), 10**6, print)
    monkeypatch.setattr(step, "UNROLLED", ())  # a real loop, as on a GPU
    exp, said = wide(batch_size=2048, size=4096), []
    mesh = sharding.make_mesh(exp.config)
    whole = memory.need(exp, mesh)
    assert memory.fit(exp, whole, said.append) is exp and not said
    free = int(0.6 * whole)
    fitted = memory.fit(exp, free, said.append)
    count = fitted.config.accumulate
    assert fitted.config.batch_size == fitted.train.batch_size == 2048
    assert count > 1 and memory.need(fitted, mesh) <= free
    assert memory.need(memory.with_batch(exp, 2048, count // 2), mesh) > free
    assert said == [f"micro-batches of {2048 // count:,}: --config.accumulate={count} keeps the batch of 2,048"]
    with pytest.raises(BadInput, match=r"one example a device needs .* and 1 kB are free"):
        memory.fit(exp, 1000, print)
    with pytest.raises(BadInput, match="--memory_limit=BYTES"):
        memory.fit(exp, None, print)  # the CPU doesn't tell


def test_devices_that_split_parameters_alone_leave_the_batch_whole(monkeypatch):
    monkeypatch.setattr(memory, "need", lambda exp, mesh: exp.config.batch_size // exp.config.accumulate)
    monkeypatch.setattr(step, "UNROLLED", ())
    exp = wide(batch_size=6, mesh_data=2, mesh_model=2)
    assert memory.fit(exp, 2, lambda text: None).config.accumulate == 3
    assert memory.largest_batch(exp, sharding.make_mesh(exp.config), 5) == 4


@pytest.mark.parametrize("fit_with", [None, 1000, 3])
def test_all_processes_take_the_program_that_fits_the_one_with_least(fit_with, monkeypatch):
    monkeypatch.setattr(memory, "need", lambda exp, mesh: exp.config.batch_size // exp.config.accumulate)
    monkeypatch.setattr(step, "UNROLLED", ())
    monkeypatch.setattr(train, "free_memory", lambda mesh: 6)
    other = iter(["2", *["0"] * 9])  # has less memory
    monkeypatch.setattr(distributed, "each", lambda text: [text, next(other)])
    assert memory.fit(wide(batch_size=6), fit_with, lambda text: None).config.accumulate == 3


def spent(scalar):
    """A number that takes 281 TB."""
    huge = jax.lax.stop_gradient(scalar) + jnp.zeros((2**20, 2**20, 1)) + jnp.arange(64.0)
    return metrics.Mean.of(jnp.sort(jnp.sin(huge), axis=0)[5, 3, 2])


def greedy(outputs, batch):
    scalar, counted = losses.cross_entropy()(outputs, batch)
    return scalar, counted | {"huge": spent(scalar)}


def test_memory_spent_by_an_evaluation_is_not_the_training_batchs(tmp_path):
    def measure(outputs, batch):
        return metrics.classification(outputs, batch) | {"huge": spent(outputs.sum())}

    with pytest.raises(train.OutOfMemory, match=r"^an evaluation's batch of 8 does not fit: give Experiment.eval"):
        train.fit(dataclasses.replace(tiny.mlp(mesh_data=1), measure=measure), tmp_path, say=lambda text: None)


def test_what_a_failed_run_held_is_gone_when_a_batch_is_looked_for(monkeypatch):
    exp, live = dataclasses.replace(tiny.mlp(mesh_data=1), loss=greedy), []
    monkeypatch.setattr(memory, "largest_batch", lambda *args: live.extend(jax.live_arrays()))
    before = {id(array) for array in jax.live_arrays()}
    try:
        train.fit(exp, say=lambda text: None)
    except train.OutOfMemory as error:
        error.free = 10**6
        memory.advice(exp, error.with_traceback(None))
        assert error.need is None  # it ran
    assert {id(array) for array in live} <= before


def test_memory_spent_as_it_runs_is_the_same_line(tmp_path):
    with pytest.raises(train.OutOfMemory, match=r"--config\.batch_size=8 does not fit: take a smaller") as told:
        train.fit(dataclasses.replace(tiny.mlp(mesh_data=1), loss=greedy), tmp_path, say=lambda text: None)
    assert not isinstance(told.value, BadInput)  # it has run
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_launch_names_the_largest_batch(launcher, tmp_path):
    flags = ["--experiment=digits_mlp", "--config.batch_size=512", "--memory_limit=1000000", "--workdir=run"]
    ended = launcher(*flags, cwd=tmp_path)
    assert ended.code == 2, ended.err
    last = ended.err.strip().splitlines()[-1]
    assert "--config.batch_size=512 needs" in last and "the largest that fits is --config.batch_size=1" in last
    assert not (tmp_path / "run").exists()
