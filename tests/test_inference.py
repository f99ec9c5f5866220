"""Answers: batch norms folded away, validated; what is measured and how it is told."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxcompute import step
from jaxcompute.compute import inference
from jaxcompute.compute.inference import COMPILED, CONSTANTS, FOLDED, JIT, SERIAL, Inference, Point
from jaxcompute.core import Experiment
from jaxcompute.models.cnn import CNN
from jaxcompute.models.mlp import MLP
from jaxcompute.models.resnet import Bottleneck, ResNet


class Linen(nn.Module):
    """Linen's own batch norm, after layers with a bias; the last after nothing that it can be folded into."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))
        x = nn.BatchNorm(not train, use_scale=False)(nn.Dense(5)(nn.relu(x)))
        return nn.BatchNorm(not train)(nn.relu(x)).mean((1, 2))


class Twice(nn.Module):
    """A convolution whose output is used beside its batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(3, (3, 3))(x)
        return (nn.BatchNorm(not train)(y) + y).mean((1, 2))


def trained(model: nn.Module, **fields) -> tuple[Experiment, dict, dict, jax.Array]:
    """An experiment with parameters and batch statistics of no particular values, and images [8, 8, 8, 3]."""
    image = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    variables = dict(model.init(jax.random.key(1), image))
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    some = jax.tree.map(lambda x: x + 0.3 * jax.random.uniform(next(keys), x.shape), variables)
    exp = tiny.mlp(model, **({"precision": "float32"} | fields))
    return exp, some.pop("params"), some, image


@pytest.mark.parametrize(
    ("model", "folds"),
    [
        (CNN((4, 6), (8,), 3, norm=True), 2),
        (ResNet((1, 1), width=4, classes=3), 5),
        (ResNet((1, 1), width=4, classes=3, projection=True), 6),
        (ResNet((1, 1), width=4, classes=3, block=Bottleneck, projection=True, large=True), 9),
        (Linen(), 2),
    ],
    ids=["CNN", "ResNet", "with projections", "bottlenecks", "Linen"],
)
def test_a_folded_batch_norm_changes_nothing(model, folds):
    exp, params, mutable, image = trained(model)
    folding = inference.fold(model, params, mutable, image)
    assert len(folding.shifts) == folds
    error, agreed = inference.compare(exp, params, mutable, folding, image)
    assert error < 1e-5 and agreed == 1
    moved = folding._replace(shifts={path: shift + 0.1 for path, shift in folding.shifts.items()})
    assert inference.compare(exp, params, mutable, moved, image)[0] > 1e-3  # the comparison sees


def test_nothing_is_left_of_it_but_an_addition():
    exp, params, mutable, image = trained(CNN((4,), (8,), 3, norm=True))
    folding = inference.fold(exp.model, params, mutable, image)

    def count(call, name):
        found = tiny.equations(jax.make_jaxpr(call)(image).jaxpr)
        return sum(equation.primitive.name == name for equation in found)

    assert count(lambda x: inference.apply(exp, folding, x), "rsqrt") == 0
    assert count(lambda x: exp.model.apply({"params": params, **mutable}, x), "rsqrt") == 1


def test_a_model_that_cant_be_folded_is_measured_as_it_is():
    exp, params, mutable, image = trained(Twice())
    folding = inference.fold(exp.model, params, mutable, image)
    assert inference.compare(exp, params, mutable, folding, image)[0] > inference.TOLERANCE["float32"]
    said = []
    exp = dataclasses.replace(exp, model=Twice())
    found = inference.run(exp, said.append, seconds=0.01, batches=(2,))
    assert "is not folded" in said[0] and found.folds == 0
    assert FOLDED not in {point.way for point in found.points}


def test_a_fold_that_gives_nan_is_not_taken(monkeypatch):
    monkeypatch.setattr(inference, "compare", lambda *args: (float("nan"), 0.0))
    said = []
    found = inference.run(tiny.mlp(CNN((4,), (8,), 3, norm=True)), said.append, seconds=0.01, batches=(1,))
    assert "is not folded" in said[0] and found.folds == 0


def test_a_model_without_batch_norm_has_nothing_to_fold():
    found = inference.run(tiny.mlp(MLP((8,), 3)), lambda text: None, seconds=0.01, batches=(1,))
    assert found.error is None and "nothing to fold" in inference.text(found)
    assert [point.way for point in found.points] == [SERIAL, JIT, COMPILED, CONSTANTS]


def test_real_answers_are_measured(tmp_path):
    exp = tiny.mlp(CNN((4,), (8,), 3, norm=True))
    found = inference.run(exp, lambda text: None, seconds=0.05, batches=(1, 32))  # of 23 images
    assert found.folds == 1 and found.error is not None and found.error < 1e-5
    assert [(point.way, point.batch_size) for point in found.points] == [
        (way, size) for size in (1, 32) for way in inference.WAYS
    ]
    for point in found.points:
        assert 0 < point.p50 <= point.p90 <= point.p99 and point.calls >= 8
    by_way = {point.way: point for point in found.points if point.batch_size == 1}
    assert by_way[JIT].p50 < by_way[SERIAL].p50
    json.dumps(inference.to_json(found))
    inference.picture(found).savefig(tmp_path / "inference.png")
    assert (tmp_path / "inference.png").stat().st_size > 10**4


def test_ratios_are_of_one_way_over_the_one_before():
    times = {SERIAL: 80.0, JIT: 8.0, COMPILED: 8.0, CONSTANTS: 4.0, FOLDED: 2.0}
    points = [Point(way, 1, 100, p50, p50, 2 * p50, 1e3 / p50) for way, p50 in times.items()]
    found = Inference("made up", "a chip", "float32", points, 3, 2e-6, 1.0)
    assert [inference.gain(found, way, 1) for way in inference.WAYS] == [None, 10, 1, 2, 2]
    text = inference.text(found)
    for words in (
        "10x",
        "1.00x",
        "2.00x",
        "the best over jit",
        "4.00x",
        "3 batch norms folded",
        "100.0% of the answers",
    ):
        assert words in text


def test_images_of_a_padded_batch_are_those_that_are_there():
    exp = tiny.mlp(precision="float32")
    images = inference._images(exp, step.init(exp, tiny.random_batch()), 50)
    assert images.shape == (50, 6, 6, 1) and bool(jnp.array_equal(images[:23], images[23:46]))


def test_launch_says_what_each_gave(launcher, tmp_path):
    ended = launcher("--experiment=digits_mlp", "--mode=benchmark", "--inference", "--workdir=run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    for words in ("p99 ms", "batch 256", "parameters as constants", "left in run: inference.json, inference.png"):
        assert words in ended.out
    assert json.loads((tmp_path / "run" / "inference.json").read_text())["points"][0]["way"] == "serial"
