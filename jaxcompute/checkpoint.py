"""Checkpoints: Orbax behind a few functions, made so that a run may be killed at any moment.

    <directory>/<step>/state/           Orbax's own files: one flat dict {"params/Dense_0/kernel": array, ...}
    <directory>/<step>/manifest.json    what was saved, and the SHA-256 of every file

A step exists if and only if it stands under its final name: everything is written and synced in `.tmp-*`, then one
rename commits it. Pruning renames to `.trash-*` before it deletes, and a step that is saved again is `.old-*` until the
new one stands. So whatever is listed is whole, and what a killed run left behind is never taken for a checkpoint. One
process at a time may save in a directory; any may read.

Nothing is trusted on the way back: files are hashed before Orbax sees them, and the arrays it returns are hashed
again, so a restored State equals the saved one in every bit or is refused by name.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import jaxcompute
from jaxcompute.core import PyTree, State
from jaxcompute.errors import BadInput, line_of

Rank = tuple[str, Literal["max", "min"]]  # which metric ranks checkpoints, and which way
Directory = str | os.PathLike[str]  # of all the checkpoints of one run
OLD = ".old-"  # before a step's number: the one that is being replaced


class Damaged(BadInput):
    """A file of a checkpoint is missing or is not what was saved."""


# What is there


def steps(directory: Directory) -> list[int]:
    """The steps that can be restored, ascending."""
    return _steps(directory, "manifest.json")


def _steps(directory: Directory, *files: str) -> list[int]:
    """Those whose folder holds one of these."""
    names = {path.parent.name for file in files for path in Path(directory).glob(f"[0-9]*/{file}")}
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def _once_saved(directory: Directory) -> list[int]:
    """Newest first; with those that have lost their manifest and are not listed any more."""
    return _steps(directory, "manifest.json", "state")[::-1]


def manifest(directory: Directory, step: int) -> dict[str, Any]:
    """What was saved at a step.

    Returns:
        step; metrics {name: float or None where not finite} or None; extra, the caller's own; digest of the State;
        arrays {path: "float32[64,10]"}; files {path: {bytes, sha256}}; versions {package: version}; seconds since 1970.

    Raises:
        BadInput: there is no such step.
        Damaged: the manifest is not what was written, or cannot be read.
    """
    path = Path(directory) / str(step) / "manifest.json"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if (path.parent / "state").exists():
            raise Damaged(_damage(path.parent, path.name, "is gone")) from None
        there = ", ".join(map(str, steps(directory))) or "none"
        raise BadInput(f"no checkpoint of step {step} in {directory}; there are: {there}") from None
    except OSError as error:
        raise Damaged(_damage(path.parent, path.name, error.strerror or str(error))) from None
    try:
        content = json.loads(text)
        seal = content.pop("sha256")
        # the bytes, not only their meaning: a changed space is damage too
        if _sealed(content) != text or seal != _sha256(_json(content)) or content["step"] != step:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(_damage(path.parent, "manifest.json", "is not what was saved")) from None
    return content


def best(directory: Directory, rank: Rank = ("accuracy", "max")) -> int | None:
    """The step whose saved metric is best; the newest of equals; None where no step has a finite one."""
    return next(iter(_ranked(directory, rank)), None)


def _ranked(directory: Directory, rank: Rank) -> list[int]:
    """Steps with a finite metric, best first."""
    name, direction = rank
    scores = []
    for step in steps(directory):
        try:
            value = (manifest(directory, step)["metrics"] or {}).get(name)
        except BadInput:  # damaged, or pruned meanwhile
            continue
        if value is not None:
            scores.append((value if direction == "max" else -value, step))
    return [step for _, step in sorted(scores, reverse=True)]


# Restore


def restore(directory: Directory, step: int, like: PyTree, part: str = "") -> Any:
    """The State of a step, bit for bit as it was saved; or a part of it.

        params = restore(directory, step, program.abstract.params, part="params")  # under any optimizer, or none

    Args:
        directory: of the checkpoints.
        step: one of `steps(directory)`.
        like: the shapes, dtypes and shardings, `jax.ShapeDtypeStruct` for arrays. Any mesh will do;
            without a sharding an array goes to the default device.
        part: path of the part that `like` is, such as "params" or "ema/params"; "": it is the whole State.

    Raises:
        BadInput: the State saved has other paths, shapes or dtypes: nothing is cast, padded or dropped.
        Damaged: a file is missing or changed.
    """
    folder = Path(directory) / str(step)
    saved = manifest(directory, step)
    under = f"{part}/" if part else ""
    specs = {name: spec for name, spec in saved["arrays"].items() if name.startswith(under)}
    wanted = {under + name: leaf for name, leaf in named(like).items()}
    _same({name: _spec(leaf) for name, leaf in wanted.items()}, specs, folder)
    with ThreadPoolExecutor() as pool:
        for check in [pool.submit(_check, folder, name, seal) for name, seal in saved["files"].items()]:
            check.result()
    with _checkpointer() as checkpointer:
        arrays = checkpointer.restore((folder / "state").absolute())
    if _digest(saved["arrays"], arrays) != saved["digest"]:
        raise Damaged(_damage(folder, "state", "gives other arrays than were saved"))
    state = jax.tree.map(_place, like, jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]))
    # Without x64 JAX narrows float64 in silence.
    _same({under + name: _spec(leaf) for name, leaf in named(state).items()}, specs, folder)
    return state


def restore_newest(directory: Directory, like: PyTree, say: Callable[[str], None]) -> tuple[int, State] | None:
    """The newest step that is whole, and its State; None where nothing was ever saved.

    Each damaged step on the way is named through `say`.

    Raises:
        BadInput: the newest whole step does not fit `like`, or the directory cannot be read.
        Damaged: there are checkpoints and none is whole; names the newest's damage.
    """
    try:
        os.listdir(directory)
    except NotADirectoryError:
        raise BadInput(f"{directory} is no folder; move it away, or take another work directory") from None
    except OSError as error:  # a glob would find nothing there, and the run would begin anew
        if os.path.lexists(directory) or not isinstance(error, FileNotFoundError):
            mend = "mend it, or take another work directory"
            raise BadInput(f"{directory} cannot be read: {error.strerror}; {mend}") from None
    return _restore_first(directory, _once_saved(directory), like, say)


def restore_best(
    directory: Directory, like: PyTree, rank: Rank, say: Callable[[str], None]
) -> tuple[int, State] | None:
    """The best step that is whole, or the newest where none is ranked, and its State; else as `restore_newest`.

    A step whose manifest is damaged might be the best, so it is named too.
    """
    ranked = _ranked(directory, rank)
    damaged, unranked = [], []
    for step in _once_saved(directory):
        try:
            manifest(directory, step)
        except Damaged:
            damaged.append(step)
            continue
        if step not in ranked:
            unranked.append(step)
    return _restore_first(directory, [*damaged, *ranked, *unranked], like, say)


def _restore_first(
    directory: Directory, candidates: Sequence[int], like: PyTree, say: Callable[[str], None]
) -> tuple[int, State] | None:
    damage: list[Damaged] = []
    for step in candidates:
        try:
            state = restore(directory, step, like)
        except Damaged as error:
            damage.append(error)
            continue
        for error in damage:
            say(f"{error}; trying another")
        if damage:
            say(f"using checkpoint {Path(directory) / str(step)} instead")
        return step, state
    if damage:
        mend = "bring one back from a copy, or start in another directory"
        raise Damaged(f"no whole checkpoint in {directory}: {mend} ({damage[0]})")
    return None


def _same(wanted: Mapping[str, str], saved: Mapping[str, str], folder: Path) -> None:
    names = [*wanted, *(name for name in saved if name not in wanted)]
    differ = [name for name in names if wanted.get(name) != saved.get(name)]
    if differ:
        name, more = differ[0], len(differ) - 1
        raise BadInput(
            f"checkpoint {folder} does not fit: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in this run" + (f" (and {more} more)" if more else "") + "; "
            "use the config it was trained with, or another work directory"
        )


def _check(folder: Path, name: str, seal: dict[str, Any]) -> None:
    try:
        found = _seal(folder / name)
    except OSError as error:
        raise Damaged(_damage(folder, name, error.strerror or str(error))) from None
    if found["bytes"] != seal["bytes"]:
        raise Damaged(_damage(folder, name, f"has {found['bytes']} bytes of {seal['bytes']}"))
    if found != seal:
        raise Damaged(_damage(folder, name, "is not what was saved (SHA-256)"))


def _damage(folder: Path, name: str, what: str) -> str:
    return f"checkpoint {folder} is damaged: {name}: {what}"


def _place(leaf: Any, array: np.ndarray) -> jax.Array:
    if _is_key(leaf):
        wrap = functools.partial(jax.random.wrap_key_data, impl=_impl(leaf))
        return jax.jit(wrap, out_shardings=leaf.sharding)(array)
    if leaf.sharding is None:  # on the default device
        return jax.device_put(array)
    return jax.make_array_from_process_local_data(leaf.sharding, array, array.shape)


# Save


class Saver:
    """Saves in the background, one at a time, and prunes.

        with Saver(directory) as saver:
            for ...:
                saver.save(state, metrics)

    Leaving the block waits for the save in flight, whatever the reason (the end, an exception, sys.exit). A save that
    failed is an OSError of one line at the next save, poll or wait, at the latest at the end of the block: never lost.
    It leaves the older steps as they were; the caller may catch it and go on.

    Of several processes all must save, as each holds a share of what is split; process 0 gathers, writes and waits.

    Args:
        directory: made if need be; rubbish of runs that were killed is cleared. Only one Saver at a time may use it.
        keep_last: newest steps kept, at least the newest.
        keep_best: steps kept besides, by `rank`.
        rank: metric and direction.
    """

    def __init__(self, directory: Directory, keep_last: int = 3, keep_best: int = 1, rank: Rank = ("accuracy", "max")):
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_best, self.rank = max(1, keep_last), keep_best, rank
        self._flight: Future[None] | None = None
        self._writes = jax.process_index() == 0

    def __enter__(self) -> "Saver":
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            _sync(self.directory.parent)
            clean(self.directory)
        # Not left to the interpreter's exit: by then no library may start a thread, and Orbax needs some to write.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.wait()
        except OSError as failure:
            if not isinstance(error, Exception):  # sys.exit(0) after a lost save would be a lie
                raise
            error.add_note(str(failure))
        finally:
            self._thread.shutdown()

    def save(
        self, state: State, metrics: Mapping[str, float] | None = None, extra: Mapping[str, Any] | None = None
    ) -> float:
        """Start to save a State as the step it is at; its buffers may be donated once this returns.

        Args:
            state: what is saved.
            metrics: of an evaluation of this State; they rank checkpoints.
            extra: anything JSON can hold, kept in the manifest.

        Returns:
            Seconds the caller was held: waiting for the save before, and copying to the host.

        Raises:
            OSError: the save before this one failed. This one was not started; call again to start it.
        """
        start = time.perf_counter()
        self.wait()
        arrays = _fetch(state)
        if not self._writes:
            return time.perf_counter() - start
        content = {
            "step": int(arrays["step"]),
            "metrics": {name: _finite(value) for name, value in metrics.items()} if metrics is not None else None,
            "extra": extra,
            "arrays": {name: _spec(leaf) for name, leaf in named(state).items()},
        }
        self._flight = self._thread.submit(self._save, arrays, content)
        return time.perf_counter() - start

    def poll(self) -> None:
        """Raise what a finished save failed with; do not wait for one that is under way."""
        if self._flight and self._flight.done():
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is on disk. Raises what it failed with."""
        if self._flight:
            # Only a wait that ends clears it: one broken by Ctrl-C can be taken up again.
            error = self._flight.exception()
            self._flight = None
            if error:
                raise error

    def _save(self, arrays: dict[str, np.ndarray], content: dict[str, Any]) -> None:
        step = content["step"]
        temporary = self.directory / f".tmp-{step}-{os.getpid()}"
        try:
            _write(temporary, arrays, content)
            _commit(temporary, self.directory / str(step))
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)  # gives a full disk its space back
            failed = f"step {step} was not saved in {self.directory}; older steps are as they were"
            raise OSError(f"{failed}: {line_of(error)}") from error
        self._prune(step)

    def _prune(self, newest: int) -> None:
        # Later steps belong to a life that ended in damage; this run will pass and replace them.
        known = [step for step in steps(self.directory) if step <= newest]
        last = known[-self.keep_last :]
        ranked = [step for step in _ranked(self.directory, self.rank) if step in known][: self.keep_best]
        for step in known:
            if step not in last and step not in ranked:
                shutil.rmtree(_discard(self.directory / str(step)), ignore_errors=True)


