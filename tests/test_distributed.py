"""Several processes over loopback, as a launcher would start them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import worker
from PIL import Image

from benchmarks import hosts
from jaxcompute import checkpoint, distributed, log
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]
SMALL = ["--experiment=digits_mlp", "--config.features=16", "--config.log_every=10"]

LONG = [*SMALL, "--config.batch_size=120", "--config.steps=300", "--config.eval_every=300", "--config.save_every=20"]
LONG += ["--config.precision=float64"]


class Several:
    """N processes of a command that takes --coordinator, --processes and --process."""

    def __init__(
        self,
        command: list[str],
        n: int = 2,
        folders: list[Path] | None = None,
        at: str = "127.0.0.1",
        hosts: list[list[str]] | None = None,  # of each process, what its command is given to
    ):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        flags = [f"--coordinator={at}:{port}", f"--processes={n}"]
        self.said = [tempfile.TemporaryFile("w+") for _ in range(n)]  # noqa: SIM115 -- closed by end
        self.all = [
            subprocess.Popen(
                [*(hosts[i] if hosts else []), sys.executable, *command, *flags, f"--process={i}"],
                stdout=said,
                stderr=said,
                env=env,
                cwd=folders[i] if folders else ROOT,
            )
            for i, said in enumerate(self.said)
        ]

    def end(self, seconds: float = 240, stopped: int | None = None) -> list[tuple[int, list[str]]]:
        """Exit code and lines of each, less what the collectives' library says of itself; a stopped one is killed."""
        try:
            for process in self.all:
                if stopped is None or process is not self.all[stopped]:
                    process.wait(seconds)
        finally:
            for process in self.all:
                process.kill()
                process.wait()
        ended = []
        for process, said in zip(self.all, self.said, strict=True):
            with said:
                said.seek(0)
                lines = [line for line in said.read().splitlines() if not line.startswith("[Gloo]")]
            ended.append((process.returncode, lines))
        return ended


def launch(*flags: str, **kwargs) -> Several:
    return Several([str(ROOT / "launch.py"), *flags], **kwargs)


def close(one: Path, other: Path) -> None:
    """Both logged the same steps and, up to the order of summation, the same values."""
    a, b = log.read(one), log.read(other)
    assert a.keys() == b.keys()
    for step, values in a.items():
        for tag in (tag for tag in values if not tag.startswith(("perf/", "mem/"))):
            assert b[step][tag] == pytest.approx(values[tag], rel=1e-6, abs=1e-7), (step, tag)


CNN = ["--experiment=digits_cnn", "--config.features=8", "--config.dense=16", "--config.precision=float64"]


@pytest.mark.parametrize("experiment", [SMALL, [*CNN, "--config.log_every=10"]], ids=["digits_mlp", "digits_cnn"])
def test_two_processes_train_as_one(experiment, launcher, tmp_path):
    flags = [*experiment, "--config.steps=60", "--config.eval_every=30"]
    assert launcher(*flags, f"--workdir={tmp_path / 'one'}", cwd=ROOT).code == 0
    (code, said), (other_code, other_said) = launch(*flags, f"--workdir={tmp_path / 'two'}").end()
    assert (code, other_code) == (0, 0), (said, other_said)
    assert not other_said  # process 0 alone speaks, and writes:
    assert checkpoint.steps(tmp_path / "two/checkpoints") == [30, 60]
    assert any("2 x cpu" in line for line in said)
    close(tmp_path / "one", tmp_path / "two")
    apart = hosts.differences(tmp_path / "one", tmp_path / "two")
    assert experiment is SMALL or max(apart.values()) < hosts.TOLERANCE, apart  # in float64
    table = json.loads((tmp_path / "two/evaluation.json").read_text())["confusion"]
    assert sum(map(sum, table)) == 359  # every example once


