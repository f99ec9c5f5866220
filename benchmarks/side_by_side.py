"""This project's step beside a plain Linen step, PyTorch eager and torch.compile: the same work in one run.

    python benchmarks/side_by_side.py                          # training and inference, float32
    python benchmarks/side_by_side.py --precision=bfloat16 --work=resnet20,resnet18

First both sides must compute the same: same weights, same batch, loss and gradient within a tolerance, that of float32
through twenty layers (in float64 ResNet-18 and its PyTorch twin are 3e-8 apart, in float32 1e-3). Then they take
turns, A B C A B C, for some rounds; a ratio is the median over the rounds of theirs to ours, and beside it stand its
quartiles. Warm-up and compile are timed apart. On the CPU all share one pinned core and CPU time counts; on a GPU wall
time with synchronisation.

Ours is the compiled step of the training loop: it gathers its batch out of the set on the device, normalises it and
sums its metrics. The peers are given a batch that is ready.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

CORE = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
RESULTS = Path(__file__).parent / "results"
EXAMPLES = 1024  # in the set on the device, made up


class Work(NamedTuple):
    """A network and what it is trained on."""

    own: str  # jaxcompute.models, as module.name
    options: dict[str, Any]
    plain: Callable[[Any], Any]  # of benchmarks/peers.py
    image: tuple[int, int, int]
    batch: int
    classes: int = 10


WORKS = {
    "mlp": Work("mlp.MLP", {"features": (1024, 1024)}, lambda p: p.MLP((1024, 1024)), (28, 28, 1), 512),
    "lenet": Work("lenet.LeNet5", {}, lambda p: p.LeNet(), (28, 28, 1), 128),
    "cnn": Work("cnn.CNN", {}, lambda p: p.CNN((64, 64, 64)), (28, 28, 1), 128),
    "resnet20": Work("resnet.ResNet20", {}, lambda p: p.ResNet((3, 3, 3), 16, False), (32, 32, 3), 128),
    "resnet18": Work("resnet.ResNet18", {}, lambda p: p.ResNet((2, 2, 2, 2), 64, True), (32, 32, 3), 32),
    "resnet18_b256": Work("resnet.ResNet18", {}, lambda p: p.ResNet((2, 2, 2, 2), 64, True), (32, 32, 3), 256),
    "resnet50": Work(
        "resnet.ImageNetResNet50", {}, lambda p: p.ResNet((3, 4, 6, 3), 64, True, True), (224, 224, 3), 256, 1000
    ),
    "tiny": Work("mlp.MLP", {"features": (8,)}, lambda p: p.MLP((8,)), (4, 4, 1), 8),  # for the tests
    "tiny_resnet": Work(
        "resnet.ResNet", {"blocks": (1, 1), "width": 4}, lambda p: p.ResNet((1, 1), 4, False), (8, 8, 3), 8
    ),
}
DEFAULT = "mlp,lenet,cnn,resnet20,resnet18,resnet18_b256"


class Contender(NamedTuple):
    name: str
    once: Callable[[], Any]  # dispatches one step
    wait: Callable[[Any], None]  # for the device to be done with it


class Timing(NamedTuple):
    """Of one contender in one job."""

    work: str
    job: str
    who: str
    first_s: float  # the first call: tracing and compiling
    ms: float  # a step, median over the rounds
    ratio: float  # over ours, median; above 1: ours is faster
    low: float  # its quartiles
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=DEFAULT, help=f"of {', '.join(WORKS)}")
    parser.add_argument("--jobs", default="train,1,32,256", help="train, or a batch size of inference")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contender in a round, about")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON and the plot")
    options = parser.parse_args()
    timings = []
    for name in options.work.split(","):
        timings += compare(name, options)
    device, versions = facts()
    print(table(timings))
    stem = f"side-by-side-{datetime.date.today()}-{options.precision}"
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    from jaxcompute import log

    told = {"device": device, "precision": options.precision, "rounds": options.rounds, "torch": versions}
    log.write_json(out / f"{stem}.json", log.describe({}, **told, timings=[timing._asdict() for timing in timings]))
    picture(timings, f"{device}, {options.precision}, {datetime.date.today()}", out / f"{stem}.png")
    print(f"left in {out}: {stem}.json, {stem}.png")


def facts() -> tuple[str, str]:
    """What this ran on, and PyTorch's version."""
    import jax

    from benchmarks import machine, peers

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind, peers.torch.__version__ if peers.torch else "none"
    return f"one core of {machine.processor()}", peers.torch.__version__ if peers.torch else "none"


# -- the contenders ----------------------------------------------------------------------------------------------------


