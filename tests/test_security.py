"""Nothing that a run is given is executed, writes outside its place, or is listened for."""

import ast
import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from jaxcompute.data import sources
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]
CODE = [ROOT / "launch.py", *sorted(ROOT.glob("jaxcompute/**/*.py")), *sorted(ROOT.glob("experiments/*.py"))]

LOADERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "runpy", "code"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "torch.load"}
METHODS = {"extractall", "extract", "exec_module", "deserialize_and_load", "start_server"}


def faults(source: str) -> list[str]:
    """What could run code out of data, or write where an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in LOADERS]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [str(node.module)] if str(node.module).split(".")[0] in LOADERS else []
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in CALLS or method in METHODS:
                found.append(name)
            if name == "np.load" and keywords.get("allow_pickle") != "False":
                found.append("np.load without allow_pickle=False")
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
                found.append(f"{name}({keywords})")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=given)",
        "eval(text)",
        "tar.extractall(folder)",
        "subprocess.run(line, shell=True)",
        "jax.profiler.start_server(9999)",
    ],
)
def test_the_search_finds(source):
    assert faults(source)


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_code_out_of_data(file):
    assert faults(file.read_text()) == []


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def plain(name: str, data: bytes = b"planted") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


@pytest.mark.parametrize(
    "member",
    [
        plain("../../../../outside"),
        plain("cifar-100-binary/../../../outside"),
        link("train.bin", tarfile.SYMTYPE, "/etc/passwd"),
        link("train.bin", tarfile.LNKTYPE, "/etc/passwd"),
        link("train.bin", tarfile.FIFOTYPE, ""),
        link("train.bin", tarfile.CHRTYPE, ""),
        link("train.bin", tarfile.DIRTYPE, ""),
        plain("/tmp/jaxcompute-outside"),
        plain("train.bin"),
    ],
    ids=lambda member: getattr(member, "name", None) or member[0].name,
)
def test_an_archive_chooses_no_place_to_write(member, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manual = tmp_path / "root/downloads/manual/cifar100"
    manual.mkdir(parents=True)
    info, data = member if isinstance(member, tuple) else (member, b"")
    with tarfile.open(manual / "cifar-100-binary.tar.gz", "w:gz") as tar:
        tar.addfile(info, io.BytesIO(data))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"cifar-100-binary.tar.gz is damaged"):
        sources.load("cifar100", tmp_path / "root")
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"jaxcompute", "cifar100.lock"}
    assert not Path("/tmp/jaxcompute-outside").exists()


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path):
    with gzip.open(tmp_path / "bomb.gz", "wb", compresslevel=1) as file:
        for _ in range(201):
            file.write(bytes(1_000_000))
    assert (tmp_path / "bomb.gz").stat().st_size < 2_000_000
    with pytest.raises(BadInput, match=r"bomb.gz is damaged .* unpacks to more than 200000000 bytes"):
        sources._gunzip(tmp_path / "bomb.gz")


def test_a_name_is_never_executed_as_a_path(launcher, tmp_path):
    here = tmp_path / "here"
    evil = f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()\nclass Config: ...\nexperiment = 1\n"
    for path in ("here/evil.py", "evil.py", "here/experiments/evil.py", "here/evil/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(evil)
    names = (
        "evil",
        "./evil",
        "evil.py",
        "../evil",
        "..evil",
        ".evil",
        "experiments.evil",
        "here.evil",
        "experiments/evil",
    )
    for name in (*names, str(tmp_path / "evil"), str(tmp_path / "evil.py"), f"file://{tmp_path}/evil.py"):
        ended = launcher(f"--experiment={name}", cwd=here)
        assert ended.code == 2 and "no experiment" in ended.err, name
    assert not (tmp_path / "executed").exists()


def test_files_of_the_folder_it_is_called_in_are_not_imported(tmp_path):
    evil = f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
    for path in ("experiments/digits_mlp.py", "experiments/__init__.py", "jaxcompute/__init__.py", "jax.py", "absl.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(evil)
    command = [sys.executable, str(ROOT / "launch.py"), "--experiment=digits_mlp", "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "--config.features=128,128" in ended.stdout, ended.stderr
    assert not (tmp_path / "executed").exists()


def listeners(pid: int) -> list[str]:
    """The process's sockets that wait for others: listening TCP, and UDP or raw that is bound."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *rest = line.split()
            if rest[5] in inodes and (not table.startswith("tcp") or state == "0A"):
                found.append(f"{table} {local}")
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
def test_a_run_listens_for_no_one(tmp_path):
    with socket.socket() as own:  # the search finds
        own.bind(("127.0.0.1", 0))
        assert not listeners(os.getpid())
        own.listen()
        assert len(listeners(os.getpid())) == 1
    flags = ["--experiment=sigmoid_mlp", "--config.save_every=500", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    seen, deadline = set(), time.monotonic() + 120
    saved = tmp_path / "run/checkpoints"
    try:
        while not list(saved.glob("[0-9]*")) and time.monotonic() < deadline:
            assert process.poll() is None
            seen.update(listeners(process.pid))
            time.sleep(0.02)
        seen.update(listeners(process.pid))  # in the midst of training
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert list(saved.glob("[0-9]*"))
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "preempted"
    assert not seen