def wait(directory: Directory, seconds: float) -> None:
    """Until no save of this process is under way there, or so long: where its Saver is out of reach."""
    until = time.monotonic() + seconds
    while any(Path(directory).glob(f".tmp-*-{os.getpid()}")) and time.monotonic() < until:
        time.sleep(0.05)


def clean(directory: Directory) -> None:
    """Delete what killed runs left half-written or half-deleted. Only for the one process that saves here.

    A step that was being replaced, and the new one not yet in its place, is put back first.
    """
    for old in Path(directory).glob(f"{OLD}*"):
        final = old.with_name(old.name.removeprefix(OLD))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)
    for pattern in (".tmp-*", ".trash-*"):
        for path in Path(directory).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _write(temporary: Path, arrays: dict[str, np.ndarray], content: dict[str, Any]) -> None:
    """All the files of a step, each hashed and synced, and last the manifest that lists them."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    need, free = sum(array.nbytes for array in arrays.values()) + 2**20, shutil.disk_usage(temporary).free
    if free < need:  # told before Orbax, whose writers each complain on the screen
        raise OSError(f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} MB are free, {need / 1e6:.1f} are needed")
    with _checkpointer() as checkpointer:
        checkpointer.save(temporary / "state", args=_orbax().args.PyTreeSave(arrays))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        seals = pool.map(functools.partial(_seal, sync=True), files)
        listed = {str(path.relative_to(temporary)): seal for path, seal in zip(files, seals, strict=True)}
    content = {
        **content,
        "digest": _digest(content["arrays"], arrays),
        "files": listed,
        "time": time.time(),
        "versions": {"jaxcompute": jaxcompute.__version__}
        | {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
    }
    (temporary / "manifest.json").write_bytes(_sealed(content))
    _sync(temporary / "manifest.json")


def _commit(temporary: Path, final: Path) -> None:
    for path in [temporary, *temporary.rglob("*/")]:
        _sync(path)
    old = final.with_name(f"{OLD}{final.name}")
    if final.exists():  # damaged and passed over, or saved twice at one step
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _discard(step: Path) -> Path:
    """Not listed any more, still to be deleted."""
    trash = step.with_name(f".trash-{step.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(step, trash)
    return trash


# Bytes


def digest(state: PyTree) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of all leaves: two States are equal if and only if theirs are."""
    return _digest({name: _spec(leaf) for name, leaf in named(state).items()}, _fetch(state))