def experiment(name: str, precision: str) -> Any:
    """This project's, over made-up images."""
    import importlib

    import numpy as np
    import optax

    from benchmarks import peers
    from jaxcompute import losses
    from jaxcompute.core import Experiment, Run
    from jaxcompute.data import augment, memory

    work = WORKS[name]
    module, _, kind = work.own.partition(".")
    model = getattr(importlib.import_module(f"jaxcompute.models.{module}"), kind)(classes=work.classes, **work.options)
    random = np.random.default_rng(0)
    size = max(work.batch, EXAMPLES if work.image[0] < 100 else 0)
    arrays = {
        "image": random.integers(0, 256, (size, *work.image), np.uint8),
        "label": random.integers(0, work.classes, size, np.int32),
    }
    channels = work.image[-1]

    def prepare(batch, key, train):
        return batch | {"image": augment.normalize(batch["image"], (0.5,) * channels, (0.25,) * channels)}

    return Experiment(
        config=Run(batch_size=work.batch, precision=precision, mesh_data=1),  # pyright: ignore[reportArgumentType]
        model=model,
        loss=losses.cross_entropy(),
        optimizer=optax.sgd(peers.LEARNING_RATE, peers.MOMENTUM, nesterov=True),
        train=memory.shuffled(arrays, work.batch, 0),
        eval=memory.in_order(arrays, min(size, 1000)),
        steps=10**6 // work.batch,
        prepare=prepare,
    )


