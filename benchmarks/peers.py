"""The peers that side_by_side.py times: the same networks in plain Linen and PyTorch, with their usual step and loop.

Plain Linen is as in the Flax examples: `nn.Conv`, `nn.BatchNorm`, `nn.max_pool`, a TrainState, a jitted step over a
batch; its loop indexes numpy arrays by a permutation and fetches loss and accuracy at a log line. PyTorch takes
channels_last, and its modules are named as Linen's, so that weights are copied by name; its loop is a DataLoader over a
TensorDataset, in this process, and counts no accuracy. Both loops hold bytes and normalise a batch on the device.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

torch: Any
try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch = None
except Exception as error:  # its libraries clash with JAX's: ours are measured without it
    print(f"PyTorch is left out: {type(error).__name__}: {error}")
    torch = None

LEARNING_RATE, MOMENTUM = 0.01, 0.9
Step = Callable[..., Any]

# -- plain Linen -------------------------------------------------------------------------------------------------------


def pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))  # pyright: ignore[reportReturnType]


class MLP(nn.Module):
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = pool(nn.relu(nn.Conv(6, (5, 5), padding=2, name="C1")(x)))
        x = pool(nn.relu(nn.Conv(16, (5, 5), padding=0, name="C3")(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, name="C5")(x))
        x = nn.relu(nn.Dense(84, name="F6")(x))
        return nn.Dense(10, name="OUTPUT")(x)


class CNN(nn.Module):
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train=False):
        for features in self.features:
            x = pool(nn.relu(nn.Conv(features, (3, 3))(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


Conv = partial(nn.Conv, use_bias=False)


class Block(nn.Module):
    features: int
    stride: int
    projection: bool

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(Conv(self.features, (3, 3), self.stride, 1)(x)))
        y = norm()(Conv(self.features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            if self.projection:
                x = norm()(Conv(self.features, (1, 1), self.stride, 0)(x))
            else:
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    features: int
    stride: int
    projection: bool

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(Conv(self.features, (1, 1), padding=0)(x)))
        y = nn.relu(norm()(Conv(self.features, (3, 3), self.stride, 1)(y)))
        y = norm()(Conv(4 * self.features, (1, 1), padding=0)(y))
        if x.shape != y.shape:
            x = norm()(Conv(4 * self.features, (1, 1), self.stride, 0)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    blocks: tuple[int, ...]
    width: int
    projection: bool
    large: bool = False  # ResNet-50's stem and bottlenecks

    @nn.compact
    def __call__(self, x, train=False):
        x = Conv(self.width, (7, 7), 2, 3)(x) if self.large else Conv(self.width, (3, 3), padding=1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        block = Bottleneck if self.large else Block
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                x = block(self.width * 2**stage, 2 if stage and not i else 1, self.projection)(x, train)
        return nn.Dense(1000 if self.large else 10)(x.mean((1, 2)))


def linen_state(model: nn.Module, params: Any) -> TrainState:
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True))


def linen_loss(model: nn.Module, dtype: Any, params: Any, mutable: Any, image: jax.Array, label: jax.Array) -> Any:
    variables = {"params": optax.tree.cast(params, dtype), **mutable}
    logits, mutable = model.apply(variables, image.astype(dtype), train=True, mutable=list(mutable))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label).mean()
    return loss, ({**mutable}, (logits.argmax(-1) == label).mean())


def normalized(image: jax.Array) -> jax.Array:
    return (image.astype(jnp.float32) / 255 - 0.5) / 0.25


def linen_step(model: nn.Module, dtype: Any, prepare: Callable[[Any], Any] = lambda image: image) -> Step:
    """(state, mutable, image [B, H, W, C], label [B]) -> state, mutable, loss, accuracy."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(state, mutable, image, label):
        gradient = jax.value_and_grad(partial(linen_loss, model, dtype), has_aux=True)
        (loss, (mutable, accuracy)), grads = gradient(state.params, mutable, prepare(image), label)
        return state.apply_gradients(grads=grads), mutable, loss, accuracy

    return step


