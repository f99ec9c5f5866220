"""What fits: the forecast, the search, and an error of the runtime as the same line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxcompute import losses, metrics, sharding, step, train
from jaxcompute.compute import memory
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


def test_memory_spent_as_it_runs_is_the_same_line(tmp_path):
    def greedy(outputs, batch):
        scalar, counted = losses.cross_entropy()(outputs, batch)
        huge = jax.lax.stop_gradient(scalar) + jnp.zeros((2**20, 2**20, 1)) + jnp.arange(64.0)  # 281 TB
        return scalar, counted | {"huge": metrics.Mean.of(jnp.sort(jnp.sin(huge), axis=0)[5, 3, 2])}

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
