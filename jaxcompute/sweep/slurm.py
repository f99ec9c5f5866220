"""A run, or a sweep as a job array, through Slurm: submitted, followed, and put back in the queue when it must stop.

    python launch.py --experiment=NAME --launcher=slurm --nodes=2 --gpus_per_node=8 --time=4:00:00

submitit writes and submits the batch script, which `--dry_run` prints: the same command, once for each GPU, whose
processes find each other by Slurm's variables. As Slurm preempts a job, and GRACE seconds or up to a minute more before
its time is up, it sends SIGTERM; the run saves itself and exits with 143, and the script puts the job back into the
queue, where the same command goes on. `scancel JOB` ends it for good.

submitit's common way pickles a function for the job to load. Here it is given the command, and nothing is pickled.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcompute import stops
from jaxcompute.errors import BadInput

try:
    import submitit
    from submitit.core.utils import FailedJobError
except ModuleNotFoundError:
    raise BadInput("--launcher=slurm needs submitit: pip install -e '.[slurm]'") from None

# Seconds a process may outlive the first of its job to end. Without it one that is stopped holds all nodes until time
# is up. By --kill-on-bad-exit the others get SIGTERM and exit with 143, and a run that failed is put into the queue.
WAIT = 60
GRACE = 120  # seconds from SIGTERM to the end of a job's time: for a step, an evaluation and a save
STOPPED = [128 + number for number in sorted(stops.CLUSTER)]  # exit codes of a run that saved itself
REQUEUE = f"""
code=$?
# stopped from outside, and saved: into the queue again
case $code in {"|".join(map(str, STOPPED))}) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""
TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d"
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT"}
POLL = 2.0  # seconds between two questions to Slurm


# -- submitting --------------------------------------------------------------------------------------------------------


class Executor(submitit.SlurmExecutor):
    """submitit's, of a command in place of a function."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # its script may be printed where no Slurm is

    def script(self, command: str) -> str:
        return self._make_submission_file_text(command, "")

    def submit_command(self, command: str) -> str:
        """The job's number."""
        return self._submit_command(command).job_id


def executor(
    folder: Path, name: str, nodes: int, gpus_per_node: int, time: str, more: Sequence[str], points: Sequence[int] = ()
) -> Executor:
    """What a job asks for.

    Args:
        folder: absolute; its script and its logs are left there.
        name: of the job.
        nodes: machines.
        gpus_per_node: a process is started for each, or one a node where there are none.
        time: minutes, H:M:S or D-H:M:S, after which the run is stopped, saved, and goes on as a new turn of the job.
        more: other options of sbatch, "partition=gpu".
        points: the numbers of an array's tasks.

    Raises:
        BadInput: a time or an option that is none.
    """
    if not re.fullmatch(TIME, time):
        raise BadInput(f"--time={time}: write minutes, HOURS:MM:SS or DAYS-HOURS:MM:SS")
    if seconds(time) < 2 * GRACE:  # else it would be stopped before it came further, again and again
        raise BadInput(f"--time={time}: a run is stopped {GRACE} s before its end; give at least {2 * GRACE // 60}")
    options: dict[str, Any] = {"requeue": True, "signal": f"TERM@{GRACE}"}
    for option in more:
        key, equals, value = option.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", key) or "\n" in value:
            raise BadInput(f"--sbatch={option}: write a long option of sbatch, --sbatch=partition=gpu")
        options[key] = value if equals else True
    if points:
        options["array"] = ",".join(map(str, points))
    made = Executor(folder)
    made.update_parameters(
        job_name=name,
        nodes=nodes,
        ntasks_per_node=max(1, gpus_per_node),
        time=time,
        stderr_to_stdout=True,
        srun_args=[f"--wait={WAIT}"],
        teardown=REQUEUE.strip().splitlines(),
        additional_parameters=options,
        **({"gpus_per_node": gpus_per_node} if gpus_per_node else {}),
    )
    if points:
        made.parameters["map_count"] = len(points)  # names the logs by array and task
    return made


def seconds(time: str) -> int:
    """Of a time as sbatch takes it."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # minutes first
    hours, minutes, left = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def submit(made: Executor, command: str, folder: Path) -> str:
    """The number of the new job, or of the one that was submitted from this folder before and has not ended.

    Raises:
        BadInput: there is no Slurm here, or it refuses the job.
    """
    if not shutil.which("sbatch"):
        raise BadInput("--launcher=slurm: no sbatch on PATH; start it where Slurm is, or see the script by --dry_run")
    before = max((int(file.name.partition("_")[0]) for file in folder.glob("[0-9]*_submission.sh")), default=None)
    if before is not None and not ended(tasks(str(before))):
        return str(before)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with outside(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return made.submit_command(command)
    except FailedJobError as error:
        reason = " ".join(str(error).removeprefix("sbatch: error: ").split())
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    finally:
        for file in folder.glob(".submission_file_*"):
            file.unlink()
    raise BadInput(f"--launcher=slurm: {reason}")


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Where this is a shell of Slurm, without the variables that it was given: a job would take them for its own."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF"]
    held = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(held)


# -- following ---------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A job, or one task of an array, as Slurm has it."""

    number: str  # in the array; of several that wait together "2-5"; "" without one
    state: str
    reason: str  # why it waits
    code: int  # exit code, 128 + n by signal n


def tasks(number: str) -> list[Task] | None:
    """[] where Slurm knows the job no more, None where Slurm does not answer."""
    asked = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
    if asked.returncode:
        return [] if "Invalid job id" in asked.stdout + asked.stderr else None
    found = []
    for line in asked.stdout.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        reason = fields["Reason"] if fields["JobState"] == "PENDING" and fields["Reason"] != "None" else ""
        code, _, signum = fields.get("ExitCode", "0:0").partition(":")
        code = 128 + int(signum) if signum.isdecimal() and int(signum) else int(code)
        found.append(Task(fields.get("ArrayTaskId", ""), fields["JobState"], reason, code))
    return found


def ended(found: list[Task] | None) -> bool:
    return found is not None and all(task.state in ENDED for task in found)


def follow(number: str, tell: Callable[[Task], None], file: Path | None = None) -> int | None:
    """Wait for a job's end, tell each change of its tasks, and print what comes into its log.

    Returns:
        The exit code, 1 where it has none and did not complete; None where Slurm has forgotten the job.
    """
    told: dict[str, Task] = {}
    asked, at = 0.0, 0
    found: list[Task] | None = None
    while True:
        last = ended(found)
        if file and file.exists():
            with file.open("rb") as log:
                log.seek(at)
                sys.stdout.write(log.read().decode(errors="replace"))
                sys.stdout.flush()
                at = log.tell()
        if last:
            break
        if time.monotonic() - asked > POLL:
            found, asked = tasks(number), time.monotonic()
            for task in found or ():
                if told.get(task.number) != task:
                    told[task.number] = task
                    tell(task)
        time.sleep(POLL / 8)
    if not found:
        return None
    return max(task.code or int(task.state != "COMPLETED") for task in found)
