"""`--mode=verify_resume`: is a run that is killed the unbroken run? On the user's own experiment and machine.

Two short runs of the same command in processes of their own: one is left alone, one gets SIGKILL again and again. Then
every State that was saved and every metric that was logged is compared, by bits; and each life must have said that it
went on from the newest State, as one that always begins anew comes to the same bits.
"""

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxcompute import checkpoint, log
from jaxcompute.errors import BadInput

# defaults: the user's flags come after them
SHORT = ("--config.steps=60", "--config.save_every=5", "--config.eval_every=20", "--config.log_every=4")
TIMED = ("perf/", "mem/")  # tags that differ from run to run


def resume(command: Sequence[str], flags: Sequence[str], kills: int = 4, say: Callable[[str], None] = print) -> bool:
    """Whether a run that is killed at random moments equals the unbroken one in every State and metric.

    Args:
        command: that starts a run, without flags.
        flags: the user's.
        kills: at most; a run that comes to its end first has had its share.
        say: is given the kills and the table, digests side by side.

    Raises:
        BadInput: a run fails by itself; its last words.
    """
    folder = Path(tempfile.mkdtemp(prefix="jaxcompute-verify-"))
    unbroken, killed = folder / "unbroken", folder / "killed"

    def start(workdir: Path) -> subprocess.Popen:
        # of a flag that is given twice the last counts
        own = ["--mode=train", f"--config.keep_last={2**31}", f"--workdir={workdir}"]
        with screen(workdir).open("w") as file:
            return subprocess.Popen([*command, *SHORT, *flags, *own], stdout=file, stderr=file)

    began = time.monotonic()
    finish(start(unbroken), unbroken)
    took = time.monotonic() - began
    saved = checkpoint.steps(unbroken / "checkpoints")
    times = [checkpoint.manifest(unbroken / "checkpoints", step)["time"] for step in saved]
    say(f"the unbroken run took {took:.1f} s and saved {len(saved)} times")

    rng, moments, anew, newest = random.Random(0), [], [], 0
    while len(moments) < kills:
        # by turns shortly after a save of this life, and anywhere: while it starts, restores or compiles
        saves, most = (0, took) if len(moments) % 2 else (rng.randint(1, 2), 2 * (times[-1] - times[0]) / len(times))
        before, process = len(checkpoint.steps(killed / "checkpoints")), start(killed)
        while process.poll() is None and len(checkpoint.steps(killed / "checkpoints")) < before + saves:
            time.sleep(0.002)
        try:
            process.wait(rng.uniform(0, most))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            anew += begun_anew(killed, newest)
        moments.append(time.time())
        newest = max(checkpoint.steps(killed / "checkpoints"), default=0)
        say(f"kill {len(moments)}: the newest State on the disk is of step {newest}")
    finish(start(killed), killed)
    anew += begun_anew(killed, newest)

    states = [
        (step, one[:16], other[:16], sum(moment < when for moment in moments), "yes" if one == other else "NO")
        for step, one, other, when in side_by_side(unbroken / "checkpoints", killed / "checkpoints")
    ]
    unlike = differences(unbroken, killed)
    say(log.table(states, ("step", "unbroken", "killed", "kills before", "equal")))
    for line in [*anew, *unlike[:10]]:
        say(line)
    equal = [state[-1] for state in states].count("yes")
    say(f"{len(moments)} kills: {equal} of {len(states)} States equal in every bit, {len(unlike)} metrics differ")
    if equal == len(states) and not unlike and not anew and moments:
        shutil.rmtree(folder)
        return True
    why = "on a GPU add --config.deterministic" if moments else "too short to be killed: more steps"
    say(f"NOT SHOWN ({why}); both runs are in {folder}")
    return False


def begun_anew(workdir: Path, newest: int) -> list[str]:
    """A line where the run that has ended trained, and did not go on from the newest State there was."""
    said = screen(workdir).read_text()
    if not newest or "compiled in" not in said or f"resuming at step {newest:,} " in said:
        return []
    return [f"a run began anew, and the State of step {newest} was there"]


def screen(workdir: Path) -> Path:
    """The file that holds what a run said last."""
    return workdir.with_suffix(".txt")


def finish(process: subprocess.Popen, workdir: Path) -> None:
    if process.wait():
        words = screen(workdir).read_text().strip().splitlines() or ["it said nothing"]
        raise BadInput(f"the {workdir.name} run ended with exit code {process.returncode}: {words[-1]}")


def side_by_side(one: Path, other: Path) -> list[tuple[int, str, str, float]]:
    """Of each step that either directory lists: both digests, "" where it is absent, and when the second was saved."""
    there = [{step: checkpoint.manifest(where, step) for step in checkpoint.steps(where)} for where in (one, other)]
    none = {"digest": "", "time": 0.0}
    pairs = [(step, there[0].get(step, none), there[1].get(step, none)) for step in sorted(there[0].keys() | there[1])]
    return [(step, a["digest"], b["digest"], b["time"]) for step, a, b in pairs]


def differences(one: Path, other: Path) -> list[str]:
    """A line for each metric that two work directories do not share in every bit, timings apart, or hold twice."""
    first, second = metrics(one), metrics(other)
    rows = Counter((step, tag) for step, tag, _ in logged(other))
    lines = [f"step {step}: {tag} stands {count} times" for (step, tag), count in rows.items() if count > 1]
    for step, tag in sorted({*first, *second}):
        values = first.get((step, tag), "absent"), second.get((step, tag), "absent")
        if values[0] != values[1]:
            lines.append(f"step {step}: {tag} is {values[0]} in {one.name} and {values[1]} in {other.name}")
    return lines


def metrics(workdir: Path) -> dict[tuple[int, str], str]:
    """(step, tag) to the value's digits, which are those of its bits; without timings."""
    return {(step, tag): repr(value) for step, tag, value in logged(workdir) if not tag.startswith(TIMED)}


def logged(workdir: Path) -> list[tuple[int, str, float | None]]:
    """(step, tag, value) as they stand in metrics.jsonl, line by line; a torn line is an error."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], tag, value) for row in rows for tag, value in row.items() if tag not in ("step", "time")]
