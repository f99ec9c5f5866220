"""The benchmark that kills training processes runs, and finds nothing, with a few kills."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_few_kills(tmp_path):
    out = tmp_path / "kills.json"
    command = [sys.executable, str(ROOT / "benchmarks/kills.py"), "--kills=5", f"--out={out}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert found["kills"] == 5
    assert found["problems"] == []
    assert found["steps_restored_and_equal"] > 0
