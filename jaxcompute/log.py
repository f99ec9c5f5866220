"""What a run leaves behind, and what is seen of it on the way.

`metrics.jsonl` is the truth; `metrics.csv` and the TensorBoard events are made from it, so that after any kill each
(step, tag) stands once in all three. A value that is not finite is null in JSON and nan in the others.
"""

import contextlib
import csv
import datetime
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TextIO

from jaxcompute import locks
from jaxcompute.errors import BadInput

Writer = Callable[[int, dict[str, float]], None]  # as in core, without its imports
Row = tuple[int, float, dict[str, float]]  # step, unix seconds, values


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold a work directory, made if need be, against every other run: the OS's lock, which dies with its process.

    Where the file system has no locks, a line says that a second run would not be refused.

    Raises:
        BadInput: another run holds it, named by host and process; or it can't be written.
    """
    file = workdir / ".lock"
    try:
        str(workdir.absolute()).encode()  # the library that writes checkpoints takes no other names
        made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        for folder in made:
            _sync(folder.parent)  # a power cut would take the checkpoints with it
        while True:
            held = file.open("a+", encoding="utf-8")  # not inherited by what the run starts
            locks.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB, "a second run in this work directory would not be refused")
            if file.exists() and os.path.samestat(file.stat(), os.fstat(held.fileno())):
                break
            held.close()  # its holder was just ending and has taken the name away
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}")
        held.flush()
    except BlockingIOError:
        raise _in_use(file) from None
    except UnicodeEncodeError:
        raise BadInput(f"--workdir={str(workdir)!a}: a path that is no UTF-8 (in this locale); give another") from None
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: {error.strerror}; give a folder that can be written") from None
    with held:
        for name in ("config.json", "status.json", "evaluation.json", "metrics.jsonl"):
            for part in workdir.glob(f".{name}.[0-9]*"):  # of a write that a kill cut off
                part.unlink()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # not empty, unless the run was refused
                    workdir.rmdir()


def _sync(folder: Path) -> None:
    """The names in it, to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free(workdir: Path) -> None:
    """Raises BadInput where another run holds it; takes nothing, so that `lock` may still find it held."""
    file = workdir / ".lock"
    with contextlib.suppress(OSError), file.open("rb") as held:  # what cannot be opened, `lock` tells of
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(file) from None


def _in_use(file: Path) -> BadInput:
    by = file.read_text("utf-8") or "another process"
    return BadInput(f"{file.parent} is in use by {by}; wait for it or end it, or take another --workdir")


# -- metrics -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writer(workdir: Path, step: int, say: Callable[[str], None] = print) -> Iterator[Writer]:
    """Open the log of a run that starts, or starts again, at a step.

    Lines of later steps, torn lines and rubbish are dropped first. A (step, tag) that already stands is not written
    again. Each write is flushed: a kill loses nothing that was written.

    Args:
        workdir: exists.
        step: of the State the run goes on from; 0 for a new one.
        say: is told where tensorboardX is missing, and with it the events.
    """
    rows = [row for row in _rows(workdir) if row[0] <= step]
    table = _merged(rows)
    file = workdir / "metrics.jsonl"
    replace_file(file, "".join(_line(*row) for row in rows), sync=True)
    for stale in workdir.glob("events.out.tfevents.*"):
        stale.unlink()

    with _sheet(workdir, table) as sheet, _events(workdir, say) as event:
        for row in rows:
            event(*row)

        def write(step: int, values: dict[str, float]) -> None:
            known = table.get(step, {})
            fresh = {tag: float(value) for tag, value in values.items() if tag not in known}
            if not fresh:
                return
            table[step] = known | fresh
            now = round(time.time(), 3)
            with _naming(file), file.open("a", encoding="utf-8") as jsonl:
                jsonl.write(_line(step, now, fresh))
            sheet(step)
            event(step, now, fresh)

        yield write


def read(workdir: Path) -> dict[int, dict[str, float]]:
    """Step to its values, from metrics.jsonl; {} where there is none."""
    return _merged(_rows(workdir))


