"""The models: sizes as published, bfloat16 where it is asked for, and which example may depend on which."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_leaves_with_path

from jaxcompute import flops
from jaxcompute.models import cnn, conv, conv_pool, lenet, mlp, norm, pooling, resnet

SMALL = {
    "mlp": mlp.MLP((8, 8), classes=3),
    "lenet": lenet.LeNet5(classes=3),
    "cnn": cnn.CNN((4, 4), (8,), classes=3),
    "cnn with batch norm": cnn.CNN((4, 4), (8,), classes=3, norm=True),
    "resnet": resnet.ResNet((1, 1), width=4, classes=3),
    "resnet with projections": resnet.ResNet((1, 1), width=4, projection=True, classes=3),
}
NORMED = [name for name, model in SMALL.items() if getattr(model, "norm", False) or "resnet" in name]


def shapes_of(model: nn.Module, *image: int):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image))))


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "layers", "parameters"),
    [
        (resnet.ResNet20(), 20, 269_722),  # 0.27M in table 6 of the paper
        (resnet.ResNet32(), 32, 464_154),  # 0.46M
        (resnet.ResNet44(), 44, 658_586),  # 0.66M
        (resnet.ResNet56(), 56, 853_018),  # 0.85M
        (resnet.ResNet110(), 110, 1_727_962),  # 1.7M
        (resnet.ResNet18(), 18 + 3, 11_173_962),  # and three projections
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_resnets_have_the_published_sizes(model, layers, parameters):
    params = shapes_of(model, 32, 32, 3)["params"]
    assert sum(leaf.ndim > 1 for leaf in jax.tree.leaves(params)) == layers
    assert size(params) == parameters


def test_lenet_has_the_papers_sizes_layer_by_layer():
    params = shapes_of(lenet.LeNet5(), 28, 28, 1)["params"]
    assert {name: size(layer) for name, layer in params.items()} == {
        "C1": 156,
        "C3": 2_416,  # 1,516 in the paper, where not all maps are connected
        "C5": 48_120,
        "F6": 10_164,
        "OUTPUT": 850,
    }


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_reaches_every_product_and_its_gradient_but_no_statistic(name):
    variables = shapes_of(SMALL[name], 16, 16, 3)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables.pop("params"))
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.bfloat16)

    def loss(params, variables, image):
        logits, mutable = SMALL[name].apply({"params": params, **variables}, image, True, mutable=["batch_stats"])
        return logits.sum(), (logits, mutable)

    step = jax.value_and_grad(loss, has_aux=True)
    products = [
        equation
        for equation in tiny.equations(jax.make_jaxpr(step)(params, variables, image).jaxpr)
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(products) >= 3 * 3 - 1  # at least three layers, each forward and twice backward but for the input
    assert {variable.aval.dtype for e in products for variable in (*e.invars, *e.outvars)} == {jnp.dtype("bfloat16")}

    (_, (logits, mutable)), _ = jax.eval_shape(step, params, variables, image)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.bfloat16)
    assert ("batch_stats" in mutable) == (name in NORMED)
    assert {leaf.dtype for leaf in jax.tree.leaves(mutable)} <= {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["cnn", *NORMED])
def test_examples_meet_in_batch_norm_alone_and_only_while_training(name):
    model, image = SMALL[name], jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def reach(image):  # [train, example]: how far example 0's logits feel each example
        def first(image, train):
            return (model.apply(variables, image, train, mutable=["batch_stats"])[0][0] ** 2).sum()

        return jnp.stack([abs(jax.grad(first)(image, train)).sum((1, 2, 3)) for train in (False, True)])

    evaluating, training = np.asarray(reach(image)) > 0
    assert evaluating.tolist() == [True, False, False]
    assert training.tolist() == [True, name in NORMED, name in NORMED]


@pytest.mark.parametrize(("stride", "features"), [(1, 4), (2, 8)])
def test_a_block_is_its_parameter_free_shortcut_and_two_convolutions(stride, features):
    image = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    block = resnet.Block(features, stride)

    @jax.jit
    def outputs(image):  # as it starts, and with the last scale at zero
        variables = block.init(jax.random.key(1), image, True)
        silent = variables["params"] | {"BatchNorm_1": {name: jnp.zeros(features) for name in ("scale", "bias")}}
        start = [leaf for path, leaf in tree_leaves_with_path(variables["params"]) if path[-1].key == "scale"]
        apply = partial(block.apply, x=image, train=True, mutable=["batch_stats"])
        return start, apply(variables)[0], apply(variables | {"params": silent})[0]

    start, whole, shortcut = outputs(image)
    np.testing.assert_array_equal(start, np.ones((2, features)))
    expected = np.zeros((2, 6 // stride, 6 // stride, features), np.float32)
    expected[..., :4] = np.maximum(image[:, ::stride, ::stride], 0)
    np.testing.assert_array_equal(shortcut, expected)
    added = np.asarray(whole - shortcut).reshape(-1, features).std(0)
    assert (added > 0.2).all()


@pytest.mark.parametrize("model", [mlp.MLP((64,), 3, dropout=0.5), cnn.CNN((2,), (64,), 3, dropout=0.5)])
def test_dropout_follows_its_key_and_rests_in_evaluation(model):
    image = jnp.ones((2, 4, 4, 1))
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def train(key):
        return model.apply(variables, image, True, rngs={"dropout": key})

    a, again, b = (train(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert (a != b).all()
    still = model.apply(variables, image)  # needs no key
    np.testing.assert_array_equal(still, model.clone(dropout=0.0).apply(variables, image, True))


def test_sigmoid_mlp_is_the_formula():
    x = np.array([[0.0, 1.0], [0.3, -2.0]], np.float32)
    model = mlp.MLP((3,), classes=1, activation=nn.sigmoid, output_activation=nn.sigmoid)
    variables = model.init(jax.random.key(0), x)
    h = x
    for name in ("Dense_0", "Dense_1"):
        layer = variables["params"][name]
        h = 1 / (1 + np.exp(-(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))))
    np.testing.assert_allclose(model.apply(variables, x), h, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 7, 5, 2), (3, 2, 3, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_is_linens_in_every_bit_with_ties_and_odd_sizes(shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-1, 2, shape), dtype)  # three values: most windows tie

    def linen(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    y, pull = jax.vjp(pooling.max_pool, x)
    expected, expected_pull = jax.vjp(linen, x)
    cotangent = jnp.asarray(rng.normal(size=y.shape), dtype)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull(cotangent)[0], expected_pull(cotangent)[0])


def test_pools_hide_no_nan():
    windows = jnp.where(jnp.eye(4, dtype=bool), jnp.nan, jnp.arange(4.0)).reshape(4, 2, 2, 1)
    for pool in (pooling.max_pool, pooling.mean_pool):
        for repeat in ((1, 1, 1, 1), (32, 4, 4, 32)):  # XLA's programs for few and many differ
            after_relu = jax.jit(lambda x, pool=pool: pool(nn.relu(x)))
            assert jnp.isnan(after_relu(jnp.tile(windows, repeat))).all()


@pytest.mark.parametrize(("channels", "dtype"), [(8, jnp.float32), (128, jnp.float32), (128, jnp.bfloat16)])
def test_mean_pool_is_the_mean(channels, dtype):
    x = jax.random.normal(jax.random.key(0), (3, 7, 5, channels)).astype(dtype)
    (y, pull), (expected, expected_pull) = jax.vjp(pooling.mean_pool, x), jax.vjp(lambda x: x.mean((1, 2)), x)
    rtol = 1e-6 if dtype == jnp.float32 else 1e-2
    assert y.dtype == dtype
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (y, expected)), rtol, rtol)
    np.testing.assert_allclose(*(p(expected)[0].astype(jnp.float32) for p in (pull, expected_pull)), rtol, rtol)


def test_a_mean_pool_is_a_sum_on_a_gpu():
    x = jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32)
    text = jax.jit(pooling.mean_pool).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.reduce" in text and "stablehlo.dot_general" not in text


def test_a_mean_pool_leaves_the_convolutions_before_it_programs_of_their_own():
    def answer(pool, x, kernels):
        for kernel in kernels:
            x = nn.relu(conv.conv(x, kernel, (1, 1), "SAME", dimension_numbers=conv.CHANNELS_LAST))
        return pool(x)

    x, kernels = jnp.ones((1, 4, 4, 256)), [jnp.ones((3, 3, 256, 256))] * 2
    text = jax.jit(partial(answer, pooling.mean_pool)).lower(x, kernels).compile().as_text()
    programs = [part for part in text.split("\n\n") if "ENTRY" not in part]
    assert max(part.count(" convolution(") for part in programs) <= 1


def with_gradients(layer, variables, x):
    """A layer's output, and its gradients in the variables and in x; traced anew at each call."""

    @jax.jit
    def run(variables, x):
        y, pull = jax.vjp(layer.apply, variables, x)
        return y, pull(jnp.cos(y))

    return run(variables, x)


