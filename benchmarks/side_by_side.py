"""This project's step and loop beside plain Linen's, PyTorch's and torch.compile's: the same work in one run.

    python benchmarks/side_by_side.py                          # training, whole loops and inference, float32
    python benchmarks/side_by_side.py --precision=bfloat16 --work=resnet20,resnet18

First all must compute the same: same weights, same batch, loss and gradient within a tolerance, in exact float32
whatever precision is timed (in float64 ResNet-18 and its PyTorch twin are 3e-8 apart, in float32 1e-3). Then they take
turns, A B C A B C, for some rounds; a ratio is the median over the rounds of theirs to ours, and beside it stand its
quartiles. Warm-up and compile are timed apart, with compile caches that were empty before. On the CPU all share one
pinned core and CPU time counts; on a GPU wall time with synchronisation. A peer that fails, of memory say, is left out.

train: ours is the compiled step of the training loop: it gathers its batch out of the set on the device, normalises it
and sums its metrics. The peers are given a batch that is ready.
loop: ours is `train.fit` with metrics, progress and a work directory; theirs are written as their examples are (in
peers.py) and leave no files. All hold the set as bytes and log every 50 steps, a slow network more often; a step's time
is that from the first log line to the last.
A number: inference at that batch size. A network that stands here twice is looped over and inferred with once.

float32 is exact and tf32 is TF32 on every side; by themselves JAX takes TF32 for both products and convolutions on a
GPU, and PyTorch for convolutions. Our mesh has glibc keep a step's scratch memory (`sharding.keep_scratch`), and so it
does for the peers in this process, which makes plain Linen too a seventh faster on ResNet-20; --no-scratch leaves
glibc's defaults to all.
"""

import argparse
import contextlib
import dataclasses
import datetime
import glob
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
EXAMPLES = 1024  # in the set on the device, made up

T = TypeVar("T")
Run = Callable[[int], float]  # so many steps -> seconds a step


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
JOBS = "train,loop,1,32,256"


class Same(NamedTuple):
    """What all contenders of a work start from."""

    name: str
    work: Work
    precision: str
    program: Any  # ours, and its State
    state: Any
    batch: Any  # of float32 images, and labels
    model: Any  # plain Linen's
    params: Any  # on the host, under Linen's names
    mutable: Any


class Timing(NamedTuple):
    """Of one contender in one job."""

    work: str
    job: str
    who: str
    loss: float  # of the first batch, in exact float32; torch.compile's is eager's, and so is the next
    apart: float  # of its gradient from ours, as a share of ours
    first_s: float | None  # the first call: tracing and compiling; of a loop: not taken
    ms: float  # a step, median over the rounds
    ratio: float  # over ours, median; above 1: ours is faster
    low: float  # its quartiles
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = DEFAULT + ",resnet50" * on_gpu()
    parser.add_argument("--work", default=default, help=f"of {', '.join(WORKS)} (default here: {default})")
    parser.add_argument("--jobs", default=JOBS, help="train, loop, or a batch size of inference")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="keep scratch memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a contender in a round, about; of a loop thrice")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON and the plot")
    options = parser.parse_args()
    if unknown := [name for name in options.work.split(",") if name not in WORKS]:
        parser.error(f"--work={options.work}: no {unknown[0]}; take of {', '.join(WORKS)}")
    if unknown := [job for job in options.jobs.split(",") if job not in ("train", "loop") and not job.isdigit()]:
        parser.error(f"--jobs={options.jobs}: no {unknown[0]!r}; give train, loop, or a batch size")
    if options.precision == "tf32" and not on_gpu():
        parser.error("--precision=tf32: only a GPU has it; give float32")
    named = [name for name, usual in ((options.work, default), (options.jobs, JOBS)) if name != usual]
    named += [] if options.scratch else ["no-scratch"]

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # PyTorch shares the GPU
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        for variable in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[variable] = str(Path(caches, variable))
        from jaxcompute import cache, log, sharding

        cache.keep()  # each turn of our loop compiles the same again
        if not options.scratch:
            sharding.keep_scratch = lambda: None
        timings = []
        for name, jobs in plan(options.work.split(","), options.jobs.split(",")).items():
            timings += compare(name, argparse.Namespace(**vars(options) | {"jobs": ",".join(jobs)}))
    device, versions = facts()
    print(table(timings))
    stem = "-".join(["side-by-side", str(datetime.date.today()), options.precision, *named]).replace(",", "+")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    told = {"device": device, "precision": options.precision, "rounds": options.rounds, "torch": versions}
    log.write_json(out / f"{stem}.json", log.describe({}, **told, timings=[timing._asdict() for timing in timings]))
    picture(timings, f"{device}, {options.precision}, {datetime.date.today()}", out / f"{stem}.png")
    print(f"left in {out}: {stem}.json, {stem}.png")


