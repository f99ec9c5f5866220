import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcompute import losses, step
from jaxcompute.core import State
from jaxcompute.metrics import compute


def ready(exp, precision="float32"):
    return dataclasses.replace(exp, config=dataclasses.replace(exp.config, precision=precision))


start = jax.jit(step.init, static_argnums=0)
advance = jax.jit(step.train_step, static_argnums=0)


def test_bfloat16_in_every_convolution_and_product_and_float32_in_all_of_state():
    exp = ready(tiny.resnet(ema=0.9), "bfloat16")
    batch = tiny.random_batch()
    state = jax.eval_shape(lambda b: step.init(exp, b), batch)
    jaxpr = jax.make_jaxpr(lambda s, b: step.train_step(exp, s, b))(state, batch)
    heavy = [e for e in tiny.equations(jaxpr.jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(heavy) > 10  # forward and backward
    for eqn in heavy:
        assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype("bfloat16")}, eqn

    new, metrics = jax.eval_shape(lambda s, b: step.train_step(exp, s, b), state, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32, path
    assert metrics["loss"].total.dtype == jnp.float32


def test_golden_loss():
    """The losses of twelve steps: a change of structure must not move them.

    In float64, where processors agree to 1e-15; another order of examples, key or operation shows in the first digits.
    """
    with jax.enable_x64(True):
        exp = ready(tiny.mlp(), "float64")
        state = start(exp, exp.train.feed(0))
        step_ = jax.jit(lambda s, f: step.train_step(exp, s, exp.train.batch(f, s.step)))
        seen = []
        for _ in range(12):
            state, metrics = step_(state, exp.train.feed(0))
            seen.append(compute(metrics)["loss"])
    assert int(state.step) == 12
    np.testing.assert_allclose(seen, GOLDEN, rtol=1e-12)


GOLDEN = [
    1.1784298522574,
    1.95651662306394,
    1.33597205741631,
    1.00254142130948,
    0.77243659058141,
    0.663972390785366,
    0.695605510438823,
    0.469617601758524,
    0.550895034138661,
    0.367428725878864,
    0.418120403721616,
    0.44181078575289,
]


def plain(batch, key, train):
    return batch | {"image": batch["image"] / 255}


def test_sgd_by_hand():
    """One step of a linear model equals the gradient by the chain rule, times the rate."""
    exp = ready(tiny.mlp(tiny.MLP((), 3)))
    exp = dataclasses.replace(exp, optimizer=optax.sgd(0.5), loss=losses.cross_entropy(), prepare=plain)
    batch = tiny.random_batch()
    state = start(exp, batch)
    new, metrics = advance(exp, state, batch)
    x = np.asarray(batch["image"]).reshape(8, -1) / 255
    w, b = (np.asarray(state.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    logits = x @ w + b
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (p - np.eye(3)[np.asarray(batch["label"])]) / 8
    np.testing.assert_allclose(new.params["Dense_0"]["kernel"], w - 0.5 * x.T @ error, atol=1e-6)
    np.testing.assert_allclose(new.params["Dense_0"]["bias"], b - 0.5 * error.sum(0), atol=1e-6)
    norm = np.sqrt(((x.T @ error) ** 2).sum() + (error.sum(0) ** 2).sum())
    assert compute(metrics)["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_accumulation_is_the_mean_over_micro_batches():
    batch = tiny.random_batch()
    whole, parts = (ready(tiny.mlp(tiny.MLP((16,), 3), accumulate=n)) for n in (1, 4))
    state = start(whole, batch)
    one, seen_one = advance(whole, state, batch)
    four, seen_four = advance(parts, state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), one.params, four.params)
    assert compute(seen_one)["accuracy"] == compute(seen_four)["accuracy"]
    assert int(seen_four["loss"].weight) == 8


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    batch = tiny.random_batch()
    free = ready(dataclasses.replace(tiny.mlp(), optimizer=optax.sgd(1.0)))
    clipped = ready(dataclasses.replace(tiny.mlp(clip_norm=0.01), optimizer=optax.sgd(1.0)))
    state = start(free, batch)
    _, seen = advance(free, state, batch)
    new, seen_clipped = advance(clipped, state, batch)
    moved = optax.tree.norm(optax.tree.sub(new.params, state.params))
    assert compute(seen)["grad_norm"] > 0.02
    assert compute(seen_clipped)["grad_norm"] == compute(seen)["grad_norm"]
    assert float(moved) == pytest.approx(0.01, rel=1e-4)


def test_the_moving_average_follows_and_is_what_evaluation_reads():
    exp = ready(tiny.mlp(ema=0.75))
    batch = tiny.random_batch()
    state = start(exp, batch)
    for at, decay in ((0, 0.1), (5, 0.4), (1000, 0.75)):  # (1 + step) / (10 + step), then as configured
        state = state.replace(step=jnp.int32(at))
        new, _ = advance(exp, state, batch)
        want = jax.tree.map(lambda old, p, d=decay: d * old + (1 - d) * p, state.ema["params"], new.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new.ema["params"], want)
        state = new
    masked = batch | {"mask": jnp.ones(8, bool)}
    averaged = step.eval_step(exp, new.replace(params=jax.tree.map(jnp.zeros_like, new.params)), masked)
    assert compute(averaged)["loss"] == compute(step.eval_step(exp, new, masked))["loss"]


def test_batch_statistics_are_averaged_with_their_parameters():
    exp = ready(tiny.resnet(ema=0.75))
    state = jax.eval_shape(lambda b: step.init(exp, b), tiny.random_batch())
    params, mutable = step.evaluated(state)
    assert jax.tree.structure((params, mutable)) == jax.tree.structure((state.params, state.mutable))
    assert "batch_stats" in state.ema
    seen = []

    def look(state):
        seen.append(step.evaluated(state)[1])
        return step.train_step(exp, state, tiny.random_batch())[0]

    new = jax.eval_shape(look, state)
    assert seen[0] is not state.mutable
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_every_step_and_example_has_its_own_randomness():
    exp = ready(tiny.mlp(tiny.MLP((64,), 3, dropout=0.5)))
    batch = tiny.random_batch()
    state = start(exp, batch)
    losses_ = [compute(advance(exp, state.replace(step=jnp.int32(i)), batch)[1])["loss"] for i in (0, 1, 0)]
    assert losses_[0] == losses_[2] != losses_[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_state_as_it_was(bad):
    exp = ready(tiny.mlp())
    batch = tiny.random_batch()
    state = start(exp, batch)
    new, metrics = advance(exp, state, batch)
    kept, finite = step.keep_finite(state, new, metrics)
    assert bool(finite)
    assert int(kept.step) == 1

    broken = dataclasses.replace(exp, loss=tiny.constant_loss(bad))
    new, metrics = advance(broken, state, batch)
    kept, finite = step.keep_finite(state, new, metrics)
    assert not bool(finite)
    jax.tree.map(np.testing.assert_array_equal, without_key(kept), without_key(state))


def without_key(state: State) -> State:
    return state.replace(key=jax.random.key_data(state.key))
