"""The signals that ask a run to save and end, and who sends them."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

CLUSTER = signal.SIGTERM, signal.SIGUSR1  # to every process of a job
TERMINAL = signal.SIGINT, signal.SIGHUP  # Ctrl-C, and a terminal that is closed
STOPS = *CLUSTER, *TERMINAL


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, `handler` gets each of STOPS; but not SIGHUP where it is ignored, as `nohup` starts a run.

    As with `signal.signal`, only of the main thread.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in STOPS if number != signal.SIGHUP or not nohup}
    try:
        yield
    finally:
        for number, old in before.items():
            if old is not None:  # else it was set outside of Python
                signal.signal(number, old)
