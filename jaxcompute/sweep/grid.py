"""A sweep is a product of values, one child process and one directory a point, and a table, best first.

    --sweep=learning_rate=0.1,0.03 --sweep=seed=0,1,2

runs six points. The items of a tuple take '/' between them: `--sweep=features=64/64,128` is (64, 64) and (128,). The
same command goes on where a sweep was killed: a point whose status.json says done is skipped.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxcompute import config as configs
from jaxcompute import log, stops
from jaxcompute.errors import BadInput

AUTO = (("precision", "auto"), ("steps_per_call", 0))  # a run writes down what these became

SWITCHES = ("dry_run",)  # flags without a value

Point = dict[str, str]  # field -> value as the text of its flag


def points(config: Any, sweeps: Sequence[str]) -> list[Point]:
    """The product of `field=v1,v2` texts. Raises BadInput on an unknown field, a bad value or a repetition."""
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        field, equals, values = sweep.partition("=")
        if not field or not equals or not values:
            raise BadInput(f"--sweep={sweep}: write --sweep=field=value,value")
        if field in axes:
            raise BadInput(f"--sweep={sweep}: {field} is swept twice; give all its values in one --sweep")
        is_tuple = isinstance(getattr(config, field, None), tuple)
        axes[field] = []
        for value in values.split(","):
            read = configs.value(type(config), field, value.replace("/", ",") if is_tuple else value)
            axes[field].append(configs.text(read))  # 0.1 and 0.10 are one
        if len(set(axes[field])) < len(axes[field]):
            raise BadInput(f"--sweep={sweep}: a value stands twice")
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for point in found:
        configs.replace(config, point)  # what fields ask of one another
    if len({name(point) for point in found}) < len(found):
        raise BadInput("two points of the sweep would share a directory; sweep them apart")
    return found


def point(config: Any, sweeps: Sequence[str], number: int) -> Point:
    """One of `points`, counted from 0. Raises BadInput where there are not so many."""
    found = points(config, sweeps)
    if number >= len(found):
        raise BadInput(f"--point={number}: the sweep has {len(found)} points; count from 0 to {len(found) - 1}")
    return found[number]


def name(point: Point) -> str:
    """`learning_rate=0.1,seed=0`, with '-' for what a file name cannot hold; shortened where it is too long for one."""
    full = ",".join(f"{field}={re.sub('[^A-Za-z0-9.+_-]', '-', value)}" for field, value in point.items())
    return full if len(full) <= 200 else f"{full[:180]}-{hashlib.sha256(full.encode()).hexdigest()[:12]}"


def flags(point: Point) -> list[str]:
    """By which a run takes the point's values."""
    return [f"--config.{field}={value}" for field, value in point.items()]


def check(workdir: Path, config: Any, points: Sequence[Point]) -> None:
    """Raise BadInput where a point's directory holds a run of another config, which would be taken for this one's.

    So it does where the work directory is itself a point's, as that tells one to go on with.
    """
    if workdir.name in map(name, points) and log.read_config(workdir) is not None:
        raise BadInput(f"--workdir={workdir} is of one point of the sweep: give the sweep's own, {workdir.parent}")
    for point in points:
        saved = log.read_config(workdir / name(point))
        if saved is None:
            continue
        for field, value in configs.to_json(configs.replace(config, point)).items():
            was = saved["config"].get(field)
            if was != value and (field, value) not in AUTO:
                where = f"{workdir / name(point)} holds a run of another config"
                raise BadInput(f"{where}: {field} was {was} and is {value}; take another --workdir, or the old value")


def flags_of_children(argv: Sequence[str], own: Sequence[str] = ("sweep", "workdir")) -> list[str]:
    """The arguments (flag files read in) less those, here --sweep and --workdir, that each child has for itself."""
    kept = []
    arguments = iter(configs.expand(argv))
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        flag, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or flag not in own:
            kept.append(argument)
        elif not equals and flag not in SWITCHES:
            next(arguments)
    return kept