@pytest.mark.parametrize(
    ("window", "padding", "strides", "dtype", "rtol"),
    [
        ((3, 3), "SAME", 1, jnp.float32, 2e-6),
        ((3, 2), ((0, 2), (1, 0)), 1, jnp.float32, 2e-6),
        ((5, 3), "VALID", 1, jnp.float32, 2e-6),
        ((1, 1), 0, 1, jnp.float32, 2e-6),
        ((3, 3), 1, 1, jnp.bfloat16, 1e-2),
        ((3, 3), 1, 2, jnp.float32, 2e-6),
        ((3, 2), ((2, 0), (1, 1)), (2, 3), jnp.float32, 2e-6),
        ((1, 1), 0, 2, jnp.float32, 2e-6),
    ],
)
def test_conv_is_linens_and_its_gradient_by_rows_too(window, padding, strides, dtype, rtol, monkeypatch):
    calls = []
    by_rows = conv.by_rows
    monkeypatch.setattr(conv, "by_rows", lambda *args: calls.append(args) or by_rows(*args))
    monkeypatch.setattr(conv, "one_device", lambda: True)
    monkeypatch.setattr(conv, "TILE", 20_000)  # some examples at a time, of the six
    rng = np.random.default_rng(0)
    x, variables = jnp.asarray(rng.normal(size=(6, 7, 5, 16)), dtype), None
    found = []
    for more in ({}, {"conv_general_dilated": conv.conv}):
        layer = nn.Conv(32, window, strides, padding, **more)
        variables = variables or jax.tree.map(lambda a: a.astype(dtype), layer.init(jax.random.key(0), x))
        found.append(with_gradients(layer, variables, x))
    assert len(calls) == 1
    (y, (dv, dx)), (own_y, (own_dv, own_dx)) = found
    np.testing.assert_array_equal(own_y, y)
    np.testing.assert_array_equal(own_dx, dx)
    for a, b in zip(jax.tree.leaves(own_dv), jax.tree.leaves(dv), strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("window", "padding", "strides"),
    [((3, 3), 1, 1), ((3, 3), "SAME", 2), ((3, 2), ((2, 0), (1, 1)), (2, 3)), ((1, 1), 0, 2), ((2, 2), 1, (4, 5))],
)
def test_canonical_gradients_of_other_convolutions_are_xlas_bit_for_bit(window, padding, strides, monkeypatch):
    monkeypatch.setattr(conv, "one_device", lambda: True)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 7, 6, 12)), jnp.float32)
    plain = nn.Conv(300, window, strides, padding)
    variables = plain.init(jax.random.key(0), x)
    found = []
    for layer in (plain, plain.clone(conv_general_dilated=conv.conv)):
        assert ("custom_vjp" in str(jax.make_jaxpr(layer.apply)(variables, x))) == (layer is not plain)
        found.append(with_gradients(layer, variables, x))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("shape", "window", "more"),
    [
        ((4, 8, 8, 16), (3, 3), {"strides": 2, "precision": "highest"}),
        ((4, 8, 8, 16), (3, 3), {"feature_group_count": 4}),
        ((4, 9, 9, 16), (3, 3), {"kernel_dilation": 2, "padding": "SAME"}),
        ((4, 8, 8, 16), (1, 1), {"padding": 1}),
        ((4, 8, 8, 16), (3, 3), {"padding": ((0, 0), (3, 1))}),
        ((4, 8, 8, 16), (3, 3), {"padding": ((-1, 0), (0, -1)), "strides": 2}),
        ((0, 8, 8, 16), (3, 3), {}),
        ((4, 2, 2, 16), (3, 3), {"padding": "VALID"}),
        ((4, 8, 16), (3,), {"strides": 2}),
        ((4, 5, 5, 5, 16), (2, 2, 2), {}),
    ],
)
def test_what_conv_does_not_know_is_laxs(shape, window, more):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain = nn.Conv(16, window, **more)
    variables = plain.init(jax.random.key(0), x)
    found = [
        jax.make_jaxpr(layer.apply)(variables, x) for layer in (plain, plain.clone(conv_general_dilated=conv.conv))
    ]
    assert str(found[0]) == str(found[1])


