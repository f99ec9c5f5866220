"""Sets that do not fit in memory: their batches are decoded by processes, ahead of the step that asks for them.

`feed(step)` is a function of (seed, step) though it reads ahead: a run that goes on asks for its step and nothing
before it is read. An example's pixels depend on nothing but its file, so the number of processes changes no bit.

    records    sources.files or sources.prepared: where each example is read, by index
    Workers    processes that decode, with two pipes each
    Stream     a core.Source: which records make up a batch, and the rows of it that are this process's

Why own processes over pipes. A grain loader draws its order from its own sampler and reaches a step by its own state;
processes of concurrent.futures outlive a parent that is killed; shared memory is 64 MB in a container, and a slot in it
can be filled anew only once the device has let go of it. These processes end when their pipe does, whatever ended the
parent, hold no state but open files, and their pixels are read from the pipe straight into a new array: a kernel copy
of 0.1 ms an image, next to milliseconds of decoding.

No jax: this file is also what a worker runs.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxcompute import stops
from jaxcompute.data import order, sources
from jaxcompute.errors import BadInput

Batch = dict[str, np.ndarray]
ROWS = 16  # the most that a worker is asked for at once


class Records(Protocol):
    def __len__(self) -> int: ...

    def identity(self) -> str:
        """As a `core.Source`'s."""
        ...

    def address(self, i: int) -> list[Any]:
        """Where example i is read: plain values that `sources.example` understands in another process."""
        ...


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an image of any shape comes to lie in a square canvas, so that a batch's shape is the same at every step."""

    kind: str  # "whole" or "centre"
    canvas: int  # side in pixels
    short: int = 0  # of "centre": the short side before the cut


def whole(canvas: int) -> Fit:
    """The whole image, made smaller where its long side is above `canvas`, in the upper left; the rest is black.

    For training: a box is cut from it on the device, exactly as from the image itself.
    """
    return Fit("whole", canvas)


def centre(size: int, short: int) -> Fit:
    """The short side resized to `short`, then the centre cut out; for evaluation."""
    return Fit("centre", size, short)


class Workers:
    """Processes that decode images: none until they are needed, then up to `count` of them until `close`.

    They end too when nobody holds this any longer, and when the process that started them ends, however it does.
    """

    def __init__(self, count: int):
        """count: processes; 0: one for each core that this process may use."""
        if count < 0:
            raise BadInput(f"workers is {count}; give a number of processes, or 0 for one a core")
        self.count = count or _cores()
        self.pool: ThreadPoolExecutor | None = None  # a thread for each process, to talk to it
        self.processes: list[subprocess.Popen] = []
        weakref.finalize(self, _end, self.processes)

    def decode(self, fit: Fit, addresses: list[list[Any]], batch: Batch, rows: slice) -> Future[None]:
        """Fill these rows of a batch's image, size and label with the examples at these addresses."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.count, "decode")
            self.own = threading.local()
        # not a bound method: a thread at work would keep this object, and so its processes, alive
        return self.pool.submit(_ask, self.own, self.processes, fit, addresses, {k: v[rows] for k, v in batch.items()})

    def close(self) -> None:
        """End the processes; whoever waits for them is told so. The next `decode` starts others."""
        pool, self.pool = self.pool, None
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
            _end(self.processes)  # whoever waits for an answer waits no longer
            pool.shutdown()
        _end(self.processes)  # one that was just being started


def _end(processes: list[subprocess.Popen]) -> None:
    while processes:
        process = processes.pop()
        process.kill()  # it holds nothing that could be lost
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a request that it never read
                if pipe:
                    pipe.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ask(own: Any, processes: list[subprocess.Popen], fit: Fit, addresses: list[list[Any]], rows: Batch) -> None:
    """On a thread that has a process of its own: send it the addresses, and read into the rows what it answers.

    Raises:
        BadInput: an image that cannot be read.
        OSError: the process has died.
    """
    if not hasattr(own, "process"):
        own.process = _start()
        processes.append(own.process)
    process: Any = own.process
    try:
        process.stdin.write(json.dumps([dataclasses.astuple(fit), addresses]).encode() + b"\n")
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise EOFError
        answer = json.loads(line)
        if "error" in answer:
            raise BadInput(answer["error"])
        rows["label"][:], rows["size"][:] = answer["label"], answer["size"]
        pixels = rows["image"].data.cast("B")
        if process.stdout.readinto(pixels) < len(pixels):  # reads on until it has them all
            raise EOFError
    except (EOFError, BrokenPipeError, ValueError) as error:
        code = process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        why = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
        raise OSError(
            f"the data worker {process.pid} {how}{why}; the same command goes on where the run stands"
        ) from error


def _start() -> subprocess.Popen:
    """This file as a process, out of reach of the terminal's Ctrl-C: the run that holds it decides when it ends."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )


