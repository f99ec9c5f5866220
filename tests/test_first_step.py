"""benchmarks/first_step.py as a whole, on a small experiment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_step


def test_the_parts_add_up_to_the_time_to_the_first_step(tmp_path):
    out = tmp_path / "first.json"
    command = [sys.executable, first_step.__file__, "--experiments=sigmoid_mlp", "--turns=1", f"--out={out}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    told = json.loads(out.read_text())
    parts = told["parts"]["sigmoid_mlp"]
    assert list(parts) == ["imports", "data and trace", "compile", "first step"] and min(parts.values()) > 0
    assert told["seconds"]["sigmoid_mlp"] == [pytest.approx(sum(parts.values()))]
    assert told["without_the_cache"]["sigmoid_mlp"]["compile"] > parts["compile"]
    assert "sigmoid_mlp" in ended.stdout and "1/1 sigmoid_mlp" in ended.stderr


def test_a_run_that_ends_before_its_first_step_is_an_error(monkeypatch):
    monkeypatch.setattr(first_step, "IMPORTS", "")
    with pytest.raises(RuntimeError, match="ended with code 2"):
        first_step.start("none", {"PATH": str(Path(sys.executable).parent)})