def _rows(workdir: Path) -> list[Row]:
    """The good lines of metrics.jsonl, each (step, tag) once."""
    file = workdir / "metrics.jsonl"
    rows, seen = [], set()
    for line in file.read_text("utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
            step, when = values.pop("step"), float(values.pop("time"))
            values = {tag: math.nan if v is None else float(v) for tag, v in values.items() if (step, tag) not in seen}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            continue
        if type(step) is int and values:
            seen.update((step, tag) for tag in values)
            rows.append((step, when, values))
    return rows


def _merged(rows: Iterable[Row]) -> dict[int, dict[str, float]]:
    table: dict[int, dict[str, float]] = {}
    for step, _, values in rows:
        table.setdefault(step, {}).update(values)
    return table


def _line(step: int, when: float, values: dict[str, float]) -> str:
    return json.dumps({"step": step, "time": when, **{tag: _finite(value) for tag, value in values.items()}}) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no nan


@contextlib.contextmanager
def _sheet(workdir: Path, table: Mapping[int, Mapping[str, float]]) -> Iterator[Callable[[int], None]]:
    """metrics.csv, a row a step and a column a tag; what it gives writes the step's row anew."""
    columns: list[str] = []
    last, start = -1, 0  # newest row's step and place
    file = (workdir / "metrics.csv").open("w", encoding="utf-8", newline="")
    rows = csv.writer(file, lineterminator="\n")

    def append(step: int) -> None:
        nonlocal last, start
        last, start = step, file.tell()
        rows.writerow([step, *(table[step].get(tag, "") for tag in columns)])

    @_naming(workdir / "metrics.csv")
    def update(*steps: int) -> None:
        new = dict.fromkeys(tag for step in steps for tag in table[step] if tag not in columns)
        columns.extend(new)
        if new or steps[0] < last:  # a new column, or late news of an old step: from the start
            file.seek(0)
            file.truncate()
            rows.writerow(["step", *columns])
            for step in sorted(table):
                append(step)
        else:
            if steps[0] == last:  # training and evaluation of one step share its row, which can only grow
                file.seek(start)
            append(steps[0])
        file.flush()

    try:
        if table:
            update(*table)
        yield update
    finally:
        with contextlib.suppress(OSError):  # each write was flushed: one that failed has told
            file.close()


@contextlib.contextmanager
def _events(workdir: Path, say: Callable[[str], None]) -> Iterator[Callable[[int, float, dict[str, float]], None]]:
    if importlib.util.find_spec("tensorboardX") is None:
        say("tensorboardX is not installed: this run leaves no TensorBoard events; pip install tensorboardX")
        yield lambda step, when, values: None
        return
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    events = EventsWriter(str(workdir / "events"))  # not SummaryWriter: its thread and queue outlive a flush

    @_naming(workdir / "events.out.tfevents.*")
    def event(step: int, when: float, values: dict[str, float]) -> None:
        summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]}
        events.write_event(Event(wall_time=when, step=step, summary=summary))
        events.flush()

    try:
        yield event
    finally:
        with contextlib.suppress(OSError):
            events.close()


# -- status.json and config.json ---------------------------------------------------------------------------------------


def write_json(file: Path, value: Any, sync: bool = False) -> None:
    """Whole or not at all: a reader never sees half a file."""
    replace_file(file, json.dumps(value, indent=2) + "\n", sync)


def replace_file(file: Path, content: str, sync: bool = False) -> None:
    """Write text so that a reader sees the old file or the new one, never half of one.

    With sync it does so after a power cut too; else it may then see an empty one.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with _naming(file), part.open("w", encoding="utf-8") as written:
        written.write(content)
        if sync:
            written.flush()
            os.fsync(written.fileno())
    part.replace(file)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Around what writes to a file: that the disk is full is an OSError which does not name it by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def status(
    workdir: Path,
    state: Literal["running", "done", "preempted", "failed"],
    *,
    step: int,
    of: int,
    message: str = "",
    digest: str = "",
    kwh: float | None = None,
) -> None:
    """Write status.json. `started` is when the run first began, also after a resume; `digest` the saved State's.

    `kwh` is what the devices have used so far; where it isn't given it stays as it was, and where it isn't known it is
    left out.
    """
    now, old = _now(), read_status(workdir)
    kwh = old.get("kwh") if kwh is None else kwh
    write_json(
        workdir / "status.json",
        {
            "state": state,
            "step": step,
            "of": of,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": old.get("started", now),
            "updated": now,
            "message": message,
            "digest": digest,
            **({} if kwh is None else {"kwh": kwh}),
        },
    )


def read_status(workdir: Path) -> dict[str, Any]:
    """status.json, or {} where there is none that can be read."""
    return read_json(workdir / "status.json") or {}


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file or no object in it."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_config(workdir: Path) -> dict[str, Any] | None:
    """config.json, an object that holds the object `config`; None where the work directory has none.

    Raises:
        BadInput: it is there and is not that.
    """
    file = workdir / "config.json"
    if not os.path.exists(file):
        return None
    found = read_json(file)
    if found is None or not isinstance(found.get("config"), dict):
        raise BadInput(f"{file} is damaged; bring it back from a copy, or take another --workdir")
    return found


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def describe(config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """What config.json holds: the config, the caller's facts (device, precision, ...) and what made the run.

    The environment is left out on purpose: keys live there.
    """
    return {
        "config": dict(config),
        **facts,
        "argv": sys.argv,
        "versions": versions(),
        "git": git(),
        "time": _now(),
    }


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(code: Path = Path(__file__).parents[1]) -> dict[str, Any] | None:
    """Commit of the code and whether files differ from it; None where the code is no git repository's root."""
    if not (code / ".git").exists():  # installed: the repository around it is another's
        return None
    command = ["git", "--no-optional-locks", "-C", str(code), "status", "--porcelain=v2", "--branch"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}