def test_two_processes_of_open_mpi_train_as_one(launcher, tmp_path):
    if not shutil.which("mpirun"):
        if os.environ.get("CI"):
            pytest.fail("CI must have Open MPI: apt-get install openmpi-bin")
        pytest.skip("no openmpi-bin")
    flags = [*SMALL, "--config.steps=20"]
    assert launcher(*flags, f"--workdir={tmp_path / 'one'}", cwd=ROOT).code == 0
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable]
    command += [str(ROOT / "launch.py"), *flags, f"--workdir={tmp_path / 'two'}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0 and ended.stderr.count("2 x cpu") == 1, ended
    close(tmp_path / "one", tmp_path / "two")


def test_batches_and_checkpoints_do_not_know_how_many_devices_and_processes_there_are(tmp_path):
    whole = worker.split_run(tmp_path / "half", mesh_data=1, mesh_fsdp=4)
    shutil.copytree(tmp_path / "half", tmp_path / "four")
    shutil.rmtree(tmp_path / "half/checkpoints/6")
    for i in range(11):
        (tmp_path / f"pictures/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((6, 4), 20 + 20 * i).convert("RGB").save(tmp_path / f"pictures/{i % 3}/{i}.png")
    (code, said), (other_code, other_said) = Several([str(ROOT / "tests/worker.py"), str(tmp_path)]).end()
    assert (code, other_code) == (0, 0), (said, other_said)
    assert said == other_said == ["(36, 256)"]  # each process holds half of the kernel

    with np.load(tmp_path / "bits.npz") as file:
        two_processes = dict(file)
    for precision, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        one = worker.losses(precision, mesh_data=1)
        np.testing.assert_allclose(two_processes.pop(precision), one, rtol=tolerance)
    one = worker.losses("float64", tmp_path / "pictures", mesh_data=1)
    for layout in ("streamed", "streamed, whole to each"):
        np.testing.assert_allclose(two_processes.pop(layout), one, rtol=1e-12, err_msg=layout)
    for devices in (1, 2, 4):
        here = worker.augmented({"mesh_data": devices})
        assert here.keys() == two_processes.keys()
        for name, array in here.items():
            np.testing.assert_array_equal(array, two_processes[name], err_msg=f"{name} on {devices} devices")

    close(tmp_path / "four", tmp_path / "half")  # four devices of one process, then two processes
    shutil.rmtree(tmp_path / "new/checkpoints/6")
    worker.split_run(
        tmp_path / "new",
        mesh_data=1,
        mesh_fsdp=1,
    )  # and two processes, then one device, replicated
    close(tmp_path / "four", tmp_path / "new")
    assert whole.params["Dense_0"]["kernel"].shape == (36, 512)


@pytest.mark.parametrize(("signum", "to"), [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])], ids=["to one", "Ctrl-C"])
def test_a_signal_stops_all_after_one_step_and_one_goes_on(signum, to, launcher, tmp_path):
    flags = [*SMALL, "--config.steps=1500", "--config.eval_every=1500", "--config.save_every=40"]
    run = launch(*flags, f"--workdir={tmp_path / 'run'}")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = time.monotonic()
    for process in to:
        run.all[process].send_signal(signum)
    (code, said), (other_code, other_said) = run.end(60)
    assert (code, other_code) == (128 + signum, 128 + signum), (said, other_said)
    assert time.monotonic() - sent < 20  # 10 s and the time to write, on a machine that is busy
    assert not other_said
    status = log.read_status(tmp_path / "run")
    stopped = status["step"]
    assert status["state"] == "preempted" and 40 <= stopped < 1500
    assert said[-2] == f"stopped by {signum.name} at step {stopped:,}, saved"
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == stopped

    resumed = launcher(*flags, f"--workdir={tmp_path / 'run'}", cwd=ROOT)
    assert resumed.code == 0 and f"resuming at step {stopped:,} of 1,500" in resumed.err
    assert list(log.read(tmp_path / "run")) == list(range(10, 1501, 10))