def run(workdir: Path, command: Sequence[str], points: Sequence[Point], best: tuple[str, Literal["max", "min"]]) -> int:
    """Run the points that are not done, one after the other; leave the table as sweep.csv, sweep.md and on the screen.

    A point that fails does not stop the others. A signal of `stops` goes to the running child, which saves itself; then
    the sweep ends.

    Args:
        workdir: of the sweep; each point has the directory `name(point)` in it.
        command: of one run; `--workdir` and the point's flags are added.
        points: from `points`.
        best: metric of the evaluation (`eval/<metric>` in metrics.jsonl) and which way is better.

    Returns:
        The exit code: 0 if every point is done, 1 if one failed, 128 + n if signal n stopped the sweep.

    Raises:
        BadInput: workdir cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: {error.strerror}; give a folder that can be written") from None
    with _forwarding() as (start, stopped):
        for i, point in enumerate(points, 1):
            child = workdir / name(point)
            done = not missing(workdir, [point])
            print(f"[{i}/{len(points)}] {name(point)}{': done before' if done else ''}", flush=True)
            if not done:
                start([*command, f"--workdir={child}", *flags(point)]).wait()
                _leave_table(workdir, points, best)
            if stopped:
                break
    if stopped and missing(workdir, points):
        print(_leave_table(workdir, points, best), flush=True)
        where = shlex.quote(f"--workdir={workdir}")
        print(f"stopped by {stopped[0].name}; the same command with {where} goes on", file=sys.stderr)
        return 128 + stopped[0]
    return finish(workdir, points, best)


def missing(workdir: Path, points: Sequence[Point]) -> list[int]:
    """The numbers of the points that are not done."""
    return [i for i, point in enumerate(points) if log.read_status(workdir / name(point)).get("state") != "done"]


def finish(workdir: Path, points: Sequence[Point], best: tuple[str, Literal["max", "min"]]) -> int:
    """The table, and the exit code: 1 where points are not done, which are named."""
    print(_leave_table(workdir, points, best), flush=True)
    failed = [name(points[i]) for i in missing(workdir, points)]
    if failed:
        print(f"{len(failed)} of {len(points)} points failed: {'  '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _forwarding() -> Iterator[tuple[Callable[[Sequence[str]], subprocess.Popen], list[signal.Signals]]]:
    """Start children that get our signals once each: in a session of their own, the terminal's Ctrl-C skips them."""
    child: list[subprocess.Popen] = []
    got: list[signal.Signals] = []

    def forward(number: int, frame: Any) -> None:
        got.append(signal.Signals(number))
        for process in child:
            process.send_signal(number)

    def start(command: Sequence[str]) -> subprocess.Popen:
        child[:] = [subprocess.Popen(command, start_new_session=True)]
        for number in got:  # came while it was being born
            child[0].send_signal(number)
        return child[0]

    with stops.handled(forward):
        yield start, got


# -- the table ---------------------------------------------------------------------------------------------------------


def _leave_table(workdir: Path, points: Sequence[Point], best: tuple[str, Literal["max", "min"]]) -> str:
    """Write sweep.csv and sweep.md; return the table for the screen."""
    metric, mode = best
    sign = -1 if mode == "max" else 1
    results = [(point, *_result(workdir / name(point), f"eval/{metric}", mode)) for point in points]
    results.sort(key=lambda result: math.inf if result[1] is None else sign * result[1])
    rows = [(*point.values(), *result) for point, *result in results]
    headers = (*points[0], metric, "step", "state")
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([headers, *rows])
    lines = [headers, ["---"] * len(headers), *([log.cell(value) for value in row] for row in rows)]
    log.replace_file(workdir / "sweep.csv", sheet.getvalue())
    log.replace_file(workdir / "sweep.md", "".join("| " + " | ".join(line) + " |\n" for line in lines))
    return log.table(rows, headers)


def _result(child: Path, tag: str, mode: Literal["max", "min"]) -> tuple[float | None, int | None, str]:
    """The best value of an evaluation's tag, its step, and the state of the run."""
    found = [
        (values[tag], step) for step, values in log.read(child).items() if math.isfinite(values.get(tag, math.nan))
    ]
    value, step = (max if mode == "max" else min)(found, key=lambda pair: pair[0], default=(None, None))
    return value, step, log.read_status(child).get("state", "not run")
