"""launch.py as a user runs it: in a process of its own."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax._src import compilation_cache

ROOT = Path(__file__).parents[1]
SMALL = ["--experiment=digits_mlp", "--config.features=16", "--config.steps=40", "--config.eval_every=10"]


def launch(*flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def digest(workdir: Path, step: int) -> str:
    return json.loads((workdir / f"checkpoints/{step}/manifest.json").read_text())["digest"]


def test_help_lists_every_field_with_its_meaning():
    shown = launch("--experiment=cifar_resnet", "--help")
    assert shown.returncode == 0
    for words in ("--config.depth=20", "<20|32|44|56|110|18>", "--config.seed=0", "drives initial", "--workdir"):
        assert words in shown.stdout
    assert "--logtostderr" not in shown.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--experiment=NAME", "digits_cnn", "cifar_resnet"]),
        (["--experiment=digit_cnn"], ["digit_cnn", "did you mean digits_cnn", "mnist_lenet"]),
        (["--experiment=../launch"], ["../launch", "digits_cnn"]),
        (["--experiment=digits_cnn", "--config.learning_rat=1"], ["did you mean", "config.learning_rate"]),
        (["--experiment=digits_cnn", "--config.epochs=many"], ["config.epochs", "many", "a finite number"]),
        (["--experiment=digits_cnn", "--config.precision=half"], ["config.precision", "half", "bfloat16"]),
        (["--experiment=digits_cnn", "--mode=fly"], ["mode", "fly", "train"]),
        (["--experiment=digits_cnn", "--config.batch_size=0"], ["batch_size", "0"]),
        (["--experiment=digits_cnn", "--config.mesh_data=64"], ["mesh_data=64", "there are 1"]),
        (["--experiment=digits_cnn", "--mode=evaluate"], ["--workdir"]),
        (["--experiment=digits_cnn", "--mode=evaluate", "--workdir=nowhere"], ["nowhere", "checkpoint"]),
        (["--experiment=digits_cnn", "--mode=replay", "--workdir=nowhere"], ["nowhere", "not finite"]),
        (["--experiment=digits_cnn", "--sweep=speed=1,2"], ["speed"]),
        (["--experiment=digits_cnn", "--mode=evaluate", "--workdir=x", "--sweep=seed=1,2"], ["sweep", "--workdir"]),
        (["--experiment=mnist_lenet", "--data_dir=nowhere"], ["mnist", "nowhere", "digits_cnn"]),
        (["--experiment=folder_cnn"], ["train_dir"]),
        (["--experiment=folder_cnn", "--config.train_dir=nowhere", "--config.eval_dir=nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path):
    ended = launch(*flags, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    for word in words:
        assert word in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing left half-written


def test_train_then_the_printed_command_evaluates_and_the_same_command_is_done(tmp_path):
    ran = launch(*SMALL, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    last = (ran.stdout + ran.stderr).strip().splitlines()[-1]
    command = shlex.split(last.partition(": ")[2])
    assert Path(command[0]).name.startswith("python")
    workdir = tmp_path / next(word for word in command if word.startswith("--workdir=")).removeprefix("--workdir=")
    assert workdir.parent == tmp_path / "runs/digits_mlp"

    evaluated = launch(*command[2:], cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((workdir / "evaluation.json").read_text())
    assert sum(map(sum, result["confusion"])) == 359
    assert f"accuracy {result['accuracy']:.4g}" in evaluated.stdout
    assert "mostly taken for" in evaluated.stdout

    # the config comes from the work directory: the flags need not be given again
    again = launch("--experiment=digits_mlp", f"--workdir={workdir}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already at step 40" in again.stderr
    changed = launch("--experiment=digits_mlp", f"--workdir={workdir}", "--config.seed=9", cwd=tmp_path)
    assert changed.returncode == 2
    assert "seed was 0 and is 9" in changed.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_goes_on_to_the_same_bits(signum, tmp_path):
    flags = [*SMALL, "--config.steps=2000", "--config.save_every=100", "--config.eval_every=2000"]
    assert launch(*flags, f"--workdir={tmp_path / 'whole'}").returncode == 0

    command = [sys.executable, str(ROOT / "launch.py"), *flags, f"--workdir={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed/checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list((tmp_path / "killed/checkpoints").glob("[0-9]*"))
    process.send_signal(signum)
    said, _ = process.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signum
        assert said.strip().splitlines()[-1].startswith("to go on: ")
        assert json.loads((tmp_path / "killed/status.json").read_text())["state"] == "preempted"
    assert not (tmp_path / "killed/checkpoints/2000").exists()

    resumed = launch(*flags, f"--workdir={tmp_path / 'killed'}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert digest(tmp_path / "killed", 2000) == digest(tmp_path / "whole", 2000)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what differs by the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: v for tag, v in line.items() if not tag.startswith(("time", "perf/", "mem/"))} for line in lines]


def test_a_second_run_is_refused_and_a_dead_one_is_followed(tmp_path):
    flags = [*SMALL, "--config.steps=1000", "--config.save_every=100", "--config.eval_every=1000"]
    flags += [f"--workdir={tmp_path / 'run'}"]
    first = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *flags], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run/checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)  # every thread of it: alive, and itself touching nothing
        files = lambda: {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}  # noqa: E731
        before = files()
        second = launch(*flags)
        assert second.returncode == 2
        (line,) = second.stderr.strip().splitlines()
        assert f"in use by process {first.pid} on {socket.gethostname()}" in line
        assert files() == before
    finally:
        first.kill()
        first.wait()
    third = launch(*flags)
    assert third.returncode == 0, third.stderr
    assert "resuming at step" in third.stderr
    assert not (tmp_path / "run/.lock").exists()


def test_a_deterministic_run_stays_one(launcher, tmp_path):
    """XLA aborts on a flag that it does not know, and the mesh is refused where it comes too late."""
    flags = ["--experiment=digits_mlp", f"--workdir={tmp_path}"]
    ran = launcher(*flags, "--config.deterministic", "--config.steps=2", "--config.features=16", cwd=ROOT, XLA_FLAGS="")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "config.json").read_text())["config"]["deterministic"] is True
    (line,) = [line for line in ran.err.splitlines() if line.startswith("State of step 2: ")]
    assert line.endswith(digest(tmp_path, 2))
    again = launcher(*flags, cwd=ROOT)
    assert again.code == 0 and line in again.err, again.err
    changed = launcher(*flags, "--noconfig.deterministic", cwd=ROOT)
    assert changed.code == 2 and "deterministic was True and is False" in changed.err


def test_a_run_that_fails_says_why_in_a_line_and_exits_with_1(tmp_path):
    failed = launch(*SMALL, "--config.learning_rate=1e30", f"--workdir={tmp_path}")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    error, _, command = failed.stderr.strip().splitlines()[-1].partition("; to see where it began: ")
    assert "not finite" in error
    replayed = launch(*shlex.split(command)[2:])
    assert replayed.returncode == 0, replayed.stderr
    assert f"{error.partition(':')[0]}: first not finite is the output of Dense_" in replayed.stdout


def test_a_sweep_leaves_a_table_best_first(tmp_path):
    sweep = [*SMALL, "--sweep=learning_rate=0.00001,0.003", f"--workdir={tmp_path}"]
    ran = launch(*sweep)
    assert ran.returncode == 0, ran.stderr
    rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert rows[0].startswith("learning_rate,accuracy")
    assert [row.split(",")[0] for row in rows[1:]] == ["0.003", "1e-05"]
    assert (tmp_path / "sweep.md").read_text().startswith("| learning_rate |")
    again = launch(*sweep)
    assert again.stdout.count("done before") == 2
    other = launch(*sweep, "--config.dropout=0")  # the points that are there are not this sweep's
    assert other.returncode == 2
    assert "dropout was 0.2 and is 0.0" in other.stderr


def test_a_point_of_a_sweep_goes_on_by_the_commands_that_it_prints(launcher, tmp_path):
    (tmp_path / "flags").write_text("--sweep=learning_rate=0.003,1e30\n")
    sweep = [*SMALL, "--flagfile=flags"]
    ran = launcher(*sweep, "--point=0", "--workdir=a b", cwd=tmp_path)
    assert ran.code == 0, ran.err
    (workdir,) = tmp_path.glob("a b/learning_rate=0.003")
    *go_on, mode = shlex.split(ran.err.splitlines()[-1].partition("to evaluate: ")[2])[2:]
    assert mode == "--mode=evaluate"
    assert "already at step 40" in launcher(*go_on, cwd=tmp_path).err
    evaluated = launcher(*go_on, mode, cwd=tmp_path)
    assert evaluated.code == 0 and "accuracy" in evaluated.out, evaluated
    (line,) = [line for line in ran.err.splitlines() if line.startswith("after a kill the same command goes on with ")]
    (own,) = shlex.split(line.rpartition(" with ")[2])  # not the sweep's folder, in which it would look for the point's
    again = launcher(*sweep, "--point", "0", own, cwd=tmp_path)
    assert "already at step 40" in again.err, again.err
    assert [path for path in workdir.iterdir() if "=" in path.name] == []

    failed = launcher(*sweep, "--point=1", cwd=tmp_path)
    assert failed.code == 1 and list(tmp_path.glob("runs/digits_mlp/*/learning_rate=1e+30")), failed
    command = shlex.split(failed.err.splitlines()[-1].partition("to see where it began: ")[2])
    replayed = launcher(*command[2:], cwd=tmp_path)
    assert replayed.code == 0 and "first not finite is" in replayed.out, replayed


def test_flags_may_stand_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--experiment=digits_mlp\n--config.steps=0\n--config.epochs=-1\n")
    ended = launch(f"--flagfile={tmp_path / 'flags'}")
    assert ended.returncode == 2
    assert "epochs=-1" in ended.stderr


def test_no_secret_of_the_environment_is_left_in_a_run_nor_in_the_caches(tmp_path):
    env = os.environ | {
        "WANDB_API_KEY": "planted-secret-0451",
        "XDG_CACHE_HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
    del env["JAX_COMPILATION_CACHE_DIR"]  # of all tests; now it lies in the other cache
    for name, rate, code in ("good", "0.01", 0), ("bad", "1e30", 1):
        flags = [*SMALL, f"--config.learning_rate={rate}", f"--workdir={tmp_path / name}"]
        command = [sys.executable, str(ROOT / "launch.py"), *flags]
        ran = subprocess.run(command, capture_output=True, env=env, cwd=ROOT, timeout=300)
        assert ran.returncode == code, ran.stderr
        assert b"planted-secret" not in ran.stdout + ran.stderr
    left = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    compiled = [data for file, data in left.items() if file.name.endswith("-cache")]
    assert compiled and tmp_path / "bad/nonfinite/batch.npz" in left
    for data in [*left.values(), *map(compilation_cache.decompress_executable, compiled)]:
        assert b"planted-secret" not in data


def test_home_stands_for_itself_in_a_workdir(launcher, tmp_path):
    ended = launcher("--experiment=sigmoid_mlp", "--workdir=~/run", "--mode=evaluate", cwd=tmp_path, HOME="/home/none")
    assert "no checkpoint in /home/none/run/checkpoints" in ended.err