# -- evaluation.json ---------------------------------------------------------------------------------------------------


def evaluation(step: int, results: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, Any]:
    """What evaluation.json holds: an evaluation's floats, and the confusion counts [labels][predictions] with names."""
    values = {name: _finite(value) if isinstance(value, float) else value.tolist() for name, value in results.items()}
    return {"step": step, "classes": list(classes), **values}


def evaluation_table(found: Mapping[str, Any]) -> str:
    """`evaluation` as text: the metrics on a line, and a table of each class's accuracy and commonest mistake."""
    found = dict(found)
    step, classes, confusion = found.pop("step", 0), found.pop("classes", []), found.pop("confusion", [])
    line = "  ".join([f"step {step:,}", *(f"{name} {cell(value) or 'nan'}" for name, value in found.items())])
    if not classes or len(classes) != len(confusion):
        return line
    rows = []
    for i, (name, row) in enumerate(zip(classes, confusion, strict=True)):
        count, wrong = sum(row), [0 if j == i else n for j, n in enumerate(row)]
        worst = max(range(len(row)), key=wrong.__getitem__)
        mistake = f"{classes[worst]} ({wrong[worst]})" if wrong[worst] else ""
        rows.append((name, count, row[i] / count if count else None, mistake))
    return line + "\n" + table(rows, ("class", "examples", "accuracy", "mostly taken for"))


def hardware(workdir: Path) -> str:
    """What the hardware gave, in a line: medians over the log periods, and what was used in all; '' where unknown."""
    seen: dict[str, list[float]] = {}
    for values in read(workdir).values():
        for tag, value in values.items():
            seen.setdefault(tag, []).append(value)
    middle = {tag: statistics.median(values) for tag, values in seen.items()}
    kwh = read_status(workdir).get("kwh")
    said = {
        "perf/examples_per_sec": lambda value: f"{value:,.0f} examples/s",
        "perf/mfu": lambda value: f"{value:.2g} of peak" if value < 0.01 else f"{value:.0%} of peak",
        "perf/data_wait_frac": lambda value: f"{value:.1%} waiting for data",
        "mem/peak_bytes": lambda value: f"{quantity(value, 'B')} at peak",
        "perf/joules_per_example": lambda value: f"{value:.3g} J an example",
    }
    parts = [say(middle[tag]) for tag, say in said.items() if tag in middle]
    return ", ".join(parts + ([] if kwh is None else [f"{kwh:.3g} kWh"]))


# -- the screen --------------------------------------------------------------------------------------------------------

Show = Callable[[int, Mapping[str, float], float], None]  # (step, values, examples a second)
Say = Callable[[str], None]