def plan(works: list[str], jobs: list[str]) -> dict[str, list[str]]:
    """The jobs of each work: of two that differ by the batch size alone the second is only trained."""
    networks = [(WORKS[name].own, WORKS[name].options) for name in works]
    again = {name for i, name in enumerate(works) if networks[i] in networks[:i]}
    plans = {name: [job for job in jobs if job == "train" or name not in again] for name in works}
    return {name: todo for name, todo in plans.items() if todo}


def on_gpu() -> bool:
    """Whether jax will find a GPU; asked before it starts."""
    there = glob.glob("/dev/nvidia[0-9]*") and importlib.util.find_spec("jax_plugins")
    return bool(there) and os.environ.get("JAX_PLATFORMS") != "cpu"


def pin() -> None:
    """This process to one core, where the CPU is the device; to be called before jax and PyTorch count the cores."""
    if hasattr(os, "sched_setaffinity") and not on_gpu():
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def clock() -> Callable[[], float]:
    """Of CPU time, that of all threads, where the CPU is the device, else of the wall."""
    import jax

    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def facts() -> tuple[str, str]:
    """What this ran on, and PyTorch's version."""
    import jax

    from benchmarks import machine, peers

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind, peers.torch.__version__ if peers.torch else "none"
    return f"one core of {machine.processor()}", peers.torch.__version__ if peers.torch else "none"


# -- what is compared --------------------------------------------------------------------------------------------------


def experiment(name: str, precision: str, examples: int = 0) -> Any:
    """This project's, over made-up images; so many examples at least."""
    import importlib

    import numpy as np
    import optax

    from benchmarks import peers
    from jaxcompute import core, losses
    from jaxcompute.data import augment, memory

    work = WORKS[name]
    module, _, kind = work.own.partition(".")
    model = getattr(importlib.import_module(f"jaxcompute.models.{module}"), kind)(classes=work.classes, **work.options)
    exact: Any = "float32" if precision == "tf32" else precision
    random = np.random.default_rng(0)
    size = max(work.batch, examples, EXAMPLES if work.image[0] < 100 else 0)
    arrays = {
        "image": random.integers(0, 256, (size, *work.image), np.uint8),
        "label": random.integers(0, work.classes, size, np.int32),
    }
    channels = work.image[-1]

    def prepare(batch, key, train):
        return batch | {"image": augment.normalize(batch["image"], (0.5,) * channels, (0.25,) * channels)}

    return core.Experiment(
        config=core.Run(batch_size=work.batch, precision=exact, mesh_data=1),
        model=model,
        loss=losses.cross_entropy(),
        optimizer=optax.sgd(peers.LEARNING_RATE, peers.MOMENTUM, nesterov=True),
        train=memory.shuffled(arrays, work.batch, 0),
        eval=memory.in_order(arrays, min(size, 1000)),
        steps=10**6 // work.batch,
        prepare=prepare,
    )


def compare(
    name: str,
    options: argparse.Namespace,
    differs: Callable[[str], object] = sys.exit,
    keep: Callable[[list[Timing]], None] = lambda timings: None,
) -> list[Timing]:
    """All jobs of one work, after a check that all compute the same.

    Args:
        name: of WORKS.
        options: jobs, precision, compile, rounds and seconds, as `main` has them.
        differs: is told of a peer that computes something else.
        keep: is given all timings so far after each job.
    """
    same = start(name, options.precision)
    with arithmetic("float32"):
        checked = check(same, differs)
    if not options.compile:
        checked.pop("torch.compile", None)
    found: list[Timing] = []
    with arithmetic(options.precision):
        for job in filter(None, options.jobs.split(",")):
            contenders = {who: make for who, make in entrants(same, job).items() if who in checked}
            called = job if job in ("train", "loop") else f"inference b{job}"
            timed = take_turns(name, called, contenders, checked, options)
            print(table(timed), flush=True)
            found += timed
            keep(found)
    return found


