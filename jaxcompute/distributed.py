"""Several processes: JAX's own multi-controller runtime, and the few things they must agree on.

    start(...)       joins the processes that a launcher, or three flags, started; with one process it does nothing
    together()       a block that fails in every process where it fails in one, told once
    share(text)      process 0's text in every process
    each(text)       every process's text in every process
    agreed(signals)  when to stop: a signal to any process stops all of them after one and the same step

What is agreed passes through the runtime's key-value store on the host, not through the devices: the compiled program
is the one that a single process runs, and a step costs a lock that nobody contends for.
"""

import atexit
import contextlib
import faulthandler
import ipaddress
import itertools
import math
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import clusters  # private, as are the two below: jax has no public door to what its launcher found,
from jax._src.distributed import global_state  # nor to its key-value store

from jaxcompute.errors import BadInput, Elsewhere, line_of

LATE = "ran past its limit"
ROLL_CALL = 5.0  # seconds for a process to answer, if it is alive
ASKED = 2**31 - 1  # milliseconds, as long as the store takes a question: 24.8 days
PATIENCE = 3600  # seconds to wait for a peer that is alive: one that prepares a data set, or compiles
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # of this step: an interactive shell is a step of one
_calls = itertools.count()  # every process makes the same calls in the same order: a call's number names its keys
_told: BaseException | None = None  # the error that the other processes know of
_silence = 100.0  # seconds after which a process is taken for lost
_limit = 0.0  # seconds that the loop may stand still; 0: any
_moved = math.inf  # when it last came further; inf: it is not measured now


# -- joining -----------------------------------------------------------------------------------------------------------


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat_timeout: float = 100,
    step_timeout: float = 600,
) -> None:
    """Join the other processes, found by all three arguments or by JAX under Slurm, Open MPI and Kubernetes.

    Before anything else of jax. Where neither says that there are several processes, nothing is done. The coordinator,
    process 0, listens on its own address alone, never on every interface: whoever reaches its port may join.

    Args:
        coordinator: HOST:PORT of process 0, as the others reach it.
        processes: how many there are.
        process: which this is, from 0.
        heartbeat_timeout: seconds of silence within which a process is taken for lost, and the others end.
        step_timeout: seconds that the loop of `agreed` may stand still, from its first `moved` on; 0: any.

    Raises:
        BadInput: some of the three are missing or wrong, the address cannot be listened on, or nobody answers.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise BadInput(f"{' and '.join(missing)} missing: several processes need --coordinator, --processes, --process")
    if missing and not detected():
        return
    ids = None  # devices of this process; None: all it sees
    if missing:
        try:
            with warnings.catch_warnings(action="ignore"):  # of a package that Kubernetes needs: the line below says it
                coordinator, processes, process, ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, None, 300
                )
        except Exception as error:  # jax's own, or of the package that asks Kubernetes
            raise BadInput(_unknown(error)) from None
    if coordinator is None or processes is None or process is None:
        raise BadInput(_unknown("jax does not know this launcher"))
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise BadInput(f"--coordinator={coordinator}: write HOST:PORT, an address of process 0 that the others reach")
    if not 0 <= process < processes:
        raise BadInput(f"--process={process}: of {processes} processes, count from 0 to {processes - 1}")
    global _silence, _limit
    _silence, _limit = heartbeat_timeout, step_timeout
    faulthandler.enable()  # jax ends a process whose peer is lost by SIGABRT: with its Python stacks, then
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; `agreed` sees to signals
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=own_address(host.strip("[]"), int(port)) if process == 0 else None,
            heartbeat_timeout_seconds=math.ceil(heartbeat_timeout),
            shutdown_timeout_seconds=PATIENCE,  # process 0 may be writing the last checkpoint
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"no {processes} processes came together at --coordinator={coordinator}: {reason}") from None


def detected() -> bool:
    """Whether a launcher started this process as one of several."""
    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return indexed or any(os.environ.get(name, "1") not in ("", "1") for name in COUNTS)


def own_address(host: str, port: int) -> str:
    """The address of this machine that a host name stands for, with the port. Raises BadInput where none can listen."""
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if address in ("0.0.0.0", "::"):
            raise BadInput(f"--coordinator={host}:{port}: that is every interface; give the one the others reach")
        if ipaddress.ip_address(address).is_loopback and os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
            mend = "give it its own address in /etc/hosts there"  # Debian gives a machine's own name 127.0.1.1
            raise BadInput(
                f"--coordinator={host}:{port}: {host} is {address} to itself, which no other reaches; {mend}"
            )
        with socket.create_server((address, port), family=family):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"--coordinator={host}:{port}: process 0 cannot listen there: {reason}") from None
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def _unknown(why: object) -> str:
    why = " ".join(str(why).split())
    return f"a launcher started several processes: {why}; give --coordinator, --processes and --process"


def several() -> bool:
    """Whether this process was joined to others."""
    return global_state.client is not None


# -- agreeing ----------------------------------------------------------------------------------------------------------


def share(text: str) -> str:
    """The text that process 0 gave, in every process."""
    if not several():
        return text
    client, key = _client(), f"jaxcompute/{next(_calls)}"
    if jax.process_index() == 0:
        client.key_value_set(key, text)
    return client.blocking_key_value_get(key, PATIENCE * 1000)


def each(text: str) -> list[str]:
    """What every process gave, by their number, in all of them."""
    if not several():
        return [text]
    client, key = _client(), f"jaxcompute/{next(_calls)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"{key}/{i}", PATIENCE * 1000) for i in range(jax.process_count())]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave the block, or none does: an error in one is raised there, and as Elsewhere in the others.

    Where several fail the first of them tells. In the block no process may wait for the devices of another.
    """
    global _told
    if not several():
        yield
        return
    client, key, me = _client(), f"jaxcompute/{next(_calls)}", jax.process_index()
    own = None
    try:
        yield
    except Exception as error:
        own = error
        client.key_value_set(f"{key}/{me}", f"{2 if isinstance(error, BadInput) else 1} {line_of(error)}")
    client.wait_at_barrier(key, PATIENCE * 1000)
    failed = {int(name.rpartition("/")[2]): value for name, value in client.key_value_dir_get(f"{key}/")}
    if not failed:
        return
    first = min(failed)
    code, _, message = failed[first].partition(" ")
    _told = own if own and first == me else Elsewhere(f"process {first}: {message}", int(code))
    raise _told