def work() -> None:
    """The life of a worker: a line of JSON in; a line of JSON and the pixels out; until its input ends."""
    from PIL import Image

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for stop in stops.CLUSTER:  # the run saves, and then ends us; a terminal's do not come here
        signal.signal(stop, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    for line in sys.stdin.buffer:
        fit, addresses = json.loads(line)
        try:
            answer, pixels = _decode(Fit(*fit), addresses)
        except BadInput as error:
            answer, pixels = {"error": str(error)}, None
        try:
            answers.write(json.dumps(answer).encode() + b"\n")
            if pixels is not None:
                answers.write(pixels.data)
            answers.flush()
        except BrokenPipeError:  # whoever asked was killed meanwhile
            os._exit(0)


def _decode(fit: Fit, addresses: list[list[Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """Labels and sizes, and uint8 [N, canvas, canvas, 3]."""
    pixels = np.zeros((len(addresses), fit.canvas, fit.canvas, 3), np.uint8)
    answer: dict[str, Any] = {"label": [], "size": []}
    for canvas, address in zip(pixels, addresses, strict=True):
        file, name, label = sources.example(address)
        if fit.kind == "whole":
            image = sources.within(file, name, fit.canvas)
        else:
            image = sources.centre(file, name, fit.short, fit.canvas)
        height, width = image.shape[:2]
        canvas[:height, :width] = image
        answer["label"].append(label)
        answer["size"].append([height, width])
    return answer, pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A `core.Source` over records that are read as they are needed; made by `shuffled` or `in_order`."""

    records: Records
    batch_size: int
    seed: int | None  # None: in order, padded and masked
    fit: Fit
    workers: Workers
    resident: bool = dataclasses.field(default=False, init=False)
    under_way: dict[tuple[int, int, int], tuple[Batch, list[Future[None]]]] = dataclasses.field(
        default_factory=dict, init=False
    )
    lock: Any = dataclasses.field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput(f"batch_size is {self.batch_size}; give at least 1")
        if not len(self.records):
            raise BadInput("no examples; give at least one")

    @property
    def size(self) -> int:
        return len(self.records)

    @property
    def steps(self) -> int:
        """Batches that hold every example once."""
        return -(-self.size // self.batch_size)

    def identity(self) -> str:
        return self.records.identity()

    def like(self) -> Batch:
        """Zeros that take no memory, of the shapes and types of the global batch."""
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "image": (np.uint8, (self.fit.canvas, self.fit.canvas, 3)),
            "size": (np.int32, (2,)),
            "label": (np.int32, ()),
        }
        if self.seed is None:
            shapes["mask"] = (np.bool_, ())
        return {name: np.broadcast_to(kind(0), (self.batch_size, *shape)) for name, (kind, shape) in shapes.items()}

    def feed(self, step: int, index: int = 0, count: int = 1) -> Batch:
        """The batch of this step, or the index-th of `count` equal parts of its rows; begins to decode the one after.

        Returns:
            image uint8 [B, canvas, canvas, 3], size int32 [B, 2]: each image's height and width in its canvas, and
            label int32 [B]. Shuffled: of `order.indices(seed, step)`, endless. In order: examples step*B to
            step*B + B-1, with `mask` [B] false where they lie past the end (such rows are zeros).

        Raises:
            BadInput: an image of it cannot be read, by path.
            OSError: a worker has died.
        """
        ahead = step + 1 < self.steps or self.seed is not None
        wanted = [(at, index, count) for at in ([step, step + 1] if ahead else [step])]
        with self.lock:
            for key in self.under_way.keys() - wanted:  # another step was asked for than the next
                for future in self.under_way.pop(key)[1]:
                    future.cancel()
            for key in wanted:
                if key not in self.under_way:
                    self.under_way[key] = self._begin(*key)
            batch, futures = self.under_way.pop(wanted[0])
        for future in futures:
            future.result()
        return batch

    def _begin(self, step: int, index: int, count: int) -> tuple[Batch, list[Future[None]]]:
        """An empty batch, and the promises to fill it."""
        rows = self.batch_size // count
        part = slice(index * rows, (index + 1) * rows)
        batch = {name: np.zeros((rows, *array.shape[1:]), array.dtype) for name, array in self.like().items()}
        if self.seed is not None:
            chosen = order.indices(self.seed, step, self.batch_size, self.size, np)[part]
        else:
            position = np.arange(self.batch_size)[part] + step * self.batch_size
            mask = batch["mask"][:] = position < self.size
            chosen = position[mask]
        addresses = [self.records.address(int(i)) for i in chosen]
        share = min(ROWS, -(-len(chosen) // (4 * self.workers.count)) or 1)  # small enough that no worker is left over
        starts = range(0, len(chosen), share)
        return batch, [
            self.workers.decode(self.fit, addresses[i : i + share], batch, slice(i, min(i + share, len(chosen))))
            for i in starts
        ]

    def batch(self, feed: Any, step: Any) -> Any:
        """On the device: what was fed."""
        del step
        return feed

    def with_batch_size(self, batch_size: int) -> "Stream":
        return dataclasses.replace(self, batch_size=batch_size)

    def close(self) -> None:
        """End the workers; a later `feed` starts others."""
        with self.lock:
            self.under_way.clear()
        self.workers.close()


def shuffled(records: Records, batch_size: int, seed: int, fit: Fit, workers: Workers) -> Stream:
    """For training: each epoch holds every example once, in an order of its own.

    Args:
        records: of `sources.files` or `sources.prepared`.
        batch_size: of the global batch.
        seed: of the order.
        fit: `whole(canvas)`, say.
        workers: may be shared by several streams.

    Raises:
        BadInput: no examples, batch_size below 1.
    """
    return Stream(records, batch_size, seed, fit, workers)


def in_order(records: Records, batch_size: int, fit: Fit, workers: Workers) -> Stream:
    """For evaluation: every example once in `steps` batches, the last padded and masked. As `shuffled` otherwise."""
    return Stream(records, batch_size, None, fit, workers)


if __name__ == "__main__":
    work()