def start(name: str, precision: str) -> Same:
    import jax
    import jax.numpy as jnp

    from benchmarks import peers
    from jaxcompute import sharding, train

    exp = experiment(name, precision)
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    state = program.init()
    batch = exp.prepare(exp.train.batch(program.feed(0), jnp.int32(0)), jax.random.key(0), True)
    params, mutable = jax.device_get((state.params, state.mutable))
    work, torch = WORKS[name], peers.torch
    if torch and peers.device() == "cuda":
        torch.backends.cudnn.benchmark = True
    elif torch:
        torch.set_num_threads(1)
    return Same(name, work, precision, program, state, batch, work.plain(peers), params, mutable)


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Of JAX and PyTorch alike on a GPU: float32 is exact; else what is of that type may be computed in TF32."""
    import jax

    from benchmarks import peers

    if jax.default_backend() == "cpu":  # exact in any case
        yield
        return
    if peers.torch:
        backends = peers.torch.backends
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = precision != "float32"
    with jax.default_matmul_precision({"float32": "highest", "tf32": "tensorfloat32"}.get(precision)):
        yield


def check(same: Same, differs: Callable[[str], object]) -> dict[str, tuple[float, float]]:
    """In float32, by contender: the loss, and how far its gradient is from ours as a share of ours."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.flatten_util import ravel_pytree

    from benchmarks import peers
    from jaxcompute import step

    torch, config = peers.torch, dataclasses.replace(same.program.exp.config, precision="float32")
    exp = dataclasses.replace(same.program.exp, config=config)

    def flat(tree: Any) -> Any:
        return np.asarray(ravel_pytree(tree)[0], np.float64)

    batch = {name: rows[:32] if same.work.image[0] >= 100 else rows for name, rows in same.batch.items()}

    # batches as arguments: large ones would else be a constant of each program
    def ours() -> tuple[float, Any]:
        grads, _, seen = jax.jit(lambda s, b: step.gradient(exp, s, b, jax.random.key(0)))(same.state, batch)
        return float(seen["loss"].compute()), flat(grads)

    def linen() -> tuple[float, Any]:
        loss = partial(peers.linen_loss, same.model, jnp.float32)
        compute = jax.jit(jax.value_and_grad(lambda p, *rest: loss(p, *rest)[0]))
        value, grads = compute(same.params, same.mutable, batch["image"], batch["label"])
        return float(value), flat(grads)

    def eager() -> tuple[float, Any]:
        net = torch_net(same, "torch eager")
        image, label = peers.torch_image(batch["image"]), peers.torch_label(batch["label"])
        loss = torch.nn.functional.cross_entropy(net(image), label)
        loss.backward()
        grads = peers.by_linens_names(net, lambda p: p.grad.cpu().numpy())
        return loss.item(), np.concatenate([grads[path].ravel() for path in peers.by_path(same.params)])

    loss, gradient = ours()
    found = {"ours": (loss, 0.0)}
    for who, compute in {"linen": linen, "torch eager": eager}.items():
        if who == "torch eager" and not torch:
            continue
        if (values := attempt(f"{same.name}, check", who, compute)) is None:
            continue
        far = float(np.linalg.norm(values[1] - gradient) / np.linalg.norm(gradient))
        print(f"{same.name}: loss {loss:.6f} and {who}'s {values[0]:.6f}; gradient {far:.1e} apart", flush=True)
        if not (abs(values[0] - loss) < 1e-4 * abs(loss) and far < 1e-2):
            differs(f"{same.name}: {who} computes something else")
        found[who] = values[0], far
    if "torch eager" in found:
        found["torch.compile"] = found["torch eager"]
    return found


def attempt(what: str, who: str, call: Callable[[], T]) -> T | None:
    """None, and a line, where a peer fails; ours must not."""
    from jaxcompute.errors import line_of

    try:
        return call()
    except Exception as error:
        if who == "ours":
            raise
        print(f"{what}: {who} is left out, as it fails: {line_of(error)[:200]}", flush=True)
        return None


