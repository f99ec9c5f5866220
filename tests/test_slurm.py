"""Jobs of a real Slurm, of this machine as one node or as two: set up from Debian's packages by slurm.sh."""

import csv
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_distributed import close

from benchmarks import hosts
from jaxcompute import log

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, str(ROOT / "launch.py")]
SMALL = ["--experiment=digits_mlp", "--config.features=16", "--config.log_every=500"]
LONG = [*SMALL, "--config.steps=9000", "--config.eval_every=4500", "--config.save_every=500"]


# -- without Slurm -----------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_and_needs_no_slurm(launcher, tmp_path):
    flags = ["--launcher=slurm", "--nodes=2", "--gpus_per_node", "8", "--time=4:00:00", "--sbatch=partition=gpu"]
    ended = launcher(*SMALL, *flags, "--dry_run", "--workdir=run", cwd=tmp_path, PATH="")
    assert ended.code == 0, ended.err
    options = {line for line in ended.out.splitlines() if line.startswith("#SBATCH")}
    asked = {"nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "time=4:00:00", "partition=gpu", "signal=TERM@120"}
    assert {f"#SBATCH --{option}" for option in [*asked, "requeue", "open-mode=append"]} <= options
    assert "\nsrun " in ended.out and " --wait=60 " in ended.out  # else a process that is stopped would hold the job
    assert f"{' '.join([LAUNCH[0], '-u', LAUNCH[1], *SMALL])} --workdir={tmp_path}/run\n" in ended.out
    assert 'case $code in 138|143) scontrol requeue "$SLURM_JOB_ID" ;; esac\nexit $code\n' in ended.out
    assert not list(tmp_path.iterdir())

    ended = launcher(*SMALL, "--sweep=seed=3,1,2", "--launcher=slurm", "--dry_run", cwd=tmp_path)
    assert "#SBATCH --array=0,1,2\n" in ended.out and "--sweep=seed=3,1,2" in ended.out
    assert " --point=$SLURM_ARRAY_TASK_ID\n" in ended.out and "gpus" not in ended.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--launcher=slurm"], "no sbatch on PATH"),
        (["--launcher=slurm", "--time=4h"], "--time=4h: write minutes, HOURS:MM:SS or DAYS-HOURS:MM:SS"),
        (["--launcher=slurm", "--time=3:59"], "--time=3:59: a run is stopped 120 s before its end; give at least 4"),
        (["--launcher=slurm", "--sbatch=--partition=x"], "--sbatch=--partition=x: write a long option of sbatch"),
        (["--launcher=slurm", "--nodes=0"], "--nodes=0"),
        (["--launcher=slurm", "--config.epochs=-1"], "epochs"),
        (["--launcher=slurm", "--sweep=sed=1"], "no field sed (did you mean seed?)"),
        (["--launcher=slurm", "--mode=doctor"], "--mode=doctor looks at this machine"),
        (["--nodes=2", "--time=9"], "--nodes and --time: of a job; add --launcher=slurm"),
        (["--dry_run"], "--dry_run: of a job; add --launcher=slurm"),
        (["--sweep=seed=1,2", "--point=2"], "--point=2: the sweep has 2 points; count from 0 to 1"),
        (["--point=0"], "--point=0: of which sweep?"),
        (["--launcher=slurm", "--point=0"], "--point=0: of which sweep?"),
        (["--launcher=slurm", "--sweep=seed=1,2", "--point=0", "--dry_run"], "--point=0: a job runs all points"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, launcher, tmp_path):
    ended = launcher(*SMALL, *flags, cwd=tmp_path, PATH="")
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1, ended
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:05", 3605), ("2-3", 183600), ("0-0:10", 600), ("1-00:00:01", 86401)],
)
def test_a_time_is_read_as_sbatch_reads_it(time, seconds):
    from jaxcompute.sweep import slurm

    assert slurm.seconds(time) == seconds