def _digest(specs: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(specs):
        total.update(f"{name}\0{specs[name]}\0".encode())
        total.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, "opt_state/0/mu/Dense_0/kernel". None and empty nodes are none, so nothing can drop them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("two leaves of a tree share a path; is there a '/' in a name?")
    return by_path


def _spec(leaf: Any) -> str:
    """float32[64,10]; key<fry>[] for a threefry key."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _fetch(state: PyTree) -> dict[str, np.ndarray]:
    """Copies on the host. On the CPU a mere view would share the buffers, and so forbid their donation."""
    leaves = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named(state).items()}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            # a second handle to the same buffers, as jax 0.11 keeps such a view with the handle that was copied from
            leaves[name] = jax.device_put(leaf, leaf.sharding, may_alias=True)
            leaves[name].copy_to_host_async()
    return {name: np.array(_whole(leaf)) for name, leaf in leaves.items()}


def _whole(leaf: Any) -> Any:
    """The array itself; where other processes hold parts of it, gathered from them."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(key: Any) -> str:
    """The generator's name; abstractly, since `key_impl` takes no ShapeDtypeStruct."""
    names: list[str] = []
    jax.eval_shape(lambda k: names.append(str(jax.random.key_impl(k))), key)
    return names[0]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no nan, and nan ranks nowhere


def _seal(path: Path, sync: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """A file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sealed(content: Mapping[str, Any]) -> bytes:
    return _json({**content, "sha256": _sha256(_json(content))})


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checkpointer() -> Any:
    """Orbax's, of this process alone: of several it would make each wait for the others."""
    ocp, me = _orbax(), jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    # Weights do not compress: without it a large save is twice as fast.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@functools.cache
def _orbax() -> Any:
    """Imported at first need: 0.3 s, in the background for a run that starts anew."""
    import orbax.checkpoint as ocp

    # Its chatter goes through absl to the user's screen; its errors are raised anyway.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # Nor does it catch what it writes on a full disk after the first failure, which is raised.
    hook = sys.unraisablehook
    sys.unraisablehook = lambda told: None if "Event loop is closed" in str(told.exc_value) else hook(told)
    return ocp
