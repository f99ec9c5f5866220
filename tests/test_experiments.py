"""Every experiment is built and run for two steps, on real data where it needs some."""

import dataclasses
import importlib
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cifar_resnet
from jaxcompute import config, step, train
from jaxcompute.core import Run, State
from jaxcompute.data import memory
from jaxcompute.errors import BadInput
from jaxcompute.models import resnet

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
NEED_DATA = {"mnist_lenet", "fashion_cnn", "cifar_cnn", "cifar_resnet", "cifar_speedrun"}
OF_FOLDERS = {"folder_cnn", "imagenet_resnet50"}
SMALL = {
    "imagenet_resnet50": {
        "depth": "18", "width": 4, "canvas": 48, "image_size": 32, "eval_short": 36, "eval_size": 32, "workers": 1,
        "small_size": 16, "small_epochs": 0.5,
    }
}  # fmt: skip


def build(name: str, **fields):
    module = importlib.import_module(f"experiments.{name}")
    config = module.Config(**({"batch_size": 4, "steps": 2, "log_every": 1, "mesh_data": 1} | fields))
    exp = module.experiment(config)
    first = jax.tree.map(lambda x: x[:11], exp.eval.feed(0))
    return dataclasses.replace(exp, eval=memory.in_order(first, 4))


def pictures(root: Path) -> dict[str, str]:
    for split in ("train", "eval"):
        for label, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30))):
            (root / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (120, 100 + i), colour).save(root / split / label / f"{i}.png")
    return {"train_dir": str(root / "train"), "eval_dir": str(root / "eval")}


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, request, tmp_path):
    if name in NEED_DATA:
        request.getfixturevalue("data_dir")
    exp = build(name, **(pictures(tmp_path) if name in OF_FOLDERS else {}) | SMALL.get(name, {}))
    seen: dict[str, float] = {}
    state = train.fit(exp, write=lambda at, values: seen.update(values), say=lambda text: None)
    assert int(state.step) == 2
    assert np.isfinite(seen["train/loss"])
    assert np.isfinite(seen["eval/loss"])
    assert np.isfinite(seen["train/grad_norm"])


@pytest.mark.parametrize("name", NAMES)
def test_a_field_given_another_default_keeps_its_bounds(name):
    own = config.fields(importlib.import_module(f"experiments.{name}").Config)
    for field in config.fields(Run).values():
        assert own[field.name].kind == field.kind, field.name


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_claims_what_was_measured(name):
    """A figure, the runs it is of, hardware and time, and the command, as a lab note would."""
    note = importlib.import_module(f"experiments.{name}").__doc__
    command = rf"launch.py --experiment={name}\b"
    for words in (command, r"\d %|\d\.\d+", r"\d (run|seed)", r"\d s\b|\d min", r"\bcores?\b", r"20\d\d-\d\d"):
        assert re.search(words, note), f"{name}: {words}"


def test_every_depth_of_the_cifar_family_has_its_size(data_dir):
    del data_dir
    counts = {}
    for depth in ("20", "32", "44", "56", "110", "18"):
        exp = build("cifar_resnet", depth=depth, precision="float32")
        state = jax.eval_shape(lambda feed, exp=exp: step.init(exp, exp.train.batch(feed, 0)), exp.train.feed(0))
        counts[depth] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million; 11.17 for the wide form
    millions = {depth: round(count / 1e6, 2) for depth, count in counts.items()}
    assert millions == {"20": 0.27, "32": 0.46, "44": 0.66, "56": 0.85, "110": 1.73, "18": 11.17}


def test_cifar_resnet_begins_with_small_images_and_muon_takes_its_convolutions(data_dir):
    del data_dir
    fields = {"batch_size": 4, "precision": "float32", "muon": 0.1, "steps": 8, "epochs": 1.0}
    exp = build("cifar_resnet", small_size=8, small_epochs=3 * 4 / 50_000, **fields)
    exp = dataclasses.replace(exp, model=resnet.ResNet((1, 1), width=4))
    batch = exp.train.batch(exp.train.feed(0), jnp.int32(0))
    state = step.init(exp, batch)
    ours, usual = (jax.jit(partial(take, exp)) for take in (exp.train_step, step.train_step))
    small = dataclasses.replace(exp, prepare=partial(cifar_resnet.prepare, exp.config, size=8))
    assert small.prepare(batch, jax.random.key(0), True)["image"].shape == (4, 8, 8, 3)
    for at, expected in ((0, small), (2, small), (3, exp), (7, exp)):
        now = dataclasses.replace(state, step=jnp.int32(at))
        new, metrics = ours(now, batch)
        _, same = jax.jit(partial(step.train_step, expected))(now, batch)
        _, other = usual(now, batch)
        loss, same, other = (float(found["loss"].compute()) for found in (metrics, same, other))
        assert loss == pytest.approx(same, rel=1e-5)
        assert (expected is exp) or loss != pytest.approx(other, rel=1e-3)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new.params):
        if "Conv" in str(path):  # on Muon's sphere, at a rate of 0.1 and less
            assert np.linalg.norm(leaf) == pytest.approx(leaf.shape[-1] ** 0.5, rel=0.15)


