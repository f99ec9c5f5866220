"""FLOPs of a training step against counts by hand; nothing is compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import pallas

from jaxcompute import flops, sharding, train
from jaxcompute.models import lenet, mlp, resnet


def of_training(model: nn.Module, *image: int) -> float:
    """GFLOP an image of the gradient by the parameters."""

    def outputs(params, mutable, x):
        return model.apply({"params": params, **mutable}, x, train=True, mutable=list(mutable))[0].sum()

    x = jax.ShapeDtypeStruct((16, *image), jnp.float32)  # LeNet-5's convolutions by a band matrix
    variables = dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x))
    params = variables.pop("params")
    return flops.count(jax.make_jaxpr(jax.grad(outputs))(params, variables, x).jaxpr) / 16 / 1e9


# By hand: multiply-adds of each layer forward, out height x width x features x (kernel x kernel x features in), and
# twice that in FLOP. In training three times that, as the backward pass has two products for each, by the input and by
# the weights; less the first layer's product by the input, which nobody asks for.
MLP = 784 * 128 + 128 * 128 + 128 * 10
LENET = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
RESNET18 = (
    32 * 32 * 64 * 27
    + 4 * 32 * 32 * 64 * 576
    + 16 * 16 * 128 * (576 + 3 * 1152 + 64)
    + 8 * 8 * 256 * (1152 + 3 * 2304 + 128)
    + 4 * 4 * 512 * (2304 + 3 * 4608 + 256)
    + 512 * 10
)


@pytest.mark.parametrize(
    ("model", "image", "forward", "first"),
    [
        (mlp.MLP((128, 128), 10), (28, 28, 1), MLP, 784 * 128),
        (lenet.LeNet5(), (28, 28, 1), LENET, 28 * 28 * 6 * 25),
        (resnet.ResNet18(), (32, 32, 3), RESNET18, 32 * 32 * 64 * 27),
    ],
    ids=["MLP", "LeNet-5", "ResNet-18"],
)
def test_models_against_a_count_by_hand(model, image, forward, first):
    assert of_training(model, *image) == pytest.approx(2 * (3 * forward - first) / 1e9, rel=1e-6)


def test_resnet50_is_24_6_gflop_an_image():
    assert of_training(resnet.ImageNetResNet50(), 224, 224, 3) == pytest.approx(24.6, rel=0.02)


def test_a_grouped_convolution_its_gradients_count_thrice():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(8, (3, 3), 2, feature_group_count=4)(nn.Conv(8, (1, 1))(x))

    first, second = 12 * 12 * 8 * 4, 6 * 6 * 8 * 9 * 2
    assert of_training(Grouped(), 12, 12, 4) == pytest.approx(2 * (2 * first + 3 * second) / 1e9)


def test_loops_branches_and_shards_count_as_often_as_they_run():
    x = jnp.ones((4, 4))
    once = 2 * 4**3

    def count(f):
        return flops.count(jax.make_jaxpr(f)(x).jaxpr)

    assert count(lambda x: x @ x) == once
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0]) == 5 * once
    longer, shorter = lambda x: x @ x @ x, lambda x: x @ x
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, longer, shorter, x)) == once  # at least, whichever is taken
    assert count(jax.jit(lambda x: jax.checkpoint(lambda x: x @ x)(x))) == once
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")
    rows = jax.shard_map(lambda rows: rows @ jnp.ones((4, 4)), mesh=mesh, in_specs=spec, out_specs=spec)
    assert count(rows) == once


def test_a_kernel_of_ones_own_counts_nothing():
    def product(x, out):
        out[...] = x[...] @ x[...]

    x = jnp.ones((8, 8))
    call = pallas.pallas_call(product, grid=(5,), out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert flops.count(jax.make_jaxpr(call)(x).jaxpr) == 0


@pytest.mark.parametrize("fields", [{}, {"steps_per_call": 4}, {"accumulate": 2}, {"mesh_data": 2}], ids=str)
def test_a_program_counts_one_step_over_all_devices(fields):
    exp = tiny.mlp(**({"mesh_data": 1} | fields))
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    assert program.flops() == pytest.approx(8 * 2 * (3 * (36 * 16 + 16 * 3) - 36 * 16))
