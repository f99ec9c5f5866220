"""launch.py many times in seconds: a process that has imported all forks once for each command, on one CPU device.

    python launcher.py          lines in:  {"argv": [...], "cwd": "...", "env": {...}, "seconds": 60}
                                lines out: {"code": 2, "out": "...", "err": "..."}

A fork is as clean as a new process: no flag defined, no backend made. `Launcher` is the other end, for tests.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Launcher:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "100"},
        )

    def __call__(self, *flags: str, cwd: Path, seconds: int = 120, **env: str) -> Ended:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"argv": flags, "cwd": str(cwd), "seconds": seconds, "env": env}), file=self.process.stdin)
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=60)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import importlib

    import launch
    from jaxcompute import config

    for name in ("jaxcompute.train", "jaxcompute.sweep.grid", "orbax.checkpoint", "PIL.Image", "tensorflow_datasets"):
        importlib.import_module(name)
    for name in config.experiments(launch.ROOT):
        importlib.import_module(f"experiments.{name}")
    for line in sys.stdin:
        print(json.dumps(run(launch, **json.loads(line))), flush=True)


def run(launch: Any, argv: list[str], cwd: str, seconds: int, env: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.chdir(cwd)
                os.environ.update(env)
                sys.argv = [str(ROOT / "launch.py"), *argv]
                signal_alarm(seconds)
                try:
                    launch.launch()
                    code = 0
                except SystemExit as exit_:
                    code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return {"code": status, "out": texts[0], "err": texts[1]}


def signal_alarm(seconds: int) -> None:
    import signal

    signal.alarm(seconds)


if __name__ == "__main__":
    main()