def test_conv_reads_channels_last_only_where_that_is_asked_for():
    x, kernel = jnp.ones((4, 16, 8, 8)), jnp.ones((32, 16, 3, 3))
    for more in ({}, {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}):
        assert conv.conv(x, kernel, (2, 2), "SAME", **more).shape == (4, 32, 4, 4)
    x, kernel = jnp.ones((4, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 32), jnp.bfloat16)
    more = {"dimension_numbers": conv.CHANNELS_LAST, "preferred_element_type": jnp.float32}
    assert conv.conv(x, kernel, (2, 2), "SAME", **more).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("features", [24, 300])
def test_in_loops_and_branches_convolutions_are_of_the_form_that_xla_has_a_fast_program_for(
    features, strides, dtype, monkeypatch
):
    """Its own rewriting leaves these out: a ResNet-20's step took 30 times as long there."""
    monkeypatch.setattr(conv, "one_device", lambda: True)
    x = jnp.ones((4, 8, 8, 24), dtype)
    forms = []
    for more in ({}, {"conv_general_dilated": conv.conv}):
        layer = nn.Conv(features, (3, 3), strides, use_bias=False, param_dtype=dtype, **more)

        def run(variables, x, layer=layer):
            grad = jax.grad(lambda args: (layer.apply(*args) ** 2).sum())
            args = jax.lax.cond((x > 0).all(), grad, lambda args: args, (variables, x))
            return jax.lax.scan(lambda args, _: (grad(args), None), args, None, length=3)[0]

        text = jax.jit(run).lower(layer.init(jax.random.key(0), x), x).compile().as_text()
        forms.append(set(re.findall(r"dim_labels=(\S+?)[,\s]", text)))
    assert len(forms[0]) > 1 and forms[1] == {"b01f_01io->b01f"}, forms