@contextlib.contextmanager
def agreed(
    signals: list[int], alike: tuple[type[BaseException], ...], lost: Callable[[str], None]
) -> Iterator[Callable[[int], bool]]:
    """Around the loop, a question for it to ask after each call: is this the step after which all stop?

    One process stops as soon as it has a signal. Of several, the one that has it says so, each then says how far its
    loop has come, and all stop at the first step beyond; so an evaluation or a compilation that is under way comes to
    its end first, however long it takes. An error in one loop, or a loop that has begun and stands still for longer
    than the limit of `start`, ends all: each tells why, and which process does not answer any more. What comes before
    the first question, or `moved`, and what is done `unhurried`, is no step: it may take its time.

    Args:
        signals: that came to this process; that which came to another is put in front.
        alike: errors that are raised in all processes at one step, so none need be told.
        lost: is given what ended another process, before this one ends too.
    """
    global _moved
    if not several():
        yield lambda at: bool(signals)
        return
    _moved = math.inf
    client, key, me = _client(), f"jaxcompute/{next(_calls)}", jax.process_index()
    reached, last = 0, sys.maxsize  # steps: that this loop has asked about, and beyond which it stops
    quiet = 0.3 * _silence  # seconds; jax takes half of it, at the least
    moving, ended, answered = threading.Lock(), threading.Event(), time.monotonic()

    def say(word: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has said its word before
            client.key_value_set(f"{key}/word", word)

    def listen() -> None:
        nonlocal last
        word, message = "", ""
        while not word:
            try:
                word, _, message = client.blocking_key_value_get(f"{key}/word", ASKED).partition(" ")
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # jax ends this process too, with more words
                    end("process 0, which coordinates the others, is lost", stacks=True)
        if word == "lost":
            end(message, stacks=True)
        if word == "failed":
            if silent := roll_call():
                message = f"process {' and '.join(map(str, silent))} does not answer: it is lost ({message})"
            if not message.startswith(f"process {me} failed"):  # that one ends by the error itself
                end(message, stacks=bool(silent) or LATE in message)
        elif word != "end":
            with moving:  # this loop waits here until the others have said how far they are
                client.key_value_set(f"{key}/at/{me}", str(reached))
                client.wait_at_barrier(f"{key}/at", PATIENCE * 1000)
                signals.insert(0, int(word))
                last = max(int(at) for _, at in client.key_value_dir_get(f"{key}/at/"))

    def beat() -> None:
        """Show process 0, now and then, that this one runs; it looks whose beats stand still.

        A process that is stopped keeps its connections: jax would notice, and abort all with no word to `lost`.
        """
        nonlocal answered
        heard: dict[tuple[str, str], float] = {}  # by process and its newest beat, since when
        for count in itertools.count():
            if ended.wait(_silence / 20):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"{key}/beat/{me}", str(count), allow_overwrite=True)
                answered = time.monotonic()
                beats = client.key_value_dir_get(f"{key}/beat/") if me == 0 else []
                heard = {beat: heard.get(beat, answered) for beat in beats}
            silent = sorted(int(at.rpartition("/")[2]) for (at, _), since in heard.items() if answered - since > quiet)
            if silent:
                say(f"lost process {' and '.join(map(str, silent))} does not answer: it is lost")

    def watch() -> None:
        """Whatever holds the loop up, a peer or its own Python, ends in the limit."""
        while not ended.wait(1.0):
            if time.monotonic() - answered > quiet:
                end("process 0, which coordinates the others, does not answer: it is lost", stacks=True)
            if _limit and time.monotonic() - _moved > _limit:
                message = f"process {me}: step {reached + 1:,} {LATE} of {_limit:g} s (--step_timeout)"
                threading.Thread(target=say, args=[f"failed {message}"], daemon=True).start()
                if not ended.wait(2 * ROLL_CALL):  # all that listen tell and leave meanwhile
                    end(message, stacks=True)  # the coordinator does not

    def roll_call() -> list[int]:
        """The processes that do not answer."""
        everyone, until = set(range(jax.process_count())), time.monotonic() + ROLL_CALL
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{key}/here/{me}", str(reached))
            while True:
                here = client.key_value_dir_get(f"{key}/here/")
                silent = everyone - {int(name.rpartition("/")[2]) for name, _ in here}
                if not silent or time.monotonic() > until:
                    return sorted(silent)
                time.sleep(0.1)
        return [0]

    def end(why: str, stacks: bool) -> NoReturn:
        print(why, file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback()
        lost(why)
        leave()

    def leave() -> NoReturn:
        """End this process by itself; the coordinator last, as its end is the end of all."""
        if me == 0:
            time.sleep(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def stop(at: int) -> bool:
        nonlocal reached
        moved()
        if signals and last == sys.maxsize:
            say(str(signals[0]))
        with moving:
            reached = at
            return at > last

    threads = [threading.Thread(target=target, name=target.__name__, daemon=True) for target in (listen, beat, watch)]
    for thread in threads:
        thread.start()
    word = "end"
    try:
        yield stop
    except BaseException as error:
        if error is not _told and not isinstance(error, alike):
            word = f"failed process {me} failed: {line_of(error)}"
            atexit.register(leave)  # runs before jax's own, which would wait for the others
        raise
    finally:
        ended.set()
        say(word)
        for thread in threads:
            thread.join()


def moved() -> None:
    """The loop, or an evaluation in it, has come a step further."""
    global _moved
    _moved = time.monotonic()


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """What is done in the block is no step, and may take longer than one may."""
    global _moved
    _moved = math.inf
    yield
    moved()


def _client() -> Any:
    return global_state.client