# -- the contenders ----------------------------------------------------------------------------------------------------


def entrants(same: Same, job: str) -> dict[str, Callable[[], Run]]:
    """By name, what makes each contender of a job."""
    import numpy as np

    if job == "train":
        makers, given = (our_training, linen_training, torch_training), same.batch
    elif job == "loop":
        examples = min(60_000, 2**29 // math.prod(same.work.image))  # MNIST's, or half a GiB
        makers, given = (our_loop, linen_loop, torch_loop), experiment(same.name, same.precision, examples)
    else:
        makers = our_inference, linen_inference, torch_inference
        given = np.resize(np.asarray(same.batch["image"]), (int(job), *same.work.image))
    ours, linen, torch = makers
    nets = {who: partial(torch, same, given, who) for who in ("torch eager", "torch.compile")}
    return {"ours": partial(ours, same, given), "linen": partial(linen, same, given), **nets}


def repeated(once: Callable[[], Any], wait: Callable[[Any], Any]) -> Run:
    """Of a call dispatched again and again, and a wait for the last to be done."""
    now = clock()

    def run(steps: int) -> float:
        result, began = None, now()
        for _ in range(steps):
            result = once()
        wait(result)
        return (now() - began) / steps

    return run


def periods(same: Same, steps: int) -> tuple[int, int]:
    """Of a loop of about so many steps: those of a log period, our compiled call's at least, and how many periods."""
    every = min(50, max(same.program.exp.config.steps_per_call, steps // 3))
    return every, max(2, steps // every)


def looped(same: Same, loop: Callable[[int], Iterator[float]]) -> Run:
    """Of a loop without end that is given its log period and yields the loss at each log line."""
    now = clock()

    def run(steps: int) -> float:
        every, count = periods(same, steps)
        marks = [now() for _ in itertools.islice(loop(every), count)]
        return (marks[-1] - marks[0]) / (every * (count - 1))

    return run


def our_training(same: Same, batch: Any) -> Run:
    import jax

    del batch  # it makes its own
    program, held = same.program, [jax.tree.map(lambda x: x.copy(), same.state), same.program.sums()]

    def once() -> Any:
        held[:] = program.steps(1)(*held, program.feed(0))
        return held[0].params

    return repeated(once, jax.block_until_ready)


def our_loop(same: Same, exp: Any) -> Run:
    from benchmarks import loop

    now = clock()

    def run(steps: int) -> float:
        every, count = periods(same, steps)
        return loop.of_fit(loop.shortened(exp, every * count, every), same.program.mesh, now)

    return run


def our_inference(same: Same, image: Any) -> Run:
    from jaxcompute import step

    def forward(v: Any, x: Any) -> Any:
        return step.forward(same.program.exp, v["params"], mutable_of(v), x, train=False)[0]

    return of_inference(same, forward, image)


def linen_training(same: Same, batch: Any) -> Run:
    import jax

    from benchmarks import peers

    step, held = peers.linen_step(same.model, dtype_of(same)), [linen_state(same), same.mutable]

    def once() -> Any:
        held[0], held[1], loss, _ = step(*held, batch["image"], batch["label"])
        return held[0].params, loss

    return repeated(once, jax.block_until_ready)


def linen_loop(same: Same, exp: Any) -> Run:
    from benchmarks import peers

    step, arrays = peers.linen_step(same.model, dtype_of(same), peers.normalized), exp.train.arrays
    loop = partial(peers.linen_loop, step, arrays["image"], arrays["label"], same.work.batch)
    return looped(same, lambda every: loop(linen_state(same), same.mutable, every))


def linen_inference(same: Same, image: Any) -> Run:
    import optax

    dtype = dtype_of(same)

    def forward(v: Any, x: Any) -> Any:
        variables = {"params": optax.tree.cast(v["params"], dtype), **mutable_of(v)}
        return same.model.apply(variables, x.astype(dtype), train=False)

    return of_inference(same, forward, image)


def of_inference(same: Same, forward: Callable[..., Any], image: Any) -> Run:
    import jax

    call = jax.jit(forward)
    variables, x = jax.device_put(({"params": same.params, **same.mutable}, image))
    return repeated(lambda: call(variables, x), jax.block_until_ready)


def mutable_of(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != "params"}


def dtype_of(same: Same) -> Any:
    from jaxcompute import step

    return step.DTYPES[same.program.exp.config.precision]


def linen_state(same: Same) -> Any:
    import jax

    from benchmarks import peers

    return peers.linen_state(same.model, jax.device_put(same.params))


def torch_training(same: Same, batch: Any, who: str) -> Run:
    from benchmarks import peers

    step = peers.torch_step(torch_net(same, who), same.precision)
    image, label = peers.torch_image(batch["image"]), peers.torch_label(batch["label"])
    return repeated(lambda: step(image, label), synchronize)


def torch_loop(same: Same, exp: Any, who: str) -> Run:
    from benchmarks import peers

    step, arrays = peers.torch_step(torch_net(same, who), same.precision), exp.train.arrays
    return looped(same, partial(peers.torch_loop, step, arrays["image"], arrays["label"], same.work.batch))


def torch_inference(same: Same, image: Any, who: str) -> Run:
    from benchmarks import peers

    torch, x = peers.torch, peers.torch_image(image)
    net = torch_net(same, who, mode="reduce-overhead" if x.is_cuda and len(image) == 1 else "default").eval()
    bfloat16 = torch.autocast(x.device.type, torch.bfloat16, enabled=same.precision == "bfloat16")

    def once() -> Any:
        with torch.inference_mode(), bfloat16:
            return net(x)

    return repeated(once, synchronize)


def torch_net(same: Same, who: str, mode: str = "default") -> Any:
    """PyTorch's module on the device, with the weights that all start from; `mode` is torch.compile's."""
    from benchmarks import peers

    torch, work = peers.torch, same.work
    net = peers.torch_model(same.model, work.image[-1], work.image[0])
    peers.copy_weights(peers.by_path(same.params), net)
    net = net.to(peers.device(), memory_format=torch.channels_last)
    if who != "torch.compile":
        return net
    torch._dynamo.reset()  # else the works, which share code, count against one limit of recompilations
    return torch.compile(net, mode=mode)


def synchronize(result: Any) -> None:
    from benchmarks import peers

    if result.is_cuda:
        peers.torch.cuda.synchronize()


# -- timing ------------------------------------------------------------------------------------------------------------


def take_turns(
    name: str,
    job: str,
    contenders: dict[str, Callable[[], Run]],
    checked: dict[str, tuple[float, float]],
    options: argparse.Namespace,
) -> list[Timing]:
    """The contenders by turns; a loop is as many steps to all, else each has as many as take the seconds."""
    loops = job == "loop"
    seconds = options.seconds * (3 if loops else 1)

    def warmed(make: Callable[[], Run]) -> tuple[Run, float, int]:
        run, began = make(), time.perf_counter()
        run(1)
        first = time.perf_counter() - began
        run(3)  # in which a CUDA graph may be recorded
        return run, first, max(1, min(round(seconds / run(3)), 10_000))

    kept = {}
    for who, make in contenders.items():
        if (warm := attempt(f"{name}, {job}", who, partial(warmed, make))) is not None:
            kept[who] = warm
    times: dict[str, list[float]] = {who: [] for who in kept}
    for _ in range(options.rounds):
        for who, (run, _, steps) in kept.items():
            times[who].append(run(kept["ours"][2] if loops else steps))
    found = []
    for who, own in times.items():
        ratios = [a / b for a, b in zip(own, times["ours"], strict=True)]
        low, middle, high = quartiles(ratios)
        first = None if loops else kept[who][1]
        found.append(Timing(name, job, who, *checked[who], first, 1e3 * statistics.median(own), middle, low, high))
    return found


def quartiles(values: list[float]) -> list[float]:
    """The three; of one value itself."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


# -- showing -----------------------------------------------------------------------------------------------------------


def table(timings: list[Timing]) -> str:
    from jaxcompute import log

    rows = [
        (
            *(t.work, t.job, t.who, f"{float(f'{t.ms:.3g}'):g}", f"{t.ratio:.2f}", f"{t.low:.2f} to {t.high:.2f}"),
            "" if t.first_s is None else f"{t.first_s:.1f}",
        )
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
    pin()
    main()