@pytest.mark.parametrize(
    ("window", "padding", "channels", "dtype", "forward"),
    [
        ((5, 5), 2, (1, 6), jnp.float32, ["by_groups"] * 2),
        ((5, 3), "VALID", (6, 3), jnp.float32, ["by_groups", "by_groups", "by_band"]),
        ((2, 3), ((1, 0), (0, 2)), (2, 2), jnp.float32, ["by_groups"] * 2),
        ((3, 3), 1, (15, 16), jnp.float32, ["by_groups"] * 2),
        ((3, 3), 1, (3, 30), jnp.float32, ["by_groups"]),
        ((3, 3), 1, (3, 64), jnp.float32, []),
        ((3, 3), 1, (3, 16), jnp.bfloat16, ["by_band"]),
        ((5, 5), "VALID", (6, 16), jnp.bfloat16, ["by_band"] * 2),
    ],
)
def test_conv_of_few_channels_is_linens(window, padding, channels, dtype, forward, monkeypatch):
    calls = []

    def watched(name, by, *args):
        calls.append(name)
        return by(*args)

    for name in ("by_groups", "by_band"):
        monkeypatch.setattr(conv, name, partial(watched, name, getattr(conv, name)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 9, 33, channels[0])), dtype)
    plain = nn.Conv(channels[1], window, padding=padding)
    variables = jax.tree.map(lambda a: a.astype(dtype), plain.init(jax.random.key(0), x))
    found = [with_gradients(layer, variables, x) for layer in (plain, plain.clone(conv_general_dilated=conv.conv))]
    assert sorted(calls) == sorted([*forward, "by_band"])
    rtol = 5e-2 if dtype == jnp.bfloat16 else 2e-5
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max())