def console(of: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> tuple[Show, Say]:
    """Two closures over one stream: `show` draws the progress, `say` prints a line without spoiling it.

    On a terminal the progress is one line drawn over itself, ten times a second at most; elsewhere it is a plain line,
    once a second at most. The last step is always shown. Where the stream is gone, a closed pipe or a log on a full
    disk, both fall silent: training goes on.

    Args:
        of: optimizer steps in all.
        stream: default sys.stderr.
    """
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    first: tuple[int, float] | None = None  # step and time of the first call: compilation is not part of the pace
    drawn = -math.inf

    def put(text: str, end: str = "\n") -> None:
        nonlocal out
        try:
            print(text, end=end, file=out, flush=True)
        except OSError:
            with contextlib.suppress(OSError):  # what lies in its buffer would fail again at the interpreter's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            out = io.StringIO()

    def show(step: int, values: Mapping[str, float], examples_per_sec: float) -> None:
        nonlocal first, drawn
        now = clock()
        first = first or (step, now)
        if step < of and now - drawn < (0.1 if terminal else 1.0):
            return
        drawn = now
        pace = (now - first[1]) / (step - first[0]) if step > first[0] else None
        left = None if pace is None else pace * (of - step)
        line = progress_line(step, of, values, examples_per_sec, left, _columns(out) if terminal else None)
        put(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n")

    def say(text: str) -> None:
        put(f"\r\x1b[K{text}" if terminal else text)

    return show, say


def progress_line(
    step: int,
    of: int,
    values: Mapping[str, float],
    examples_per_sec: float,
    seconds_left: float | None,
    columns: int | None,
) -> str:
    """A line of less than `columns` characters (None: no limit and no bar); what matters least goes first."""
    left = "?" if seconds_left is None else str(datetime.timedelta(seconds=round(seconds_left)))
    parts = [
        f"{step}/{of}",
        *(f"{name} {value:.4g}" for name, value in values.items()),
        f"{left} left",
        f"{examples_per_sec:,.0f} examples/s",
    ]
    if columns is None:
        return "  ".join(parts)
    while len("  ".join(parts)) >= columns and len(parts) > 1:
        parts.pop()
    line = "  ".join(parts)[: columns - 1]
    room = min(columns - 1 - len(line) - 4, 20)  # two brackets, two spaces
    if room < 5:
        return line
    done = room * step // max(of, 1)
    return f"[{'#' * done:-<{room}}]  {line}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # 0: a terminal that does not know
    except (OSError, ValueError):
        return 80


# -- tables ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], words: int | None = None) -> str:
    """Aligned text, numbers to the right.

    Args:
        words: columns at the left that are words; all others are figures, with their units. None: as the values are.
    """
    cells = [list(headers), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    if words is not None:
        right = [i >= words for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    align = [str.rjust if number else str.ljust for number in right]
    return "\n".join("  ".join(a(c, w) for a, c, w in zip(align, line, widths, strict=True)).rstrip() for line in cells)


def cell(value: Any) -> str:
    """None is blank, integers get thousands separators, other numbers four digits."""
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, Integral) else f"{float(value):.4g}"


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 28.8 GFLOP."""
    value = float(f"{value:.3g}")
    power = max(0, min(5, (len(str(int(value))) - 1) // 3))
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def parameter_table(params: Any) -> str:
    """A line a layer: path, shapes, parameters, bytes; and the total. Leaves may be abstract (ShapeDtypeStruct).

    Where a mesh splits any of them, a line a parameter: its shape, how it is split, and the bytes that a device holds.
    """
    import jax  # here: a sweep's parent reads logs without it

    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    at: list[Any] = [getattr(leaf, "sharding", None) for _, leaf in named]
    if any(sharding is not None and not sharding.is_fully_replicated for sharding in at):
        rows = [
            (
                name,
                "x".join(map(str, leaf.shape)) or "scalar",
                ", ".join("/".join([p] if isinstance(p, str) else p or ["-"]) for p in sharding.spec) or "whole",
                math.prod(leaf.shape) * leaf.dtype.itemsize,
                math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            )
            for (name, leaf), sharding in zip(named, at, strict=True)
        ]
        rows.append(("total", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows)))
        return table(rows, ("parameter", "shape", "split over", "bytes", "bytes a device"))

    layers: dict[str, list[tuple[str, Any]]] = {}
    for path, leaf in named:
        *layer, name = path.split("/")
        layers.setdefault("/".join(layer), []).append((name, leaf))
    rows = []
    for layer, leaves in layers.items():
        shapes = ", ".join(f"{name} {'x'.join(map(str, leaf.shape)) or 'scalar'}" for name, leaf in leaves)
        count = sum(leaf.size for _, leaf in leaves)
        rows.append((layer or "/", shapes, count, sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)))
    rows.append(("total", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return table(rows, ("layer", "shapes", "parameters", "bytes"))
