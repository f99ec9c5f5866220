"""benchmarks/first_step.py as a whole, on a small experiment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_step


def test_the_parts_add_up_to_the_time_to_the_first_step(tmp_path):
    out = tmp_path / "first.json"
    command = [sys.executable, first_step.__file__, "--experiments=sigmoid_mlp", "--turns=1", f"--out={out}"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == 0, ended
    told = json.loads(out.read_text())
    parts = told["parts"]["sigmoid_mlp"]
    assert list(parts) == ["imports", "data and trace", "compile", "first step"] and min(parts.values()) > 0
    assert told["seconds"]["sigmoid_mlp"] == [pytest.approx(sum(parts.values()))]
    assert "sigmoid_mlp" in ended.stdout and "1/1 sigmoid_mlp" in ended.stderr


def test_a_run_that_ends_before_its_first_step_is_an_error(monkeypatch):
    monkeypatch.setattr(first_step, "START", "import launch; print('imported'); launch.launch()")
    with pytest.raises(RuntimeError, match="ended with code 2"):
        first_step.start("none", {"PATH": str(Path(sys.executable).parent)})


def test_a_start_that_compiles_again_is_an_error(tmp_path, monkeypatch):
    starts = iter(range(9))

    def start(name, env):
        cache = Path(env["JAX_COMPILATION_CACHE_DIR"])
        cache.mkdir(exist_ok=True)
        (cache / f"program{next(starts)}").touch()
        return {"first step": 1.0}

    monkeypatch.setattr(first_step, "start", start)
    monkeypatch.setattr(first_step, "help_of", lambda name, env: 1.0)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(sys, "argv", ["", "--experiments=sigmoid_mlp", "--turns=1", f"--out={tmp_path}/out"])
    with pytest.raises(RuntimeError, match="sigmoid_mlp compiled something again"):
        first_step.main()
    monkeypatch.setattr(first_step, "start", lambda name, env: {})
    with pytest.raises(RuntimeError, match="nothing in the compile cache"):
        first_step.main()
    assert not (tmp_path / "out").exists()