def test_what_one_process_cannot_use_ends_all_with_one_line(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "b/run/checkpoints/7").mkdir(parents=True)
    (tmp_path / "b/run/checkpoints/7/manifest.json").touch()
    ended = launch(*SMALL, "--workdir=run", folders=folders).end()
    assert [code for code, _ in ended] == [2, 2], ended
    assert ended[0][1] == []
    (line,) = ended[1][1]
    assert "run has a checkpoint of step 7 and no config.json" in line
    assert not (tmp_path / "a/run").exists()


def test_the_save_under_way_is_finished_when_another_process_fails(tmp_path):
    fields = {"features": 16, "save_every": 5, "slow": 5.0, "end_at": 9, "by": "process 1"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    run = Several([str(ROOT / "tests/faults/faulty.py"), "--experiment=faulty", f"--workdir={tmp_path}", *flags])
    (code, said), (other_code, other_said) = run.end()
    assert (code, other_code) == (1, 1), (said, other_said)
    assert "process 1 failed: no more" in said
    status = log.read_status(tmp_path)
    assert (status["state"], status["step"]) == ("failed", 5)
    assert status["digest"] == checkpoint.manifest(tmp_path / "checkpoints", 5)["digest"]


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LONG leaves in one process."""
    workdir = tmp_path_factory.mktemp("unbroken")
    assert launcher(*LONG, f"--workdir={workdir}", cwd=ROOT).code == 0
    return workdir


LEADER = "process 0, which coordinates the others, |Either the leader task was preempted/died"  # as we say it or jax


@pytest.mark.parametrize(
    ("signum", "who", "told", "again"),
    [
        (signal.SIGKILL, 0, LEADER, 3),
        (signal.SIGKILL, 2, "process 2 does not answer: it is lost", 2),
        (signal.SIGSTOP, 1, "process 1 does not answer: it is lost", 2),
    ],
)
def test_of_three_processes_one_is_lost_and_the_same_command_goes_on_with_as_many_or_fewer(
    signum, who, told, again, unbroken, tmp_path
):
    run = launch(*LONG, "--heartbeat_timeout=20", f"--workdir={tmp_path}", n=3)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.all[who].send_signal(signum)
    ended = run.end(40, stopped=who)
    for process, (code, said) in enumerate(ended):
        if process != who:
            assert code == 1 or (who == 0 and code == -signal.SIGABRT), ended  # there jax is as fast
            assert re.search(told, "\n".join(said)) and any("most recent call first" in line for line in said), ended
    assert log.read_status(tmp_path)["state"] == ("failed" if who else "running")
    saved = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert saved < 300

    ended = launch(*LONG, f"--workdir={tmp_path}", n=again).end()
    assert [code for code, _ in ended] == [0] * again, ended
    assert f"resuming at step {saved:,} of 300" in ended[0][1]
    close(unbroken, tmp_path)


LOOP = """
import os, signal, socket, sys, time
sys.path.append("tests")
from test_security import listeners
import jax, numpy as np
from jaxcompute import distributed, sharding
from jaxcompute.core import Run

fault, who, coordinator, processes, process = (argument.rpartition("=")[2] for argument in sys.argv[1:])
distributed.start(coordinator, int(processes), int(process), heartbeat_timeout=10, step_timeout=4)
distributed.ASKED = 1000  # milliseconds
mesh = sharding.make_mesh(Run())
total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, sharding.WHOLE))
x = sharding.put(mesh, sharding.BATCH, np.ones(8, np.float32))

def stuck_in_python():
    time.sleep(600)

def disk_is_full():
    raise OSError("the disk is full")

faults = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": stuck_in_python,
    "error": disk_is_full,
}
total(x).block_until_ready()
of_name = socket.inet_aton(socket.gethostbyname(socket.gethostname()))[::-1].hex().upper()  # where gloo listens
at = {tuple(address[-13:].split(":")) for address in listeners(os.getpid())}
assert at and {host for host, _ in at} <= {"0100007F", of_name}, at
assert process == "1" or ("0100007F", f"{int(coordinator.rpartition(':')[2]):04X}") in at, at
def slow():
    time.sleep(6 if process == who else 0)

