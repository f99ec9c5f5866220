"""A step that goes bad in a known place, in a real run; then the replay of what the run left."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcompute import checkpoint, replay, train
from jaxcompute.errors import BadInput

quiet = lambda text: None  # noqa: E731


class Ripe(nn.Module):
    """The identity, until its sixth call in training: then one value is not a number."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            calls.value += 1
        return x.at[2, 3].set(jnp.where(calls.value > 5, jnp.nan, x[2, 3]))


class Root(nn.Module):
    """Of 0, where its slope is not finite."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sqrt(x - jax.lax.stop_gradient(x))


class Slip(nn.Module):
    """Its output and the gradient by its input are finite; the one by its kernel is not."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        @jax.custom_vjp
        def scale(x, kernel):
            return x * kernel

        scale.defvjp(lambda x, k: (x * k, None), lambda _, g: (g, jnp.full((), jnp.nan)))
        return scale(x, self.param("kernel", nn.initializers.ones, ()))


class Net(nn.Module):
    middle: str

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(16)(image.reshape(len(image), -1)))
        if self.middle == "ripe":
            x = Ripe()(x, train)
        elif self.middle == "root":
            x = Root()(x)
        elif self.middle == "slip":
            x = Slip()(x)
        elif self.middle == "between":
            x = x / (x - x)
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("middle", "step", "first", "fields"),
    [
        ("ripe", 6, "output of Ripe_0", {}),
        ("between", 1, "input of Dense_1", {}),
        ("root", 1, "gradient by the input of Root_0", {}),
        ("root", 1, "gradient by the input of Root_0", {"accumulate": 2, "clip_norm": 1.0, "precision": "bfloat16"}),
        ("slip", 1, "gradient by Slip_0/kernel", {"clip_norm": 1.0}),
    ],
    ids=["forward", "between layers", "backward", "backward, by micro-batches", "parameter"],
)
def test_the_first_that_is_not_finite_is_named(middle, step, first, fields, tmp_path):
    exp = tiny.mlp(Net(middle), save_every=2, log_every=3, mesh_data=4, **fields)
    with pytest.raises(train.NonFinite, match=f"step {step}:"):
        train.fit(exp, tmp_path, say=quiet)
    good = checkpoint.steps(tmp_path / "checkpoints")
    assert good == [at for at in (2, 4) if at < step]  # as they were
    assert checkpoint.steps(tmp_path / "nonfinite") == [step - 1]
    with np.load(tmp_path / "nonfinite/batch.npz", allow_pickle=False) as batch:
        assert batch["image"].shape == (8, 6, 6, 1)

    said = []
    seen = replay.replay(exp, tmp_path, said.append)
    assert seen and seen.what == first
    if middle == "ripe":
        assert (seen.values, seen.nan, seen.inf) == (8 * 16, 1, 0)
    assert said[-1] == f"step {step}: first not finite is the {first}"


def test_another_cause_than_state_and_batch_is_said_and_damage_is_refused(tmp_path):
    exp = tiny.mlp(Net("root"), mesh_data=1)
    with pytest.raises(train.NonFinite):
        train.fit(exp, tmp_path, say=quiet)
    said = []
    assert replay.replay(dataclasses.replace(exp, model=Net("none")), tmp_path, said.append) is None
    assert "step 1 is finite here" in said[-1]
    file = tmp_path / "nonfinite/batch.npz"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"batch\.npz is damaged"):
        replay.replay(exp, tmp_path, quiet)
