import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcompute import sharding
from jaxcompute.core import Run
from jaxcompute.errors import BadInput


def test_a_mesh_takes_all_devices_or_those_asked_for():
    assert dict(sharding.make_mesh(Run()).shape) == {"data": 4, "fsdp": 1}
    assert dict(sharding.make_mesh(Run(mesh_fsdp=2)).shape) == {"data": 2, "fsdp": 2}
    assert dict(sharding.make_mesh(Run(mesh_data=1, mesh_fsdp=-1)).shape) == {"data": 1, "fsdp": 4}
    assert dict(sharding.make_mesh(Run(mesh_data=3)).shape) == {"data": 3, "fsdp": 1}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mesh_data": 8}, "mesh_data=8"),
        ({"mesh_data": 0}, "mesh_data=0"),
        ({"mesh_fsdp": -2}, "mesh_fsdp=-2"),
        ({"mesh_data": -1, "mesh_fsdp": -1}, "only one"),
        ({"mesh_data": -1, "mesh_fsdp": 5}, "there are 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(fields, named):
    with pytest.raises(BadInput, match=named) as caught:
        sharding.make_mesh(Run(**fields))
    assert "\n" not in str(caught.value)


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
    assert seen == ["opt_state/0", "params/Dense_0/kernel"]