def test_conv_of_few_channels_is_xlas_on_a_gpu():
    def run(x, kernel):
        convolve = partial(conv.conv, strides=(1, 1), padding="SAME", dimension_numbers=conv.CHANNELS_LAST)
        return jax.vjp(convolve, x, kernel)[1](x)

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 24, 24, 3), (3, 3, 3, 3))]
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in text and "stablehlo.dot_general" not in text


def in_steps(x):
    """Of many ties, which have a gradient."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


@pytest.mark.parametrize(
    ("window", "padding", "activation", "dtype"),
    [
        ((5, 5), 2, nn.relu, jnp.float32),
        ((5, 5), 2, nn.relu, jnp.float64),
        ((5, 3), 0, nn.tanh, jnp.float64),
        ((1, 3), 1, nn.gelu, jnp.float64),  # which falls and rises
        ((3, 1), 3, in_steps, jnp.float64),
    ],
)
def test_conv_pool_is_linens_layers(window, padding, activation, dtype, monkeypatch):
    monkeypatch.setattr(conv_pool, "one_device", lambda: True)
    monkeypatch.setattr(conv_pool, "ELEMENTWISE", (*conv_pool.ELEMENTWISE, in_steps))
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 11 + window[0], 7 + window[1], 3)), dtype)
        layer = conv_pool.ConvPool(4, window, padding, activation)

        class Linens(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = nn.Conv(4, window, padding=padding, name="conv")(x)
                return nn.max_pool(activation(y), (2, 2), (2, 2))

        variables = jax.tree.map(lambda a: a.astype(dtype), layer.init(jax.random.key(0), x))
        variables["params"]["bias"] += 0.1
        found = with_gradients(layer, variables, x)
        assert "custom_vjp" in str(jax.make_jaxpr(layer.apply)(variables, x))
        output, (by_variables, by_x) = with_gradients(Linens(), {"params": {"conv": variables["params"]}}, x)
        expected = output, ({"params": by_variables["params"]["conv"]}, by_x)
        rtol = 1e-12 if dtype == jnp.float64 else 2e-5
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol, rtol * float(abs(b).max()))


def test_conv_pool_hides_no_nan(monkeypatch):
    monkeypatch.setattr(conv_pool, "one_device", lambda: True)
    monkeypatch.setattr(conv_pool, "ELEMENTWISE", (jnp.sqrt,))
    x = jnp.ones((16, 4, 4, 1)).at[:, 3, 0].set(-1)
    layer = conv_pool.ConvPool(1, (1, 1), 0, jnp.sqrt)
    y, _ = jax.vjp(layer.apply, {"params": {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)}}, x)
    assert np.isnan(y[:, 1, 0, 0]).all() and np.isnan(y).sum() == 16


@pytest.mark.parametrize("shape", [(8, 8, 8, 1), (16, 9, 8, 1)])
def test_a_conv_pool_of_few_examples_or_an_odd_size_is_plain(shape, monkeypatch):
    monkeypatch.setattr(conv_pool, "one_device", lambda: True)
    layer, x = conv_pool.ConvPool(2, (3, 3), 1, nn.tanh), jnp.ones(shape)
    monkeypatch.setattr(conv_pool, "_conv_pool", None)
    assert layer.apply(layer.init(jax.random.key(0), x), x).shape == (shape[0], 4, 4, 2)


def test_a_conv_pool_takes_any_activation_and_by_the_known_ones_its_own_way(monkeypatch):
    monkeypatch.setattr(conv_pool, "one_device", lambda: True)
    x = jax.random.normal(jax.random.key(1), (16, 6, 6, 2))
    for activation in (nn.softmax, nn.standardize):  # over the features of a pixel
        layer = conv_pool.ConvPool(4, (3, 3), 1, activation)
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        differentiated = jax.jit(lambda *args, apply=layer.apply: jax.vjp(apply, *args)[0])
        np.testing.assert_allclose(differentiated(variables, x), jax.jit(layer.apply)(variables, x), 1e-6, 1e-6)
    value = jnp.linspace(-7, 7, 24)
    for activation in conv_pool.ELEMENTWISE:
        one_by_one = jax.vmap(activation)(value)
        np.testing.assert_allclose(activation(value.reshape(2, 3, 4)), one_by_one.reshape(2, 3, 4), 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("model", "image"), [(lenet.LeNet5(classes=3), (28, 28, 1)), (resnet.ResNet((1,), width=16, classes=3), (9, 9, 3))]
)
def test_a_model_is_exported_for_any_batch(model, image, monkeypatch):
    for file in (conv, conv_pool):
        monkeypatch.setattr(file, "one_device", lambda: True)
    x = jax.random.normal(jax.random.key(1), (20, *image))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    open_batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *image), x.dtype)
    exported = jax.export.export(jax.jit(model.apply))(variables, open_batch)
    np.testing.assert_allclose(exported.call(variables, x), jax.jit(model.apply)(variables, x), 1e-5, 1e-5)


@pytest.mark.parametrize("channels", [(3, 8), (16, 32), (8, 300)])
def test_conv_inside_shard_map_and_over_explicit_meshes_is_laxs(channels):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 8, 8, channels[0])), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, *channels)), jnp.float32)
    convolve = partial(conv.conv, strides=(1, 1), padding="SAME", dimension_numbers=conv.CHANNELS_LAST)
    want = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=conv.CHANNELS_LAST)

    def gradient(kernel, x):
        return jax.grad(lambda kernel: convolve(x, kernel).sum())(kernel)

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    np.testing.assert_allclose(jax.jit(spread)(kernel, x), gradient(kernel, x), rtol=1e-4, atol=1e-3)
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))):
        np.testing.assert_array_equal(jax.jit(convolve)(jax.device_put(x, P("d")), kernel), want)


def test_mean_pool_inside_shard_map_and_over_explicit_meshes_is_the_mean():
    x = jax.random.normal(jax.random.key(0), (4, 6, 5, 3))

    def both(x):
        y, pull = jax.vjp(pooling.mean_pool, x)
        return y, pull(y)[0]

    def equal(found, want):
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, 1e-6, 1e-6)

    want = both(x)
    np.testing.assert_allclose(want[0], x.mean((1, 2)), 1e-6, 1e-6)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    equal(jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(x), want)
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))):
        equal(jax.jit(both)(jax.device_put(x, P("d"))), want)


@pytest.mark.parametrize("model", [cnn.CNN((16, 16), (8,), classes=3), resnet.ResNet((1,), width=16, classes=3)])
def test_a_step_by_rows_is_the_plain_one_with_as_many_flops(model, monkeypatch):
    image = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), image)

    def loss(params, image):
        logits, _ = model.apply({**variables, "params": params}, image, True, mutable=["batch_stats"])
        return (logits**2).sum()

    gradients, counts = [], []
    for rows in (False, True):
        monkeypatch.setattr(conv, "one_device", lambda rows=rows: rows)
        traced = jax.jit(jax.grad(lambda params, image: loss(params, image))).trace(variables["params"], image)
        counts.append(flops.count(traced.jaxpr.jaxpr))
        gradients.append(traced.lower().compile()(variables["params"], image))
    assert counts[0] == counts[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *gradients)


def normed(module: type[nn.Module], dtype, *, train: bool, x, cotangent):
    """Output, new statistics and the gradients in x, scale and bias of a batch norm with given variables."""
    rng = np.random.default_rng(1)
    scale, bias, mean, var = (jnp.asarray(v, jnp.float32) for v in rng.uniform(0.5, 2, (4, x.shape[-1])))
    wide = jnp.promote_types(dtype, jnp.float32)
    layer = module(use_running_average=not train, momentum=0.8, epsilon=1e-3)
    stats = {"mean": mean.astype(wide), "var": var.astype(wide)}

    @jax.jit
    def run(params, x):
        def apply(params, x):
            return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

        y, pull, changed = jax.vjp(apply, params, x, has_aux=True)
        return y, changed, pull(cotangent)

    return run({"scale": scale.astype(dtype), "bias": bias.astype(dtype)}, x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2), (jnp.float64, 1e-13)], ids=["f32", "bf16", "f64"]
)
def test_batch_norm_is_linens(dtype, rtol, train):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(rng.normal(3, 2, (5, 4, 3, 6)), dtype).at[..., 0].set(2)  # a channel of no variance
        cotangent = jnp.asarray(rng.normal(size=x.shape), dtype)
        own = normed(norm.BatchNorm, dtype, train=train, x=x, cotangent=cotangent)
        linen = normed(nn.BatchNorm, dtype, train=train, x=x, cotangent=cotangent)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), own) == jax.tree.map(lambda a: (a.shape, a.dtype), linen)
        for a, b in zip(jax.tree.leaves(own[:2]), jax.tree.leaves(linen[:2]), strict=True):
            np.testing.assert_array_equal(a, b)  # the forward pass has Linen's bits
        for a, b in zip(jax.tree.leaves(own[2]), jax.tree.leaves(linen[2]), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_batch_norm_differentiates_what_it_tells_of_the_batch():
    """Against autodiff of the formula, cotangents of the mean and the variance too."""
    rng = np.random.default_rng(2)
    x, cy = rng.normal(1, 2, (2, 7, 3))
    scale, bias, cmean, cvar = rng.uniform(0.5, 2, (4, 3))

    def formula(x, scale, bias):
        mean, var = x.mean(0), x.var(0)
        return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias, mean, var

    with jax.enable_x64(True):
        expected = jax.vjp(formula, x, scale, bias)[1]((cy, cmean, cvar))
        own = jax.vjp(lambda *args: norm.batch_norm(1e-3, *args), x, scale, bias)[1]((cy, cmean, cvar))
    for a, b in zip(own, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_batch_norm_covers_the_global_batch_on_four_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 8, 2, 2, 3)), jnp.float32)
    split = jax.device_put((x, cotangent), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    one = normed(norm.BatchNorm, jnp.float32, train=True, x=x, cotangent=cotangent)
    four = normed(norm.BatchNorm, jnp.float32, train=True, x=split[0], cotangent=split[1])
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batch_norm_inside_shard_map_is_of_each_devices_part():
    rng = np.random.default_rng(0)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 8, 2, 3)), jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def gradients(scale, bias, x, cotangent):
        def loss(scale, bias, x):
            return (norm.batch_norm(1e-3, x, scale, bias)[0] * cotangent).sum()

        return jax.grad(loss, (0, 1, 2))(scale, bias, x)

    split = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=(P(), P(), P("data"))
    )
    scale, bias = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    dscale, dbias, dx = jax.jit(split)(scale, bias, x, cotangent)
    parts = [gradients(scale, bias, x[half], cotangent[half]) for half in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(dscale, parts[0][0] + parts[1][0], 1e-5, 1e-5)
    np.testing.assert_allclose(dbias, parts[0][1] + parts[1][1], 1e-5, 1e-5)
    np.testing.assert_allclose(dx, np.concatenate([part[2] for part in parts]), 1e-5, 1e-5)


def test_batch_norm_refuses_a_forward_mode_derivative():
    x = jnp.ones((4, 2))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: norm.batch_norm(1e-3, x, x[0], x[0])[0], (x,), (x,))


@pytest.mark.parametrize("depth, count", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)])
def test_the_imagenet_family_has_the_published_sizes(depth, count):
    model = getattr(resnet, f"ImageNetResNet{depth}")()
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 1000)


def test_a_bottleneck_strides_in_its_middle_and_starts_as_its_shortcut():
    block = resnet.Bottleneck(4, stride=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
    variables = jax.jit(lambda x: block.init(jax.random.key(0), x, False))(x)
    first = jax.eval_shape(lambda v: block.apply(v, x, False, capture_intermediates=True)[1], variables)
    shapes = {name: first["intermediates"][name]["__call__"][0].shape for name in ("Conv_0", "Conv_1", "Conv_2")}
    assert shapes == {"Conv_0": (2, 6, 6, 4), "Conv_1": (2, 3, 3, 4), "Conv_2": (2, 3, 3, 16)}
    kernel = variables["params"]["Conv_3"]["kernel"][0, 0]
    shortcut = np.maximum(np.asarray(x[:, ::2, ::2]) @ np.asarray(kernel) / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(
        jax.jit(lambda v, x: block.apply(v, x, False))(variables, x), shortcut, rtol=1e-5, atol=1e-5
    )