def test_cifar_resnet_of_depth_8_trains_on_four_devices_as_on_one(data_dir):
    del data_dir
    losses: dict[int, list[float]] = {1: [], 4: []}
    with jax.enable_x64(True):
        for devices, seen in losses.items():
            exp = build("cifar_resnet", precision="float64", steps=20, batch_size=8, mesh_data=devices)
            exp = dataclasses.replace(exp, model=resnet.ResNet((1, 1, 1)))

            def write(at, values, seen=seen):
                seen += [values["train/loss"]] if "train/loss" in values else []

            train.fit(exp, write=write, say=lambda text: None)
    assert len(losses[1]) == 20
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-12)


def test_imagenet_resnet50_begins_with_small_crops(tmp_path, monkeypatch):
    fields = {"steps": 8, "small_size": 16, "small_epochs": 2.0}  # 3 steps of 4 out of 6
    exp = build("imagenet_resnet50", **pictures(tmp_path) | SMALL["imagenet_resnet50"] | fields)
    batch, key = exp.train.batch(exp.train.like(), jnp.int32(0)), jax.random.key(0)
    monkeypatch.setattr(step, "train_step", lambda exp, state, batch: exp.prepare(batch, key, True)["image"].shape)
    for at, side in (0, 16), (2, 16), (3, 32), (7, 32):
        state = State(step=jnp.int32(at), params={}, mutable={}, opt_state=(), key=key)
        assert exp.train_step(exp, state, batch) == (4, side, side, 3)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cifar_resnet", {"steps": 3906, "batch_size": 64}),
        ("cifar_resnet", {"steps": 0, "epochs": 5.0}),
        ("imagenet_resnet50", {"steps": 8}),
    ],
)
def test_small_images_must_leave_whole_ones_in_the_end(name, fields, data_dir, tmp_path):
    del data_dir
    fields |= {"small_epochs": 5.0} | (pictures(tmp_path) if name in OF_FOLDERS else {})
    with pytest.raises(BadInput, match=r"--config.small_epochs=5.0: .* leave none for whole \w+; give less"):
        build(name, **fields)
    assert build(name, **fields | {"steps": 400_000})


def test_sigmoid_mlp_gradients_by_the_chain_rule():
    """2-3-1, all sigmoid, squared error: the derivatives by hand against JAX's, and a step of descent at 0.1."""
    exp = build("sigmoid_mlp", precision="float32")
    x, t = exp.train.feed(0)["image"].astype(np.float64), exp.train.feed(0)["label"].astype(np.float64)
    batch = {"image": jnp.asarray(x, jnp.float32), "label": jnp.asarray(t, jnp.float32)}
    state = step.init(exp, batch)
    layers = [state.params[f"Dense_{i}"] for i in (0, 1)]
    (w1, b1), (w2, b2) = ([np.asarray(layer[name], np.float64) for name in ("kernel", "bias")] for layer in layers)
    assert (w1.shape, w2.shape) == ((2, 3), (3, 1))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    h = sigmoid(x @ w1 + b1)  # [4, 3]
    y = sigmoid(h @ w2 + b2)  # [4, 1]
    # E = 1/4 sum 1/2 (y - t)^2, and sigmoid'(z) = s (1 - s)
    dz2 = (y - t) * y * (1 - y) / 4
    dz1 = (dz2 @ w2.T) * h * (1 - h)
    by_hand = {
        "Dense_0": {"kernel": x.T @ dz1, "bias": dz1.sum(0)},
        "Dense_1": {"kernel": h.T @ dz2, "bias": dz2.sum(0)},
    }
    grads, _, metrics = step.gradient(exp, state, batch, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, by_hand)
    assert metrics["loss"].compute() == pytest.approx(float(((y - t) ** 2).mean() / 2), rel=1e-5)

    new, _ = step.train_step(exp, state, batch)
    for name, layer in by_hand.items():
        for kind, gradient in layer.items():
            want = np.asarray(state.params[name][kind], np.float64) - 0.1 * gradient
            np.testing.assert_allclose(new.params[name][kind], want, rtol=1e-5, atol=1e-7)
