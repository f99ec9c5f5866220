import dataclasses
import os
import platform
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from experiments import digits_mlp, digits_shard_map
from jaxcompute import checkpoint, core, log, metrics, sharding, train
from jaxcompute.core import Run
from jaxcompute.errors import BadInput


def test_a_mesh_takes_all_devices_or_those_asked_for():
    assert dict(sharding.make_mesh(Run()).shape) == {"data": 4, "fsdp": 1, "model": 1}
    assert dict(sharding.make_mesh(Run(mesh_fsdp=2)).shape) == {"data": 2, "fsdp": 2, "model": 1}
    assert dict(sharding.make_mesh(Run(mesh_data=1, mesh_fsdp=-1)).shape) == {"data": 1, "fsdp": 4, "model": 1}
    assert dict(sharding.make_mesh(Run(mesh_data=3)).shape) == {"data": 3, "fsdp": 1, "model": 1}
    assert dict(sharding.make_mesh(Run(mesh_model=2)).shape) == {"data": 2, "fsdp": 1, "model": 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mesh_data": 8}, "mesh_data=8"),
        ({"mesh_data": 0}, "mesh_data=0"),
        ({"mesh_fsdp": -2}, "mesh_fsdp=-2"),
        ({"mesh_data": -1, "mesh_fsdp": -1}, "only one"),
        ({"mesh_data": -1, "mesh_fsdp": 5}, "needs 5 devices and there are 4; mesh_fsdp of 1, 2 or 4 would fit"),
        ({"mesh_data": -1, "mesh_model": 3}, "a multiple of 3 devices and there are 4; mesh_model of 1, 2 or 4 would"),
        ({"mesh_data": 3, "mesh_fsdp": 2}, "needs 6 .*; mesh_data of 1 or 2 would fit"),
        ({"mesh_data": 4, "mesh_fsdp": 2}, "needs 8 .*; mesh_data of 1 or 2, or mesh_fsdp of 1 would fit"),
        ({"mesh_data": -1, "mesh_fsdp": 3, "mesh_model": 2}, "needs 6 .*; mesh_fsdp of 1 or 2 would fit"),
        ({"mesh_data": -1, "mesh_fsdp": 3, "mesh_model": 3}, "needs 9 .*; sizes whose product divides 4 would fit"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(fields, named):
    with pytest.raises(BadInput, match=named) as caught:
        sharding.make_mesh(Run(**fields))
    assert "\n" not in str(caught.value)
    for name, sizes in re.findall(r"(mesh_\w+) of ([\d, or]*\d)", str(caught.value)):
        for size in re.findall(r"\d+", sizes):
            sharding.make_mesh(Run(**fields | {name: int(size)}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "jax has started its devices; set XLA_FLAGS=--xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=false", "XLA_FLAGS has --xla_gpu_deterministic_ops=false"),
    ],
)
def test_deterministic_too_late_or_against_the_environment_is_refused(flags, named, monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(BadInput, match=named) as caught:
        sharding.make_mesh(Run(deterministic=True))
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("XLA_FLAGS", f"{flags} {sharding.DETERMINISTIC}")
    assert sharding.make_mesh(Run(deterministic=True)).size == 4


FAULTS = """
import resource
import jax, jax.numpy as jnp
from jaxcompute import core, sharding
sharding.make_mesh(core.Run())
call = jax.jit(lambda x, y: (jnp.cos(x) @ y).sum())  # keeps the cosines, 80 MB, between two kernels
x, y = jnp.ones((4096, 5120)), jnp.ones((5120, 1))
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(x, y).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_steps_scratch_memory_is_not_faulted_in_again():
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    faults = [int(line) for line in run.stdout.split()]
    assert max(faults) > 80e6 / 4096 * 0.9  # there is such scratch memory
    assert sorted(faults)[20] < 100  # and once the heap has grown to hold it, nothing of it is new


def test_a_batch_that_does_not_split_is_named_with_one_that_does():
    mesh = sharding.make_mesh(Run())
    sharding.check_batch(mesh, Run(batch_size=24, accumulate=2))
    for wrong in (Run(batch_size=30), Run(batch_size=4, accumulate=2), Run(batch_size=0), Run(accumulate=0)):
        with pytest.raises(BadInput, match=f"batch_size={wrong.batch_size}"):
            sharding.check_batch(mesh, wrong)
    with pytest.raises(BadInput, match="such as 32"):
        sharding.check_batch(mesh, Run(batch_size=30, accumulate=2))


def test_fsdp_splits_the_longest_axis_that_divides_and_leaves_the_small_whole():
    mesh = sharding.make_mesh(Run(mesh_data=2, mesh_fsdp=2))
    rule = sharding.fsdp(min_size=100)

    def spec(*shape: int) -> P:
        return rule(("params",), jax.ShapeDtypeStruct(shape, jnp.float32), mesh)

    assert spec(3, 3, 16, 32) == P(None, None, None, "fsdp")
    assert spec(400, 120) == P("fsdp", None)
    assert spec(401, 120) == P(None, "fsdp")
    assert spec(401, 121) == P()
    assert spec(9, 10) == P()
    assert spec() == P()


def test_state_follows_its_parameters_and_each_device_holds_its_share():
    mesh = sharding.make_mesh(Run(mesh_data=2, mesh_fsdp=2))
    tree = {"params": {"kernel": jnp.ones((256, 128))}, "opt_state": ({"kernel": jnp.ones((256, 128))}, jnp.int32(0))}
    placed = jax.device_put(tree, sharding.shardings(mesh, None, tree))
    for kernel in (placed["params"]["kernel"], placed["opt_state"][0]["kernel"]):
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(128, 128)}
    whole = jax.device_put(tree, sharding.shardings(mesh, sharding.replicate, tree))
    assert whole["params"]["kernel"].sharding.is_fully_replicated


def test_a_split_batch_lies_over_all_devices():
    mesh = sharding.make_mesh(Run(mesh_fsdp=2))
    placed = sharding.put(mesh, sharding.BATCH, {"label": np.arange(8)})
    shares = sorted(shard.data.tolist() for shard in placed["label"].addressable_shards)
    assert shares == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("owners", "model", "shares"),
    [
        ([0, 1], 1, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], 1, [(0, 2), (1, 2)]),
        ([0, 1, 2, 3], 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a process a GPU: two hold the same rows
        ([0, 0, 1, 1], 4, [(0, 1), (0, 1)]),
        ([0, 0, 1], 1, [None, (2, 3)]),
        ([0, 1, 0, 1], 1, [None, None]),
        ([0, 0, 0, 1, 1, 1], 2, [None, None]),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(owners, model, shares, monkeypatch):
    devices = [types.SimpleNamespace(process_index=owner) for owner in owners]
    shape = {"data": len(owners) // model, "fsdp": 1, "model": model}
    mesh = types.SimpleNamespace(shape=shape, devices=np.array(devices).reshape(*shape.values()))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if share:
            assert sharding.share(mesh) == share
        else:
            with pytest.raises(BadInput, match=f"mesh_model={model}: the {shape['data']} parts .* do not lie evenly"):
                sharding.share(mesh)


def test_rules_see_paths():
    mesh = sharding.make_mesh(Run())
    seen = []

    def rule(path, leaf, mesh):
        seen.append("/".join(path))
        return P()

    @dataclasses.dataclass
    class Leaf:
        shape: tuple = (2,)

    sharding.shardings(mesh, rule, {"params": {"Dense_0": {"kernel": Leaf()}}, "opt_state": [Leaf()]})
    assert seen == ["params/Dense_0/kernel"]  # and what is no parameter follows one or is whole


TENSOR_PARALLEL = {"Dense_0/kernel": P(None, "model"), "Dense_0/bias": P("model"), "Dense_1/kernel": P("model", None)}


def compiled(rule, optimizer=optax.adamw, **fields) -> train.Program:
    exp = tiny.mlp(tiny.MLP((16,), 3), steps=4, ema=0.9, **fields)
    exp = dataclasses.replace(exp, rule=rule, optimizer=optimizer(exp.schedule))
    mesh = sharding.make_mesh(exp.config)
    return train.compile(train.resolve(exp, mesh), mesh)


def trained(program: train.Program) -> tuple[core.State, dict[str, float]]:
    """The State after four steps, and the metrics of all four."""
    state, sums = program.init(), program.sums()
    for at in range(4):
        state, sums = program.steps(1)(state, sums, program.feed(at))
    return state, metrics.compute(jax.device_get(sums))


def test_two_dense_layers_split_over_model_train_as_the_whole_ones_and_moments_and_averages_follow():
    program = compiled(sharding.by_pattern(TENSOR_PARALLEL), mesh_data=2, mesh_model=2)
    state, _ = trained(program)
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu, state.ema["params"]):
        held = {
            "/".join(part.key for part in path): leaf.addressable_shards[0].data.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert held == {"Dense_0/bias": (8,), "Dense_0/kernel": (36, 8), "Dense_1/bias": (3,), "Dense_1/kernel": (8, 3)}
    assert state.key.sharding.is_fully_replicated and adam.count.sharding.is_fully_replicated
    alone, _ = trained(compiled(None, mesh_data=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, alone.params)

    table = log.parameter_table(program.abstract.params).splitlines()
    assert table[0].split() == ["parameter", "shape", "split", "over", "bytes", "bytes", "a", "device"]
    rows = {line.split()[0]: line.split()[1:] for line in table[2:]}
    assert rows["Dense_0/kernel"] == ["36x16", "-,", "model", "2,304", "1,152"]
    assert rows["Dense_1/bias"] == ["3", "whole", "12", "12"]
    assert rows["total"] == ["2,572", "1,292"]


def test_parameters_alone_go_on_from_fsdp_and_adamw_on_one_device_by_sgd(tmp_path):
    there, here = compiled(sharding.fsdp(100), mesh_data=2, mesh_fsdp=2), compiled(None, optax.sgd, mesh_data=1)
    state, _ = trained(there)
    assert not state.params["Dense_0"]["kernel"].sharding.is_fully_replicated
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(state)
    params = checkpoint.restore(tmp_path, 4, here.abstract.params, part="params")
    assert checkpoint.digest(params) == checkpoint.digest(state.params)
    other = dataclasses.replace(here.init(), step=jnp.int32(4), params=params)
    losses = []
    for program, at in ((there, state), (here, other)):
        _, sums = program.steps(1)(at, program.sums(), program.feed(4))
        losses.append(metrics.compute(jax.device_get(sums))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_digits_mlp_split_over_model_tells_of_it_before_its_first_step_and_trains_as_one_device():
    fields = {"features": (32, 16), "steps": 4, "log_every": 1, "eval_every": 4, "precision": "float64"}
    runs = []
    with jax.enable_x64(True):
        for mesh in ({"mesh_data": 1}, {"mesh_data": 2, "mesh_model": 2}):
            exp, said, losses = digits_mlp.experiment(digits_mlp.Config(**fields, **mesh)), [], []

            def write(at, values, said=said, losses=losses):
                said.append("a step")
                losses += [values["train/loss"]] if "train/loss" in values else []

            train.fit(exp, write=write, say=said.append)
            runs.append((said, losses))
    (_, alone), (said, losses) = runs
    np.testing.assert_allclose(losses, alone, rtol=1e-12)
    (table,) = (text for text in said[: said.index("a step")] if text.startswith("parameter "))
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["Dense_0/bias", "32", "model", "256", "128"],
        ["Dense_0/kernel", "64x32", "-,", "model", "16,384", "8,192"],
        ["Dense_1/bias", "16", "whole", "128", "128"],
        ["Dense_1/kernel", "32x16", "model,", "-", "4,096", "2,048"],
        ["Dense_2/bias", "10", "model", "80", "40"],
        ["Dense_2/kernel", "16x10", "-,", "model", "1,280", "640"],
        ["total", "22,224", "11,176"],
    ]


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (None, "mesh_model=2: this experiment splits no parameter over it"),
        (
            {"Dense_1/bias": P("model")},
            r"params/Dense_1/bias \[3\] does not split .* 3 over 2 devices; .*mesh_model of 1 would",
        ),
        ({"bias": P(None, "model")}, r"params/Dense_0/bias \[16\] .* at most one"),
        ({"kernel": P("modle")}, r"params/Dense_0/kernel \[36x16\] .* give at most one of \('data', 'fsdp', 'model'\)"),
    ],
)
def test_a_rule_that_does_not_fit_is_named(rule, named):
    with pytest.raises(BadInput, match=named):
        compiled(rule and sharding.by_pattern(rule), mesh_data=2, mesh_model=2)


def test_the_written_out_step_runs_on_another_mesh_and_refuses_micro_batches():
    exp = digits_shard_map.experiment(digits_shard_map.Config(features=(16,), batch_size=32))
    exp = dataclasses.replace(exp, config=dataclasses.replace(exp.config, mesh_data=1))
    mesh = sharding.make_mesh(exp.config)
    trained(train.compile(train.resolve(dataclasses.replace(exp, steps=1), mesh), mesh))
    with pytest.raises(BadInput, match=r"accumulate=4: .* give 1"):
        digits_shard_map.experiment(digits_shard_map.Config(accumulate=4))


def test_the_step_with_its_collectives_written_out_equals_the_one_without():
    fields = {"features": (16,), "dropout": 0.0, "batch_size": 32, "steps": 4, "precision": "float64"}
    found = []
    with jax.enable_x64(True):
        for module in (digits_shard_map, digits_mlp):
            exp = module.experiment(module.Config(**fields))
            mesh = sharding.make_mesh(exp.config)
            program = train.compile(train.resolve(exp, mesh), mesh)
            assert "all-reduce" in (program.compiled(1).as_text() or "")
            state, seen = trained(program)
            found.append((state.params, seen))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), *found)