def compare(name: str, options: argparse.Namespace, differs: Callable[[str], object] = sys.exit) -> list[Timing]:
    """All jobs of one work, after a check that all compute the same; `differs` is told where one does not."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.flatten_util import ravel_pytree

    from benchmarks import peers
    from jaxcompute import sharding, step, train

    work, precision = WORKS[name], options.precision
    dtype = step.DTYPES[precision]
    exp = experiment(name, precision)
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    exp = program.exp
    state, model, torch = program.init(), work.plain(peers), peers.torch
    params, mutable = jax.device_get((state.params, state.mutable))
    batch = exp.prepare(exp.train.batch(program.feed(0), jnp.int32(0)), jax.random.key(0), True)
    image, label = batch["image"], batch["label"]

    # the same loss and gradient
    def flat(tree):
        return np.asarray(ravel_pytree(tree)[0], np.float64)

    # batches as arguments: 154 MB of ResNet-50's would else be a constant of each program
    ours = jax.jit(lambda s, b: step.gradient(exp, s, b, jax.random.key(0)))(state, batch)
    losses = {"ours": float(ours[2]["loss"].compute())}
    grads = {"ours": flat(ours[0])}
    linen_loss = jax.value_and_grad(lambda p, *batch: peers.linen_loss(model, dtype, p, mutable, *batch)[0])
    linen = jax.jit(linen_loss)(params, image, label)
    losses["linen"], grads["linen"] = float(linen[0]), flat(linen[1])
    makers: dict[str, Callable[[], Any]] = {}
    torch_image = torch_label = None
    if torch:
        torch.set_num_threads(1)
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        paths = {
            "/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }

        def module():
            net = peers.torch_model(model, work.image[-1], work.image[0])
            peers.copy_weights(paths, net)
            return net.to(device, memory_format=torch.channels_last)

        makers = {"torch eager": module}
        if options.compile:
            makers["torch.compile"] = lambda: compiled(torch, module())
        to_torch = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)
        torch_image = to_torch.to(device).to(memory_format=torch.channels_last)
        torch_label = torch.from_numpy(np.array(label)).long().to(device)
        net = module()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(net(torch_image).float(), torch_label)
        loss.backward()
        gradient = peers.by_linens_names(net, lambda p: p.grad.cpu().numpy())
        losses["torch"] = loss.item()
        grads["torch"] = np.concatenate([gradient[path].ravel() for path in paths])
    scale = np.linalg.norm(grads["ours"])
    # Rounding, seen through twenty layers: of ResNet-18 at batch 64, whose gradient is 6e-3 from its PyTorch twin's in
    # float32, it is 0.26 in bfloat16, the losses 5e-4 apart.
    most, limit = (1e-4, 1e-2) if precision == "float32" else (0.05, 0.5 if "resnet18" in name else 0.2)
    for peer in losses.keys() - {"ours"}:
        far = np.linalg.norm(grads[peer] - grads["ours"]) / scale
        print(
            f"{name}: loss {losses['ours']:.6f} and {peer}'s {losses[peer]:.6f}; gradient {far:.1e} apart", flush=True
        )
        if not (abs(losses[peer] - losses["ours"]) < most * abs(losses["ours"]) and far < limit):
            differs(f"{name}: {peer} computes something else")

    found = []
    for job in options.jobs.split(","):
        if job == "train":
            contenders = [
                of_training(program, state),
                linen_training(model, dtype, params, mutable, image, label),
                *(torch_training(who, make(), precision, torch_image, torch_label) for who, make in makers.items()),
            ]
        else:
            one = jnp.asarray(np.resize(np.asarray(image), (int(job), *work.image)))
            variables = jax.device_put({"params": params, **mutable})

            def forward(v, x):
                return step.forward(exp, v["params"], mutable_of(v), x, train=False)[0]

            contenders = [
                of_inference("ours", forward, variables, one),
                of_inference("linen", linen_forward(model, dtype), variables, one),
                *(torch_inference(who, make(), precision, one) for who, make in makers.items()),
            ]
        timed = take_turns(name, job if job == "train" else f"inference b{job}", contenders, options)
        print(table(timed), flush=True)
        found += timed
    return found


def compiled(torch: Any, module: Any) -> Any:
    torch._dynamo.reset()  # else the works, which share code, count against one limit of recompilations
    return torch.compile(module)


def mutable_of(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != "params"}


def of_training(program: Any, state: Any) -> Contender:
    import jax

    held = [jax.tree.map(lambda x: x.copy(), state), program.sums()]

    def once():
        held[:] = program.steps(1)(*held, program.feed(0))
        return held[0].params

    return Contender("ours", once, jax.block_until_ready)


def linen_training(model: Any, dtype: Any, params: Any, mutable: Any, image: Any, label: Any) -> Contender:
    import jax

    from benchmarks import peers

    step, held = peers.linen_step(model, dtype), [peers.linen_state(model, jax.device_put(params)), mutable]

    def once():
        held[0], held[1], loss, _ = step(*held, image, label)
        return held[0].params, loss

    return Contender("linen", once, jax.block_until_ready)


def linen_forward(model: Any, dtype: Any) -> Callable[..., Any]:
    import optax

    def forward(v, x):
        variables = {"params": optax.tree.cast(v["params"], dtype), **mutable_of(v)}
        return model.apply(variables, x.astype(dtype), train=False)

    return forward


def of_inference(who: str, forward: Callable[..., Any], variables: Any, image: Any) -> Contender:
    import jax

    call = jax.jit(forward)
    return Contender(who, lambda: call(variables, image), jax.block_until_ready)


def synchronised(torch: Any) -> Callable[[Any], None]:
    return lambda result: torch.cuda.synchronize() if result.is_cuda else None


def torch_training(who: str, module: Any, precision: str, image: Any, label: Any) -> Contender:
    from benchmarks import peers

    step = peers.torch_step(module.train(), precision)
    return Contender(who, lambda: step(image, label), synchronised(peers.torch))


def torch_inference(who: str, module: Any, precision: str, image: Any) -> Contender:
    import numpy as np

    from benchmarks import peers

    torch, module = peers.torch, module.eval()
    device = next(module.parameters()).device.type
    x = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2).to(device).to(memory_format=torch.channels_last)

    def once():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return module(x)

    return Contender(who, once, synchronised(torch))


# -- timing ------------------------------------------------------------------------------------------------------------


def take_turns(name: str, job: str, contenders: list[Contender], options: argparse.Namespace) -> list[Timing]:
    """The contenders by turns; one that fails at its first call (torch.compile without a compiler) is left out."""
    import jax

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def run(contender: Contender, steps: int) -> float:
        result, began = None, clock()
        for _ in range(steps):
            result = contender.once()
        contender.wait(result)
        return (clock() - began) / steps

    first, kept, steps = {}, [], {}
    for contender in contenders:
        try:
            began = time.perf_counter()
            contender.wait(contender.once())
            first[contender.name] = time.perf_counter() - began
        except Exception as error:
            if contender.name != "torch.compile":
                raise
            print(f"{name}, {job}: torch.compile does not run here: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        run(contender, 2)
        steps[contender.name] = max(1, min(round(options.seconds / run(contender, 2)), 10_000))
        kept.append(contender)
    times: dict[str, list[float]] = {contender.name: [] for contender in kept}
    for _ in range(options.rounds):
        for contender in kept:
            times[contender.name].append(run(contender, steps[contender.name]))
    found = []
    for who, own in times.items():
        ratios = [a / b for a, b in zip(own, times["ours"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        found.append(Timing(name, job, who, first[who], 1e3 * statistics.median(own), middle, low, high))
    return found


# -- showing -----------------------------------------------------------------------------------------------------------


def table(timings: list[Timing]) -> str:
    from jaxcompute import log

    rows = [
        (t.work, t.job, t.who, f"{t.ms:.3g}", f"{t.ratio:.2f}", f"{t.low:.2f} to {t.high:.2f}", f"{t.first_s:.1f}")
        for t in timings
    ]
    return log.table(rows, ("work", "job", "who", "ms", "over ours", "quartiles", "first call, s"))


def picture(timings: list[Timing], title: str, file: Path) -> None:
    """A row a work and job, a mark a peer: how many times as long as ours it takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(dict.fromkeys((t.work, t.job) for t in timings))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    colours = {"linen": "#0072b2", "torch eager": "#d55e00", "torch.compile": "#cc79a7"}
    for who, colour in colours.items():
        own = [t for t in timings if t.who == who]
        y = [rows.index((t.work, t.job)) for t in own]
        x = [t.ratio for t in own]
        spread = [[t.ratio - t.low for t in own], [t.high - t.ratio for t in own]]
        if own:
            axes.errorbar(x, y, xerr=spread, fmt="o", color=colour, label=who, capsize=2, markersize=5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [", ".join(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time over ours (right of 1: ours is faster)")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    if CORE is not None:
        os.sched_setaffinity(0, {CORE})  # before jax and PyTorch count the cores
    main()
