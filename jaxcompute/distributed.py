"""Several processes: JAX's own multi-controller runtime, and the few things they must agree on.

    start(...)       joins the processes that a launcher, or three flags, started; with one process it does nothing
    together()       a block that fails in every process where it fails in one, told once
    share(text)      process 0's text in every process
    agreed(signals)  when to stop: a signal to any process stops all of them after one and the same step

What is agreed passes through the runtime's key-value store on the host, not through the devices: the compiled program
is the one that a single process runs, and a step costs a lock that nobody contends for.
"""

import atexit
import contextlib
import itertools
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import clusters  # private, as are the two below: jax has no public door to what its launcher found,
from jax._src.distributed import global_state  # nor to its key-value store

from jaxcompute.errors import BadInput, Elsewhere

PATIENCE = 3600  # seconds to wait for a peer that is alive: one that prepares a data set, or compiles
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # of this step: an interactive shell is a step of one
_calls = itertools.count()  # every process makes the same calls in the same order: a call's number names its keys
_told: BaseException | None = None  # the error that the other processes know of


# -- joining -----------------------------------------------------------------------------------------------------------


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes, found by all three arguments or by JAX under Slurm, Open MPI and Kubernetes.

    Before anything else of jax. Where neither says that there are several processes, nothing is done. The coordinator,
    process 0, listens on its own address alone, never on every interface: whoever reaches its port may join.

    Args:
        coordinator: HOST:PORT of process 0, as the others reach it.
        processes: how many there are.
        process: which this is, from 0.

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
        except (RuntimeError, ValueError) as error:
            raise BadInput(_unknown(error)) from None
    if coordinator is None or processes is None or process is None:
        raise BadInput(_unknown("jax does not know this launcher"))
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise BadInput(f"--coordinator={coordinator}: write HOST:PORT, an address of process 0 that the others reach")
    if not 0 <= process < processes:
        raise BadInput(f"--process={process}: of {processes} processes, count from 0 to {processes - 1}")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; `agreed` sees to signals
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=own_address(host.strip("[]"), int(port)) if process == 0 else None,
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
        line = " ".join(str(error).split()) or type(error).__name__
        client.key_value_set(f"{key}/{me}", f"{2 if isinstance(error, BadInput) else 1} {line}")
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
    loop has come, and all stop at the first step beyond. An error in one loop ends the others, which may be waiting
    for its devices.

    Args:
        signals: that came to this process; that which came to another is put in front.
        alike: errors that are raised in all processes at one step, so none need be told.
        lost: is given what ended another process, before this one ends too.
    """
    if not several():
        yield lambda at: bool(signals)
        return
    client, key, me = _client(), f"jaxcompute/{next(_calls)}", jax.process_index()
    reached, last = 0, sys.maxsize  # steps: that this loop has asked about, and beyond which it stops
    moving = threading.Lock()

    def say(word: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has said its word before
            client.key_value_set(f"{key}/word", word)

    def listen() -> None:
        nonlocal last
        word, _, message = client.blocking_key_value_get(f"{key}/word", 2**31 - 1).partition(" ")
        if word == "failed":
            if not message.startswith(f"process {me} "):
                print(message, file=sys.stderr, flush=True)
                lost(message)
                _leave(client, key)
        elif word != "end":
            with moving:  # this loop waits here until the others have said how far they are
                client.key_value_set(f"{key}/at/{me}", str(reached))
                client.wait_at_barrier(f"{key}/at", PATIENCE * 1000)
                signals.insert(0, int(word))
                last = max(int(at) for _, at in client.key_value_dir_get(f"{key}/at/"))

    def stop(at: int) -> bool:
        nonlocal reached
        if signals and last == sys.maxsize:
            say(str(signals[0]))
        with moving:
            reached = at
            return at > last

    thread = threading.Thread(target=listen, name="agreed", daemon=True)
    thread.start()
    word = "end"
    try:
        yield stop
    except BaseException as error:
        if error is not _told and not isinstance(error, alike):
            word = f"failed process {me} failed: {' '.join(str(error).split()) or type(error).__name__}"
            atexit.register(_leave, client, key)  # runs before jax's own, which would wait for the others
        raise
    finally:
        say(word)
        thread.join()


def _leave(client: Any, key: str) -> None:
    """End this process by itself, once the others know."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(f"{key}/left", 10_000)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _client() -> Any:
    return global_state.client
