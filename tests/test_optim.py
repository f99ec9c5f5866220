"""Lengths, schedules and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompute import optim
from jaxcompute.core import Run
from jaxcompute.errors import BadInput
from jaxcompute.models.cnn import CNN


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"epochs": 10.0, "batch_size": 80}, 13),  # 12.5
        ({"epochs": 1.1, "batch_size": 10}, 11),  # 11.000000000000002
        ({"epochs": 0.5, "batch_size": 100}, 1),
        ({"epochs": 1e-9}, 1),
        ({"epochs": 3.0, "steps": 7}, 7),
    ],
)
def test_total_steps(fields, steps):
    assert optim.total_steps(Run(**fields), 100) == steps


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("steps", -1),
        ("epochs", 0.0),
        ("epochs", -1.0),
        ("epochs", float("nan")),
        ("epochs", float("inf")),
    ],
)
def test_a_length_that_is_not_positive_is_named_with_its_mend(field, value):
    with pytest.raises(BadInput, match=rf"^--config\.{field}={value}: give [^\n]*$"):
        optim.total_steps(Run(**{field: value}), 100)


def test_small_images_leave_at_least_a_step_of_whole_ones():
    assert optim.small_steps(Run(epochs=3.0, batch_size=32), 1.0, 100) == 4  # 3.1, rounded up
    assert optim.small_steps(Run(epochs=3.0, batch_size=32), 0.0, 100) == 0
    with pytest.raises(BadInput, match=r"^--config\.small_epochs=2.9: 10 steps of 10 leave none [^\n]*; give less$"):
        optim.small_steps(Run(epochs=3.0, batch_size=32), 2.9, 100)
    with pytest.raises(BadInput, match=r"4 steps of 4 leave none"):
        optim.small_steps(Run(epochs=3.0, steps=4, batch_size=32), 1.0, 100)


def test_warmup_cosine_passes_through_its_corners():
    schedule = optim.warmup_cosine(0.4, steps=110, warmup_steps=10, end=0.02)
    for step, rate in {0: 0.0, 5: 0.2, 10: 0.4, 60: 0.21, 110: 0.02, 500: 0.02}.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, err_msg=f"at step {step}")


def test_a_run_shorter_than_its_warmup_still_climbs_to_the_peak():
    assert [float(optim.warmup_cosine(1.0, 2, 100)(step)) for step in (0, 1, 2)] == [0, 1, 0]
    assert float(optim.warmup_cosine(1.0, 1, 100)(0)) == 1


def test_decay_mask_takes_kernels_and_leaves_biases_and_norms():
    model = CNN((2,), (3,), norm=True)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))["params"]
    decayed = jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
    assert {jax.tree_util.keystr(path)[-10:] == "['kernel']" for path, decay in decayed if decay} == {True}
    assert {path[-1].key for path, decay in decayed if not decay} == {"bias", "scale"}


def test_sgd_is_nesterov_momentum_of_the_decayed_gradient():
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(2, 3)), rng.normal(size=3)
    gradients = [(rng.normal(size=(2, 3)), rng.normal(size=3)) for _ in range(3)]
    with jax.enable_x64(True):
        optimizer = optim.sgd(lambda step: 0.1 / (step + 1), momentum=0.9, weight_decay=0.01)
        params = {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}
        state = optimizer.init(params)
        for g, h in gradients:
            updates, state = optimizer.update({"kernel": jnp.asarray(g), "bias": jnp.asarray(h)}, state, params)
            params = optax.apply_updates(params, updates)

    m, n = np.zeros_like(w), np.zeros_like(b)
    for step, (g, h) in enumerate(gradients):
        g = g + 0.01 * w
        m, n = 0.9 * m + g, 0.9 * n + h
        w, b = w - 0.1 / (step + 1) * (g + 0.9 * m), b - 0.1 / (step + 1) * (h + 0.9 * n)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-12)
    np.testing.assert_allclose(params["bias"], b, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_and_state_keep_their_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {"kernel": jnp.ones((2, 2), dtype), "bias": jnp.ones(2, dtype)}
        optimizer = optim.sgd(optim.warmup_cosine(0.1, 10, 2), weight_decay=1e-4)
        state = optimizer.init(params)
        updates, after = jax.eval_shape(optimizer.update, params, state, params)
        params = jax.eval_shape(optax.apply_updates, params, updates)
        types = jax.tree.map(lambda leaf: leaf.dtype, (state, params))
        assert types == jax.tree.map(lambda leaf: leaf.dtype, (after, params))
        assert set(jax.tree.leaves(types)) == {jnp.dtype(dtype), jnp.dtype("int32")}


@pytest.mark.parametrize(("steps", "rtol"), [(3, 0.45), (5, 0.35)])
def test_muon_brings_a_kernel_to_its_sphere_and_turns_it_along_the_momentum(steps, rtol):
    rng = np.random.default_rng(0)
    kernel, *gradients = (jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32) for _ in range(3))
    muon = optim.muon(0.1, momentum=0.8, steps=steps)
    state = muon.init(kernel)
    for gradient in gradients:
        updates, state = muon.update(gradient, state, kernel)
    on_sphere = np.asarray(kernel) * 8**0.5 / np.linalg.norm(kernel)
    turn = (np.asarray(kernel + updates) - on_sphere).reshape(36, 8)
    first, second = (np.asarray(gradient).reshape(36, 8) for gradient in gradients)
    moment = 0.8 * 0.2 * first + 0.2 * second
    nesterov = 0.8 * moment / (1 - 0.8**3) + 0.2 * second / (1 - 0.8**2)  # of Optax, whose moments are means
    left, values, right = np.linalg.svd(nesterov, full_matrices=False)
    assert values.max() / values.min() > 1.5
    values = np.diag(left.T @ turn @ right.T)  # along the momentum's own directions, by nearly as much in each
    np.testing.assert_allclose(values, -0.1, rtol=rtol)
    np.testing.assert_allclose(turn, left @ np.diag(values) @ right, atol=1e-3)


def test_muon_leaves_a_kernel_of_zeros_finite():
    zeros = jnp.zeros((3, 3, 4, 8))
    muon = optim.muon(0.1, momentum=0.8)
    updates, _ = muon.update(zeros, muon.init(zeros), zeros)
    assert np.isfinite(updates).all()