def linen_loop(
    step: Step, image: np.ndarray, label: np.ndarray, batch: int, state: TrainState, mutable: Any, every: int
) -> Iterator[float]:
    """As the Flax examples train: numpy arrays on the host, shuffled anew each epoch; yields the loss at a log line."""
    random, seen = np.random.default_rng(0), []
    while True:
        order = random.permutation(len(image))
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            state, mutable, loss, accuracy = step(state, mutable, image[rows], label[rows])
            seen.append((loss, accuracy))
            if len(seen) == every:
                mean_loss, _ = np.mean(jax.device_get(seen), axis=0)
                seen.clear()
                yield float(mean_loss)


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def torch_image(image: Any) -> Any:
    """[B, H, W, C] -> [B, C, H, W] on the device, channels_last."""
    return torch.from_numpy(np.array(image)).permute(0, 3, 1, 2).to(device()).to(memory_format=torch.channels_last)


def torch_label(label: Any) -> Any:
    return torch.from_numpy(np.array(label)).long().to(device())


def torch_model(model: nn.Module, channels: int, side: int) -> Any:
    """The PyTorch module of a plain Linen one of this file; takes [B, C, H, W]."""
    t, functional, module = torch.nn, torch.nn.functional, torch.nn.Module

    def flat(x):
        return x.permute(0, 2, 3, 1).flatten(1)  # in Linen's order; free, as the memory is channels_last

    class Stack(module):
        """Convolutions, each pooled, then dense layers, by Linen's names."""

        def __init__(self, convs, denses):
            super().__init__()
            self.convs, self.denses = [name for name, _ in convs], [name for name, _ in denses]
            for name, layer in [*convs, *denses]:
                self.add_module(name, layer)

        def forward(self, x):
            for name in self.convs:
                x = functional.max_pool2d(functional.relu(getattr(self, name)(x)), 2)
            x = flat(x)
            for name in self.denses[:-1]:
                x = functional.relu(getattr(self, name)(x))
            return getattr(self, self.denses[-1])(x)

    def convolution(c, d, k, stride=1):
        return t.Conv2d(c, d, k, stride, k // 2, bias=False)

    def norm(c):
        return t.BatchNorm2d(c, eps=1e-5, momentum=0.1)

    class TorchBlock(module):
        def __init__(self, c, features, stride, projection, bottleneck):
            super().__init__()
            self.bottleneck, self.stride = bottleneck, stride
            out = 4 * features if bottleneck else features
            sizes = [(c, features, 1, 1), (features, features, 3, stride), (features, out, 1, 1)]
            sizes = sizes if bottleneck else [(c, features, 3, stride), (features, features, 3, 1)]
            self.depth, self.extra = len(sizes), out - c
            changed = stride > 1 or c != out
            sizes += [(c, out, 1, stride)] if changed and projection else []
            self.projects = len(sizes) > self.depth
            for i, size in enumerate(sizes):
                self.add_module(f"Conv_{i}", convolution(*size))
                self.add_module(f"BatchNorm_{i}", norm(size[1]))

        def layer(self, i, x):
            return getattr(self, f"BatchNorm_{i}")(getattr(self, f"Conv_{i}")(x))

        def forward(self, x):
            y = x
            for i in range(self.depth):
                y = self.layer(i, y)
                y = functional.relu(y) if i < self.depth - 1 else y
            if self.projects:
                x = self.layer(self.depth, x)
            elif self.extra:
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
            return functional.relu(x + y)

    class TorchResNet(module):
        def __init__(self, net):
            super().__init__()
            self.Conv_0 = convolution(channels, net.width, *((7, 2) if net.large else (3,)))
            self.BatchNorm_0 = norm(net.width)
            self.pool = t.MaxPool2d(3, 2, 1) if net.large else t.Identity()
            self.names, c = [], net.width
            kind = "Bottleneck" if net.large else "Block"
            for stage, blocks in enumerate(net.blocks):
                for i in range(blocks):
                    features = net.width * 2**stage
                    block = TorchBlock(c, features, 2 if stage and not i else 1, net.projection, net.large)
                    c = 4 * features if net.large else features
                    self.names.append(f"{kind}_{len(self.names)}")
                    self.add_module(self.names[-1], block)
            self.Dense_0 = t.Linear(c, 1000 if net.large else 10)

        def forward(self, x):
            x = self.pool(functional.relu(self.BatchNorm_0(self.Conv_0(x))))
            for name in self.names:
                x = getattr(self, name)(x)
            return self.Dense_0(x.mean((2, 3)))

    if isinstance(model, ResNet):
        return TorchResNet(model)
    if isinstance(model, LeNet):
        convs = [("C1", t.Conv2d(channels, 6, 5, padding=2)), ("C3", t.Conv2d(6, 16, 5))]
        widths = ((side // 2 - 4) // 2) ** 2 * 16, 120, 84, 10
        names = ["C5", "F6", "OUTPUT"]
    elif isinstance(model, CNN):
        widths = (channels, *model.features)
        convs = [(f"Conv_{i}", t.Conv2d(c, d, 3, padding=1)) for i, (c, d) in enumerate(itertools.pairwise(widths))]
        widths = (side // 2 ** len(convs)) ** 2 * model.features[-1], 128, 10
        names = ["Dense_0", "Dense_1"]
    else:
        assert isinstance(model, MLP)
        convs, widths = [], (channels * side**2, *model.features, 10)
        names = [f"Dense_{i}" for i in range(len(widths) - 1)]
    return Stack(
        convs, [(name, t.Linear(c, d)) for name, (c, d) in zip(names, itertools.pairwise(widths), strict=True)]
    )


def by_linens_names(module: Any, tensors: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """What `tensors` takes of each parameter, by Linen's path and in Linen's layout."""
    found = {}
    for name, parameter in module.named_parameters():
        path, _, kind = name.rpartition(".")
        array = tensors(parameter)
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        found["/".join([*path.split("."), kind])] = array
    return found


def by_path(params: Any) -> dict[str, np.ndarray]:
    """Linen's parameters by path, Dense_0/kernel say."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def copy_weights(params: dict[str, np.ndarray], module: Any) -> None:
    """Linen's parameters, by path, into the module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            path, _, kind = name.rpartition(".")
            kind = {1: "scale"}.get(parameter.ndim, "kernel") if kind == "weight" else kind
            array = np.array(params["/".join([*path.split("."), kind])])
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)))


def torch_step(module: Any, precision: str) -> Step:
    """(image [B, C, H, W] channels_last, label [B]) -> loss, after the optimizer's step."""
    cross_entropy, where = torch.nn.functional.cross_entropy, device()
    fused = where == "cuda" or None
    sgd = torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True, fused=fused)
    module.train()

    def step(image, label):
        sgd.zero_grad(set_to_none=True)
        with torch.autocast(where, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = cross_entropy(module(image).float(), label)
        loss.backward()
        sgd.step()
        return loss

    return step


def torch_loop(step: Step, image: np.ndarray, label: np.ndarray, batch: int, every: int) -> Iterator[float]:
    """As the PyTorch examples train: a DataLoader over tensors on the host; yields the loss at a log line."""
    where, images = device(), torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    dataset = torch.utils.data.TensorDataset(images, torch.from_numpy(label).long())
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True, pin_memory=where == "cuda")
    at = 0
    while True:
        for x, y in loader:
            x, y = x.to(where, non_blocking=True), y.to(where, non_blocking=True)
            x = x.float().div_(255).sub_(0.5).div_(0.25).to(memory_format=torch.channels_last)
            loss = step(x, y)
            at += 1
            if at % every == 0:
                yield loss.item()
