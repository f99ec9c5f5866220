"""How long does each layer that is written by hand take beside XLA's own or Linen's?

    python benchmarks/layers.py

On a CPU convolutions of sizes that nets here have, the gradients of their inputs and of their kernels; elsewhere `conv`
is XLA's. On any device batch norm, max pool and ConvPool, forward and backward together, beside Linen's. First the two
are checked to agree; then they take turns. On a CPU: CPU time of one pinned core; else the wall's, of eight times as
many examples, lest all be the time to start a program.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.side_by_side import arithmetic, clock, facts, pin, quartiles  # noqa: E402

SIZES = {  # of a convolution: x, kernel, stride, padding
    "LeNet-5 C1": ((128, 28, 28, 1), (5, 5, 1, 6), 1, "SAME"),
    "LeNet-5 C3": ((128, 14, 14, 6), (5, 5, 6, 16), 1, "VALID"),
    "3x3 1 to 64": ((128, 28, 28, 1), (3, 3, 1, 64), 1, "SAME"),
    "3x3 3 to 16": ((128, 32, 32, 3), (3, 3, 3, 16), 1, "SAME"),
    "3x3 3 to 32": ((128, 32, 32, 3), (3, 3, 3, 32), 1, "SAME"),
    "3x3 3 to 64": ((32, 32, 32, 3), (3, 3, 3, 64), 1, "SAME"),
    "3x3 16": ((128, 32, 32, 16), (3, 3, 16, 16), 1, "SAME"),
    "3x3 32": ((128, 16, 16, 32), (3, 3, 32, 32), 1, "SAME"),
    "3x3 64, 8x8": ((128, 8, 8, 64), (3, 3, 64, 64), 1, "SAME"),
    "3x3 64, 7x7": ((128, 7, 7, 64), (3, 3, 64, 64), 1, "SAME"),
    "3x3 64, 14x14": ((128, 14, 14, 64), (3, 3, 64, 64), 1, "SAME"),
    "3x3 64, 32x32": ((32, 32, 32, 64), (3, 3, 64, 64), 1, "SAME"),
    "3x3 128": ((32, 16, 16, 128), (3, 3, 128, 128), 1, "SAME"),
    "3x3 256": ((32, 8, 8, 256), (3, 3, 256, 256), 1, "SAME"),
    "3x3 16 to 32, stride 2": ((128, 32, 32, 16), (3, 3, 16, 32), 2, "SAME"),
    "3x3 32 to 64, stride 2": ((128, 16, 16, 32), (3, 3, 32, 64), 2, "SAME"),
    "3x3 64 to 128, stride 2": ((32, 32, 32, 64), (3, 3, 64, 128), 2, "SAME"),
    "3x3 128 to 256, stride 2": ((32, 16, 16, 128), (3, 3, 128, 256), 2, "SAME"),
    "1x1 64 to 128, stride 2": ((32, 32, 32, 64), (1, 1, 64, 128), 2, "SAME"),
    "1x1 128 to 256, stride 2": ((32, 16, 16, 128), (1, 1, 128, 256), 2, "SAME"),
}
TINY = {"3x3 3 to 16": ((16, 8, 8, 3), (3, 3, 3, 16), 1, "SAME")}  # for the tests
APART = {"float32": 1e-4, "bfloat16": 0.05}  # of results that agree, as a share of their norm, at most


class Case(NamedTuple):
    """One computation, by us and by them, of the same arguments."""

    layer: str
    what: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    arguments: tuple[Any, ...]


class Differ(Exception):
    """Ours and theirs do not compute the same."""


class Timing(NamedTuple):
    layer: str
    what: str
    precision: str
    ours_ms: float  # medians over the rounds
    theirs_ms: float
    ratio: float  # ours over theirs, median: below 1 ours is faster
    low: float  # its quartiles
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each in a round, about")
    parser.add_argument("--tiny", action="store_true", help="one small layer of each kind: only that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/layers-{datetime.date.today()}.json")
    given = parser.parse_args()
    if unknown := set(given.precisions.split(",")) - set(APART):
        parser.error(f"--precisions={given.precisions}: no {min(unknown)}; give of {', '.join(APART)}")
    if given.rounds < 1:
        parser.error(f"--rounds={given.rounds}: give 1 or more")
    pin()
    from jaxcompute import log

    timings = [*compare(given.precisions.split(","), given.rounds, given.seconds, given.tiny)]
    print(table(timings))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    told = [timing._asdict() for timing in timings]
    log.write_json(given.out, log.describe({}, device=facts()[0], rounds=given.rounds, timings=told))


def compare(
    precisions: Sequence[str],
    rounds: int,
    seconds: float,
    tiny: bool = False,
    differs: Callable[[str], object] = sys.exit,
) -> Iterator[Timing]:
    """One after the other; `differs` is told of those that do not agree, which are left out."""
    from jaxcompute import sharding

    sharding.keep_scratch()  # as all nets here do
    for precision in precisions:
        with arithmetic(precision):
            for case in cases(precision, tiny):
                try:
                    found = timed(case, precision, rounds, seconds)
                except Differ as error:
                    differs(str(error))
                    continue
                print(f"{precision} {found.layer}, {found.what}: {found.ratio:.2f}", file=sys.stderr, flush=True)
                yield found


def cases(precision: str, tiny: bool) -> Iterator[Case]:
    import jax

    if jax.default_backend() == "cpu":
        for layer, (x, kernel, stride, padding) in (TINY if tiny else SIZES).items():
            yield from convolution(layer, x, kernel, stride, padding, precision)
    yield from whole_layers(precision, tiny)


def convolution(layer: str, x_shape: Any, k_shape: Any, stride: int, padding: str, precision: str) -> Iterator[Case]:
    """The three products of a convolution's training, those left out that are XLA's to the letter."""
    import jax

    from jaxcompute.models import conv

    strides = (stride, stride)
    pads: Any = tuple(map(tuple, jax.lax.padtype_to_pads(x_shape[1:3], k_shape[:2], strides, padding)))
    x, k = (random(i, shape, precision) for i, shape in enumerate((x_shape, k_shape)))
    plain = partial(conv._plain, strides, pads)
    dy = random(2, jax.eval_shape(plain, x, k).shape, precision)

    def of_input(k: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: plain(x, k), x)(dy)[0]

    def of_kernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda k: plain(x, k), k)(dy)[0]

    three = {
        "forward": (partial(conv.forward, strides, pads), plain, (x, k)),
        "input's gradient": (partial(conv.input_gradient, strides, pads, x_shape), of_input, (k, dy)),
        "kernel's gradient": (partial(conv.kernel_gradient, strides, pads, k_shape), of_kernel, (x, dy)),
    }
    for what, (ours, theirs, arguments) in three.items():
        if str(jax.make_jaxpr(ours)(*arguments)) != str(jax.make_jaxpr(theirs)(*arguments)):
            yield Case(layer, what, ours, theirs, arguments)


def whole_layers(precision: str, tiny: bool) -> Iterator[Case]:
    """Forward and backward, of all arguments, beside Linen's."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from jaxcompute.models.conv_pool import ConvPool
    from jaxcompute.models.norm import BatchNorm
    from jaxcompute.models.pooling import max_pool

    def case(layer: str, ours: Callable[..., Any], theirs: Callable[..., Any], *shapes: Any) -> Case:
        def both(f: Callable[..., Any], dy: jax.Array, *arguments: jax.Array) -> Any:
            y, pull = jax.vjp(f, *arguments)
            return y, pull(dy)

        arguments = [random(i, shape, precision) for i, shape in enumerate(shapes, 1)]
        dy = random(0, jax.eval_shape(theirs, *arguments).shape, precision)
        return Case(layer, "both", partial(both, ours), partial(both, theirs), (dy, *arguments))

    def norm(kind: Any, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        stats = {"mean": jnp.zeros(scale.shape), "var": jnp.ones(scale.shape)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return kind(use_running_average=False).apply(variables, x, mutable=["batch_stats"])[0]

    def linen_pool(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (2, 2), (2, 2))

    def conv_pool(padding: int, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        layer: Any = ConvPool(kernel.shape[3], (kernel.shape[0], kernel.shape[1]), padding, nn.tanh)
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def linen_conv_pool(padding: int, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        layer: Any = nn.Conv(kernel.shape[-1], kernel.shape[:2], padding=padding)
        return linen_pool(nn.tanh(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)))

    more = 1 if tiny or jax.default_backend() == "cpu" else 8
    norms = [(128, 32, 32, 16), (128, 8, 8, 64), (32, 32, 32, 64), (32, 8, 8, 256)]
    pools = [(128, 28, 28, 64), (128, 14, 14, 64), (128, 28, 28, 6)]
    layers = {"LeNet-5 C1": ((128, 28, 28, 1), (5, 5, 1, 6), 2), "LeNet-5 C3": ((128, 14, 14, 6), (5, 5, 6, 16), 0)}
    if tiny:
        norms, pools, layers = [(4, 4, 4, 8)], [(4, 4, 4, 8)], {"tiny": ((16, 6, 6, 1), (3, 3, 1, 4), 1)}
    for batch, *image in norms:
        shape, channels = (more * batch, *image), tuple(image[-1:])
        yield case(
            f"batch norm of {shape}", partial(norm, BatchNorm), partial(norm, nn.BatchNorm), shape, channels, channels
        )
    for batch, *image in pools:
        shape = (more * batch, *image)
        yield case(f"max pool of {shape}", max_pool, linen_pool, shape)
    for name, ((batch, *image), kernel, padding) in layers.items():
        ours, theirs = partial(conv_pool, padding), partial(linen_conv_pool, padding)
        yield case(f"{name}, tanh and pool", ours, theirs, (more * batch, *image), kernel, kernel[3:])


def random(seed: int, shape: Any, precision: str = "float32") -> Any:
    import jax

    return jax.random.normal(jax.random.key(seed), shape).astype(precision)


def timed(case: Case, precision: str, rounds: int, seconds: float) -> Timing:
    import jax

    ours, theirs = jax.jit(case.ours), jax.jit(case.theirs)
    check(case, precision, ours(*case.arguments), theirs(*case.arguments))
    now = clock()

    def run(call: Callable[..., Any], count: int) -> float:
        """Seconds a call."""
        began, out = now(), None
        for _ in range(count):
            out = call(*case.arguments)
        jax.block_until_ready(out)
        return (now() - began) / count

    def some(call: Callable[..., Any]) -> int:
        began = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(call(*case.arguments))
        return max(1, round(3 * seconds / (time.perf_counter() - began)))

    counts = some(ours), some(theirs)
    times = [(run(ours, counts[0]), run(theirs, counts[1])) for _ in range(rounds)]
    low, middle, high = quartiles([a / b for a, b in times])
    own, other = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return Timing(case.layer, case.what, precision, own, other, middle, low, high)


def check(case: Case, precision: str, ours: Any, theirs: Any) -> None:
    import jax
    import numpy as np

    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        apart = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not apart <= APART[precision]:
            raise Differ(f"{case.layer}, {case.what}: {apart:.2g} from the other in {precision}")


def table(timings: list[Timing]) -> str:
    from jaxcompute import log

    rows = [
        (
            *(t.layer, t.what, t.precision, f"{float(f'{t.ours_ms:.3g}'):g}", f"{float(f'{t.theirs_ms:.3g}'):g}"),
            *(f"{t.ratio:.2f}", f"{t.low:.2f} to {t.high:.2f}"),
        )
        for t in timings
    ]
    return log.table(rows, ("layer", "what", "precision", "ours, ms", "other, ms", "ratio", "quartiles"))


if __name__ == "__main__":
    main()