assert distributed.each(f"of {process}") == ["of 0", "of 1"]
with distributed.agreed([], (), lambda why: print("lost:", why, flush=True)) as stop:
    if fault == "slow":  # to start
        slow()
    for step in range(1, 1000):
        total(x).block_until_ready()
        stop(step)
        if fault == "slow" and step == 5:  # to save
            with distributed.unhurried(), distributed.together():
                slow()
        elif (step, process) == (5, who):
            faults[fault]()
"""


@pytest.mark.parametrize(
    ("fault", "who", "codes", "told", "stacks"),
    [
        ("error", 1, [1, 1], "process 1 failed: the disk is full", None),
        ("killed", 1, [1, -9], "process 1 does not answer: it is lost (process 0 failed: ", "in agreed"),
        ("stopped", 0, [-9, 1], "process 0, which coordinates the others, does not answer: it is lost", "in <module>"),
        ("stuck", 0, [1, 1], "step 6 ran past its limit of 4 s (--step_timeout)", "in stuck_in_python"),
        ("stuck", 1, [1, 1], "step 6 ran past its limit of 4 s (--step_timeout)", "in stuck_in_python"),
    ],
)
def test_what_ends_one_process_ends_all_and_each_says_what_it_was(fault, who, codes, told, stacks, tmp_path):
    """And the coordinator listens at its own address alone, gloo at that of the host's name."""
    (tmp_path / "loop.py").write_text(LOOP)
    began = time.monotonic()
    ended = Several([str(tmp_path / "loop.py"), fault, str(who)]).end(60, stopped=who if fault == "stopped" else None)
    assert [code for code, _ in ended] == codes, ended
    said = ["\n".join(lines) for _, lines in ended]
    for process, words in enumerate(said):
        if process != who or fault == "stuck":
            assert "lost: process" in words and told in words, ended
            assert ("most recent call first" in words) == (stacks is not None), ended
    assert stacks is None or stacks in said[who if fault == "stuck" else 1 - who], ended
    assert fault != "error" or said[who].endswith("OSError: the disk is full"), ended
    assert time.monotonic() - began < 45


def test_what_comes_before_the_steps_and_a_save_may_take_longer_than_a_step(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    ended = Several([str(tmp_path / "loop.py"), "slow", "0"]).end(60)
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "localhost:1"}, "--processes and --process missing"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "localhost:99999", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "localhost:1234", "processes": 2, "process": 2}, "--process=2: of 2 processes"),
        ({"coordinator": "0.0.0.0:1234", "processes": 2, "process": 0}, "every interface"),
        ({"coordinator": "[::]:1234", "processes": 2, "process": 0}, "every interface"),
        ({"coordinator": "192.0.2.1:1234", "processes": 2, "process": 0}, "cannot listen there"),
    ],
)
def test_flags_that_join_nothing_are_named(flags, words):
    with pytest.raises(BadInput, match=words) as caught:
        distributed.start(**flags)
    assert "\n" not in str(caught.value)
    assert not distributed.several()


def test_a_host_whose_name_is_loopback_to_itself_cannot_lead_other_hosts(monkeypatch):
    assert distributed.own_address("localhost", 45123).endswith(":45123")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(BadInput, match=r"localhost is \S+ to itself, which no other reaches; give it"):
        distributed.own_address("localhost", 45123)


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # the shell of an allocation
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_a_launcher_of_several_is_told_from_a_shell(env, found, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert distributed.detected() == found
    if found:  # and what jax cannot find out is a line
        with pytest.raises(BadInput, match=r"a launcher started several processes: .*; give --coordinator"):
            distributed.start()


def test_a_pod_that_cannot_ask_its_cluster_is_told_in_one_line(monkeypatch):
    class ConfigException(Exception):
        """As the package has it."""

    def load_incluster_config():
        raise ConfigException("Service token file does not exist.")

    config = types.SimpleNamespace(load_incluster_config=load_incluster_config)
    monkeypatch.setitem(sys.modules, "kubernetes", types.SimpleNamespace(config=config))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(BadInput, match=r"several processes: Service token file does not exist\.; give --coordinator"):
        distributed.start()
