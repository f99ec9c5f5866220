"""The recipe of experiments/cifar_speedrun.py in PyTorch: the peer that it is timed beside.

    python benchmarks/speedrun_torch.py --runs=4

Data, whitening kernel, steps and every field of its Config are the experiment's own, taken before the clock begins. The
rest is as PyTorch does it best: channels_last, weights in float16 on a GPU, the whole set augmented on the device once
an epoch, whose last examples are left out where they fill no batch, no gradient through the whitening's bias once that
is fixed, and `torch.compile`, on a GPU in mode max-autotune, which tries out the network's kernels and replays them as
a CUDA graph. The first run compiles and is not counted. As a sum, not a mean, the loss keeps its gradients within
float16; SGD's rates are divided accordingly.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from jaxcompute.errors import BadInput, line_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BETA, MOMENTUM = 0.6, 0.85  # of Muon, of SGD


class Split(NamedTuple):
    image: Any  # uint8 [N, 3, H, W] on the device
    label: Any  # int64 [N]


class Task(NamedTuple):
    """What the experiment says."""

    config: Any
    steps: int
    train: Split
    test: Split
    mean: Any  # of the pixels 0 to 255, [3, 1, 1]
    std: Any
    kernel: Any  # of the whitening, [24, 3, 2, 2]
    dtype: Any  # of weights and images


class Run(NamedTuple):
    seed: int
    train_s: float  # from the images as bytes on the device to the last step
    eval_s: float  # of all the test images, once
    accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="that count, each with a seed of its own")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    modes = ["default", "max-autotune"]
    parser.add_argument("--mode", choices=modes, default=modes[CUDA], help="of the network's torch.compile")
    parser.add_argument("--precision", choices=["float16", "float32"], default="float16" if CUDA else "float32")
    parser.add_argument("--epochs", type=float, help="the experiment's by default")
    parser.add_argument("--batch_size", type=int, help="the experiment's by default")
    parser.add_argument("--examples", type=int, help="of each split; all by default")
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the GPU is PyTorch's alone
    try:
        task = recipe(given)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(measure(task, given)))


def measure(task: Task, given: argparse.Namespace) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    began, net, mode = time.perf_counter(), network(task), given.mode if given.compile else None
    try:
        call, newton_schulz = calls(net, mode)
        run(0, task, net, call, newton_schulz)
    except Exception as error:
        if not mode:
            raise
        print(f"torch.compile does not run here: {line_of(error)[:300]}", file=sys.stderr, flush=True)
        mode = None
        call, newton_schulz = calls(net, mode)
        run(0, task, net, call, newton_schulz)
    first = time.perf_counter() - began
    runs = [run(seed, task, net, call, newton_schulz) for seed in range(1, given.runs + 1)]
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    facts = {"torch": torch.__version__, "device": device, "precision": given.precision, "compiled": mode}
    return facts | {"first_run_s": first, "runs": [one._asdict() for one in runs]}


def calls(net: Any, mode: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if not mode:
        return net, orthogonal
    return torch.compile(net, mode=mode), torch.compile(orthogonal, dynamic=False)


def recipe(given: argparse.Namespace) -> Task:
    """Raises BadInput: no CIFAR-10, a length that is not positive, or fewer examples than a batch takes."""
    module = importlib.import_module("experiments.cifar_speedrun")
    fields = {name: getattr(given, name) for name in ("epochs", "batch_size") if getattr(given, name) is not None}
    config, data = module.Config(**fields), module.sources.load("cifar10")
    size = len(data.train["label"][: given.examples])
    if size < config.batch_size:
        raise BadInput(f"--batch_size={config.batch_size}: there are {size} examples; give a smaller one")
    steps = module.optim.total_steps(config, size)

    def split(arrays: dict[str, np.ndarray]) -> Split:
        image, label = (torch.from_numpy(arrays[key][: given.examples]).to(DEVICE) for key in ("image", "label"))
        return Split(image.permute(0, 3, 1, 2), label.long())

    import jax

    shape = (2, 2, 3, 24)
    kernel = np.array(module.whitening(data.train["image"][:5000])(jax.random.key(0), shape), np.float32)
    kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).contiguous()
    mean, std = (255 * torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (module.MEAN, module.STD))
    dtype = getattr(torch, given.precision)
    return Task(config, steps, split(data.train), split(data.test), mean, std, kernel, dtype)


# -- the network -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, kernel: Any, widths: tuple[int, ...] = (64, 256, 256), classes: int = 10):
        super().__init__()
        self.register_buffer("whitening", kernel)
        self.whitening_bias = nn.Parameter(torch.zeros(len(kernel)))
        self.convs, self.norms, channels = nn.ModuleList(), nn.ModuleList(), len(kernel)
        for width in [width for width in widths for _ in range(2)]:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.dirac_(conv.weight.data[:channels])
            norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
            norm.weight.requires_grad = False
            self.convs.append(conv)
            self.norms.append(norm)
            channels = width
        self.head = nn.Linear(channels, classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / channels)

    def forward(self, x: Any, bias_learns: bool = True) -> Any:
        bias = self.whitening_bias if bias_learns else self.whitening_bias.detach()
        x = F.gelu(F.conv2d(x, self.whitening, bias), approximate="tanh")
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = F.gelu(norm(x if i % 2 else F.max_pool2d(x, 2)), approximate="tanh")
        return self.head(x.amax((2, 3)))


def network(task: Task) -> Any:
    net = Net(task.kernel).to(DEVICE, task.dtype, memory_format=torch.channels_last)
    for norm in net.norms:
        norm.float()
    return net


# -- the optimizers ----------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """For kernels [D, C, h, w] that stay on the sphere of radius sqrt(D) (Jordan 2024)."""

    def __init__(self, kernels: Any, lr: float, orthogonal: Callable[[Any], Any]):
        super().__init__(kernels, {"lr": lr})
        self.orthogonal = orthogonal
        for kernel in kernels:
            self.state[kernel]["mean"] = torch.zeros_like(kernel)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            at = group["at"] = group.get("at", 0) + 1
            nesterov = BETA * (1 - BETA**at) / (1 - BETA ** (at + 1))  # as Optax corrects the first means
            for kernel in group["params"]:
                mean = self.state[kernel]["mean"]
                mean.mul_(BETA).add_(kernel.grad)
                update = self.orthogonal(kernel.grad.add(mean, alpha=nesterov).reshape(len(kernel), -1))
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
                kernel.add_(update.view_as(kernel), alpha=-group["lr"])


def orthogonal(gradient: Any) -> Any:
    """The nearest half-orthogonal matrix, by three steps of a Newton-Schulz iteration of degree five."""
    x = gradient.bfloat16() if CUDA else gradient
    x = x / (x.norm() + 1e-8)
    x = x.T if gradient.shape[0] > gradient.shape[1] else x
    for _ in range(3):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if gradient.shape[0] > gradient.shape[1] else x
    return x.to(gradient.dtype)


def optimizers(net: Any, config: Any, newton_schulz: Callable[[Any], Any]) -> tuple[Muon, Any]:
    """Each group has its `peak` and the `share` of the run in which it falls to 0."""
    rows, epochs = config.batch_size, config.epochs

    def group(params: list[Any], peak: float, share: float = 1.0) -> dict[str, Any]:
        decay = config.weight_decay / peak * rows if peak else 0.0
        return {"params": params, "lr": peak / rows, "peak": peak / rows, "weight_decay": decay, "share": share}

    groups = [
        group([norm.bias for norm in net.norms], config.bias_learning_rate),
        group([net.whitening_bias], config.bias_learning_rate, min(1.0, config.whitening_epochs / epochs)),
        group([net.head.weight], config.head_learning_rate),
    ]
    muon = Muon([conv.weight for conv in net.convs], config.learning_rate, newton_schulz)
    muon.param_groups[0].update(peak=config.learning_rate, share=1.0)
    return muon, torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, fused=CUDA)


# -- what is seen of an image ------------------------------------------------------------------------------------------


def batches(config: Any, train: Split, image: Any, epochs: int) -> Iterator[tuple[int, Any, Any]]:
    """Endless but for `epochs`: each image moved a little, and mirrored every other epoch."""
    size, shift, rows = len(image), config.translate, config.batch_size
    first = torch.rand(size, device=DEVICE) < 0.5
    image = torch.where(first[:, None, None, None], image.flip(3), image)
    padded = F.pad(image, (shift,) * 4, "reflect")
    side, at = image.shape[2], torch.arange(size, device=DEVICE)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # a view [N, 3, y, x, side, side]
    for epoch in range(epochs):
        y, x = torch.randint(2 * shift + 1, (2, size), device=DEVICE)
        moved = windows[at, :, y, x]
        moved = (moved.flip(3) if epoch % 2 else moved).contiguous(memory_format=torch.channels_last)
        for index in torch.randperm(size, device=DEVICE).split(rows)[: size // rows]:
            yield epoch, moved[index], train.label[index]


def views(image: Any) -> Iterator[tuple[float, Any]]:
    """As it is (half of it), a pixel up and left, a pixel down and right, and each mirrored."""
    side, padded = image.shape[2], F.pad(image, (1, 1, 1, 1), "reflect")
    corners = padded[:, :, :side, :side], padded[:, :, 2:, 2:]
    for weight, view in ((0.25, image), *((0.125, corner) for corner in corners)):
        for seen in (view, view.flip(3)):
            yield weight, seen.contiguous(memory_format=torch.channels_last)


# -- a run -------------------------------------------------------------------------------------------------------------


def run(seed: int, task: Task, net: Any, call: Callable[..., Any], newton_schulz: Callable[..., Any]) -> Run:
    """Whole training, of the net begun anew, and one evaluation. `call` is the net's, perhaps compiled."""
    config, steps, train, test = task.config, task.steps, task.train, task.test
    torch.manual_seed(seed)
    net.load_state_dict(network(task).state_dict())
    muon, sgd = optimizers(net, config, newton_schulz)
    rows, size = config.batch_size, len(train.label)

    def pixels(split: Split) -> Any:
        image = (split.image.float() - task.mean) / task.std
        return image.to(task.dtype, memory_format=torch.channels_last)

    began = clock()
    net.train()
    fed = batches(config, train, pixels(train), -(-steps // (size // rows)))
    for at, (epoch, image, label) in zip(range(steps), fed, strict=False):
        logits = call(image, epoch < config.whitening_epochs)
        learn(loss_of(logits, label, config), muon, sgd, at, steps)
    trained = clock()
    net.eval()
    right = torch.zeros((), device=DEVICE)
    with torch.no_grad():
        for image, label in zip(pixels(test).split(rows), test.label.split(rows), strict=True):
            logits = torch.stack([weight * call(view) for weight, view in views(image)]).sum(0)
            right += (logits.argmax(1) == label).sum()
    accuracy = right.item() / len(test.label)
    return Run(seed, trained - began, clock() - trained, accuracy)


def loss_of(logits: Any, label: Any, config: Any) -> Any:
    return F.cross_entropy(logits.float(), label, label_smoothing=config.label_smoothing, reduction="sum")


def learn(loss: Any, muon: Muon, sgd: Any, at: int, steps: int) -> None:
    """A step of both optimizers, at the rates of step `at`."""
    muon.zero_grad(set_to_none=True)
    sgd.zero_grad(set_to_none=True)
    loss.backward()
    for group in (*muon.param_groups, *sgd.param_groups):
        group["lr"] = group["peak"] * max(0.0, 1 - at / (group["share"] * steps))
    muon.step()
    sgd.step()


def clock() -> float:
    """Seconds, once the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