# -- with one ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of its commands."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        if os.environ.get("CI"):
            pytest.fail("CI must have Slurm: apt-get install slurm-wlm munge")
        pytest.skip("no slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    script = [str(ROOT / "tests/slurm.sh")]
    subprocess.run([*script, "start", str(folder)], check=True, timeout=60)
    yield os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([*script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture
def two_nodes(slurm, tmp_path_factory) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Two hosts, each a network namespace: the command that runs a command on the first, and its environment."""
    folder = tmp_path_factory.mktemp("two")  # its sockets' names must not be long
    script = str(ROOT / "tests/slurm.sh")
    try:
        with hosts.hosts(folder) as (first, second):
            try:
                for command in ([*first, script, "start", folder, "4", "host2"], [*second, script, "join", folder]):
                    subprocess.run(command, check=True, timeout=60)
                yield first, slurm | {"SLURM_CONF": str(folder / "slurm.conf")}
            finally:
                subprocess.run([*first, script, "stop", folder], check=True, timeout=60)
    except hosts.NotAllowed as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LONG leaves where nobody stops it."""
    workdir = tmp_path_factory.mktemp("unbroken")
    whole = launcher(*LONG, f"--workdir={workdir}", cwd=ROOT)
    assert whole.code == 0, whole
    return workdir


def start(env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=ROOT)


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=9)
        time.sleep(0.02)


def job(workdir: Path) -> str:
    """Its number."""
    (script,) = (workdir / "slurm/train").glob("*_submission.sh")
    return script.name.partition("_")[0]


# How Slurm may stop a job: its number, and its process's.


def scancel(slurm: dict[str, str], number: str, pid: int) -> None:
    subprocess.run(["scancel", "--signal=TERM", number], check=True, env=slurm)


def preempted(slurm: dict[str, str], number: str, pid: int) -> None:
    """By a job that takes the whole node, which Slurm gives a few seconds' life."""
    command = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(command, check=True, env=slurm, stdout=subprocess.DEVNULL)


def time_is_up(slurm: dict[str, str], number: str, pid: int) -> None:
    """The run stands still until Slurm, which looks twice a minute, sends it SIGTERM and with it SIGCONT."""
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("stop", "flags"),
    [
        (scancel, []),
        (preempted, []),
        (preempted, ["--sbatch=partition=warned"]),  # it is given GraceTime
        (time_is_up, ["--time=4", "--sbatch=signal=TERM@180"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__,
)
def test_a_job_that_slurm_stops_goes_on_in_the_queue_to_the_bits_of_an_unbroken_run(
    slurm, unbroken, tmp_path, stop, flags
):
    follower = start(slurm, *LAUNCH, *LONG, *flags, "--launcher=slurm", f"--workdir={tmp_path / 'job'}")
    wait_for(tmp_path / "job", "checkpoints/[0-9]*", follower)
    number = job(tmp_path / "job")
    stop(slurm, number, log.read_status(tmp_path / "job")["pid"])
    out, err = follower.communicate(timeout=300)
    assert follower.returncode == 0, (out, err)
    assert "stopped by SIGTERM at step" in out and "resuming at step" in out and "9000/9000" in out  # its log
    states = [
        line.partition(": ")[2].partition(" ")[0] for line in err.splitlines() if line.startswith(f"job {number}: ")
    ]
    assert states[-2:] == ["running", "completed"] and states.count("running") == 2 and "pending" in states[-4:]
    one, other = log.read_status(unbroken), log.read_status(tmp_path / "job")
    assert one["digest"] == other["digest"] and one["state"] == other["state"] == "done"
    close(unbroken, tmp_path / "job")


def test_a_job_of_two_nodes_is_one_run_of_two_processes_and_goes_on_in_the_queue(two_nodes, launcher, tmp_path):
    first, env = two_nodes
    one, workdir = tmp_path / "one", tmp_path / "job"
    long = [*SMALL, "--config.steps=5000", "--config.save_every=500", "--config.precision=float64"]
    assert launcher(*long, f"--workdir={one}", cwd=ROOT).code == 0
    follower = start(env, *first, *LAUNCH, *long, "--launcher=slurm", "--nodes=2", f"--workdir={workdir}")
    wait_for(workdir, "checkpoints/[0-9]*", follower)
    subprocess.run([*first, "scancel", "--signal=TERM", job(workdir)], check=True, env=env)
    out, err = follower.communicate(timeout=300)
    assert follower.returncode == 0, (out, err)
    assert "2 x cpu" in out and "stopped by SIGTERM at step" in out and "resuming at step" in out, out
    assert log.read_status(workdir)["state"] == "done"
    apart = hosts.differences(one, workdir)
    assert "train/loss" in apart and max(apart.values()) < 1e-9, apart


def test_a_job_is_left_alone_followed_again_and_ended_for_good(slurm, tmp_path):
    command = [*LAUNCH, *SMALL, "--config.steps=900000", "--launcher=slurm", f"--workdir={tmp_path / 'job'}"]
    follower = start(slurm, *command)
    wait_for(tmp_path / "job", "slurm/train/*_0_log.out", follower)
    number = job(tmp_path / "job")
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 130 and f"to end it: scancel {number}" in err.splitlines()[-1]

    follower = start(slurm, *command)
    wait_for(tmp_path / "job", "checkpoints/[0-9]*", follower)
    assert select.select([follower.stdout], [], [], 60)[0]  # the log, while the job runs
    subprocess.run(["scancel", number], check=True, env=slurm)
    out, err = follower.communicate(timeout=120)
    assert f"job {number}: cancelled" in err and "resuming" not in out
    assert follower.returncode == 143
    assert job(tmp_path / "job") == number


def test_a_sweep_is_an_array_and_only_what_is_missing_is_submitted_again(slurm, launcher, tmp_path):
    flags = [*SMALL, "--config.steps=100", "--sweep=seed=0,1,2", f"--workdir={tmp_path / 'sweep'}"]
    assert launcher(*flags, "--point=1", cwd=ROOT).code == 0
    ended = subprocess.run([*LAUNCH, *flags, "--launcher=slurm"], env=slurm, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    (script,) = (tmp_path / "sweep/slurm/train").glob("*_submission.sh")
    assert "#SBATCH --array=0,2\n" in script.read_text()
    rows = list(csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines()))
    assert sorted((row["seed"], row["step"], row["state"]) for row in rows) == [(s, "100", "done") for s in "012"]
    assert "seed=2: completed" in ended.stderr and "seed=1:" not in ended.stderr
    assert f"{float(rows[0]['accuracy']):.4g}" in ended.stdout


def test_the_shell_of_an_allocation_is_one_process_and_srun_in_it_is_several(slurm, tmp_path):
    flags = [*SMALL, "--config.steps=60", "--config.log_every=10"]
    command = [*LAUNCH, *flags, f"--workdir={tmp_path / 'one'}"]
    shell = " && ".join(["env", " ".join(command), " ".join(["srun", *command[:-1], f"--workdir={tmp_path / 'two'}"])])
    ended = subprocess.run(["salloc", "-n2", "sh", "-c", shell], env=slurm, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    assert "SLURM_NTASKS=2\n" in ended.stdout  # what jax alone would wait for a second process by
    assert "1 x cpu" in ended.stdout + ended.stderr and "2 x cpu" in ended.stdout + ended.stderr
    close(tmp_path / "one", tmp_path / "two")


def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
    refused = subprocess.run(
        [*LAUNCH, *SMALL, "--launcher=slurm", "--sbatch=partition=none", f"--workdir={tmp_path / 'run'}"],
        env=slurm,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "invalid partition" in refused.stderr and refused.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
