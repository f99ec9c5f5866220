"""What cifar_speedrun adds to the house: its whitening, start, order of mirrors, optimizer and six views."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar_speedrun
from jaxcompute import step
from jaxcompute.data import memory


@pytest.fixture(scope="module")
def exp(data_dir):
    """Of 12 images, in batches of 4, and of a narrow net: three steps an epoch."""
    del data_dir
    config = cifar_speedrun.Config(batch_size=4, steps=6, precision="float32", whitening_epochs=1 / 12500)
    exp = cifar_speedrun.experiment(config)
    few = jax.tree.map(lambda x: x[:12], exp.train.feed(0))
    return dataclasses.replace(
        exp,
        model=exp.model.clone(widths=(4, 8, 8)),
        train=memory.shuffled(few, 4, 0),
        eval=memory.in_order({name: few[name] for name in ("image", "label")}, 4),
        train_step=lambda *given: cifar_speedrun.train_step(12, *given),
    )


def test_whitened_patches_have_unit_covariance():
    noise = np.random.default_rng(0).integers(0, 256, (200, 10, 9, 3))
    image = ((noise[:, 1:] + noise[:, :-1]) // 2).astype(np.uint8)
    kernel = cifar_speedrun.whitening(image)(jax.random.key(0), (2, 2, 3, 24))
    x = cifar_speedrun.prepare(cifar_speedrun.Config(), {"image": jnp.asarray(image)}, jax.random.key(0), False)[
        "image"
    ]
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = np.asarray(y).reshape(-1, 24)
    np.testing.assert_array_equal(y[:, 12:], -y[:, :12])
    np.testing.assert_allclose(y[:, :12].T @ y[:, :12] / len(y), np.eye(12), atol=0.05)


@pytest.mark.parametrize("features", [3, 5, 7])
def test_a_kernel_begins_as_the_identity(features):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    conv = nn.Conv(features, (3, 3), use_bias=False, kernel_init=cifar_speedrun.identity)
    y, _ = conv.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y[..., :5], x[..., :features], rtol=1e-6)
    assert np.abs(y).min((0, 1, 2)).min() > 0  # no feature is empty


def test_an_image_is_mirrored_every_other_epoch(exp, monkeypatch):
    """Six steps of four are two epochs of twelve: each image is seen once from either side."""
    plain = np.asarray(cifar_speedrun.prepare(exp.config, exp.train.feed(0), jax.random.key(0), False)["image"])
    exp = dataclasses.replace(exp, config=dataclasses.replace(exp.config, translate=0))
    state = step.init(exp, exp.train.batch(exp.train.feed(0), jnp.int32(0)))
    seen: dict[int, list[bool]] = {i: [] for i in range(12)}

    def watched(exp, state, batch):
        image = np.asarray(cifar_speedrun.prepare(exp.config, batch, jax.random.key(0), True)["image"])
        for i, shown in zip(np.asarray(batch["index"]).tolist(), image, strict=True):
            sides = [np.array_equal(shown, plain[i][:, ::side]) for side in (1, -1)]
            assert sum(sides) == 1
            seen[i].append(sides[1])

    monkeypatch.setattr(step, "train_step", watched)
    for at in range(6):
        cifar_speedrun.train_step(
            12, exp, dataclasses.replace(state, step=jnp.int32(at)), exp.train.batch(exp.train.feed(0), jnp.int32(at))
        )
    assert all(sorted(sides) == [False, True] for sides in seen.values())
    assert 0 < sum(sides[0] for sides in seen.values()) < 12


def test_the_optimizer_keeps_its_spheres_and_what_is_fixed(exp):
    state = step.init(exp, exp.train.batch(exp.train.feed(0), jnp.int32(0)))
    kernels = {name: leaves["kernel"] * 3 for name, leaves in state.params.items() if "Conv" in name}
    params = state.params | {name: {"kernel": kernel} for name, kernel in kernels.items()}
    state = dataclasses.replace(state, params=params)
    biases = []
    for at in range(3):
        state, _ = exp.train_step(exp, state, exp.train.batch(exp.train.feed(0), jnp.int32(at)))
        biases.append(np.asarray(state.params["whitening_bias"]))
    for name, leaves in state.params.items():
        if "Conv" in name:
            kernel = leaves["kernel"]
            # from the sphere of radius sqrt(D) a step of about 0.24 sqrt(D), mostly across
            assert abs(float(jnp.linalg.norm(kernel)) / kernel.shape[-1] ** 0.5 - 1) < 0.3
        if "BatchNorm" in name:
            np.testing.assert_array_equal(leaves["scale"], 1)
            assert np.abs(leaves["bias"]).max() > 0
    assert np.abs(biases[0]).max() > 0  # for 50,000 / 12,500 examples, which are one step
    np.testing.assert_array_equal(biases[1], biases[0])
    assert jax.tree.leaves(state.mutable["whitening"])[0].shape == (2, 2, 3, 24)


def test_an_evaluation_is_by_six_views(exp):
    state = step.init(exp, exp.train.batch(exp.train.feed(0), jnp.int32(0)))
    batch = {name: jnp.asarray(exp.eval.feed(0)[name]) for name in ("image", "label")}
    seen = []
    measured = dataclasses.replace(exp, measure=lambda logits, batch: seen.append(np.asarray(logits)) or {})
    cifar_speedrun.eval_step(measured, state, batch)

    image = np.asarray(exp.prepare(batch, state.key, False)["image"])
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = [(0.5, padded[:, 1:33, 1:33]), (0.25, padded[:, 0:32, 0:32]), (0.25, padded[:, 2:34, 2:34])]
    mean = 0.0
    for weight, view in moved:
        for side in (view, view[:, :, ::-1]):
            logits, _ = step.forward(exp, state.params, state.mutable, jnp.asarray(side), train=False)
            mean = mean + weight / 2 * np.asarray(logits)
    np.testing.assert_allclose(seen[0], mean, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_biases_and_head_decay_and_kernels_come_to_their_sphere(exp):
    params = step.init(exp, exp.train.batch(exp.train.feed(0), jnp.int32(0))).params
    updates, _ = exp.optimizer.update(jax.tree.map(jnp.zeros_like, params), exp.optimizer.init(params), params)
    head, kernel = (jax.tree.leaves(params[name])[0] for name in ("Dense_0", "Conv_1"))
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.004 * (1 + 0.85) * head, rtol=1e-5)  # Nesterov's first
    moved = kernel + updates["Conv_1"]["kernel"]
    np.testing.assert_allclose(moved, kernel * 4**0.5 / jnp.linalg.norm(kernel), rtol=1e-5, atol=1e-7)


def test_muon_takes_a_step_of_the_same_length_in_every_direction(exp):
    params = step.init(exp, exp.train.batch(exp.train.feed(0), jnp.int32(0))).params
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    updates, _ = exp.optimizer.update(grads, exp.optimizer.init(params), params)
    kernel = params["Conv_0"]["kernel"]  # [3, 3, 24, 4]
    taken = updates["Conv_0"]["kernel"] - kernel * (4**0.5 / jnp.linalg.norm(kernel) - 1)
    lengths = np.linalg.svd(np.asarray(taken).reshape(-1, 4), compute_uv=False) / 0.24
    assert lengths.min() > 0.6 and lengths.max() < 1.3
    assert float((taken * grads["Conv_0"]["kernel"]).sum()) < 0  # downhill


def test_it_begins_in_float64(exp):
    with jax.enable_x64(True):
        config = dataclasses.replace(exp.config, precision="float64")
        state = step.init(dataclasses.replace(exp, config=config), exp.train.batch(exp.train.feed(0), jnp.int32(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float64")}
