"""Checkpoints: asynchronous Orbax saves with a checksum manifest; restores the newest *good* one on any devices."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.adapt.lora import AdaptedState
from lab.configuration.values import digest
from lab.errors import CannotWrite, UserError
from lab.experiment import Checkpoint
from lab.parallel.processes import ALONE, Processes
from lab.parallel.sharding import path_of

log = logging.getLogger(__name__)


# Orbax 0.12.8 alone, one bit flipped at 24 places of each file: OCDBT notices all in its index, and none in the file of
# the arrays (98 % of the bytes), of which it returns wrong numbers.
def checksum(x: Array) -> Array:
    """uint32: the sum over elements of a hash of (bits, index), modulo 2^32.

    For a given index the hash is one-to-one, so any change of a single element is detected. It is not linear, so
    several changes do not cancel systematically. Computed on the array's devices in one pass over memory; independent
    of sharding and storage.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension in range(x.ndim):
        index = index * np.uint32(x.shape[dimension]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
    return jnp.sum(_mix(bits.astype(jnp.uint32) ^ _mix(index + 1)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A one-to-one 32-bit hash (lowbias32 by C. Wellons)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _digest(arrays: Any, beside: Any) -> str:
    return digest(arrays if beside is None else [arrays, beside])


_checksums = jax.jit(lambda leaves: [checksum(x) for x in leaves])
_stacked_checksums = jax.jit(lambda leaves: jnp.stack([checksum(x) for x in leaves]))


def manifest(state: Any) -> dict[str, dict[str, Any]]:
    """path -> shape, dtype and checksum of every array of a state."""
    paths, leaves = zip(*jax.tree.leaves_with_path(state), strict=True)
    sums = jax.device_get(_checksums(list(leaves)))
    return {path_of(p): {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": int(s)}
            for p, x, s in zip(paths, leaves, sums, strict=True)}


def stored(state: Any) -> Any:
    """What a checkpoint holds of a state: in place of the frozen base of adapters (lab/adapt), which is read again from
    where it came, the checksums of its arrays, uint32 (arrays,). Any other tree is held whole."""
    if not isinstance(state, AdaptedState):
        return state
    base = jax.tree.leaves(state.base)
    if isinstance(base[0], jax.ShapeDtypeStruct):
        return state._replace(base=jax.ShapeDtypeStruct((len(base),), jnp.uint32, sharding=state.step.sharding))
    return state._replace(base=_stacked_checksums(base))


def _is_object(path: Any) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Silences tensorstore. When one array of a checkpoint fails, Orbax closes the event loop to which tensorstore
    reports the remaining arrays, and that logs hundreds of lines without new information."""
    usual, tasks = sys.unraisablehook, logging.getLogger("asyncio")

    def quiet(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            usual(found)

    sys.unraisablehook, level = quiet, tasks.level
    tasks.setLevel(logging.CRITICAL)
    yield
    sys.unraisablehook = usual  # not after an exception
    tasks.setLevel(level)


class _Keep:
    """Orbax preservation policy: keeps the latest few, multiples of `permanent`, the best, and named steps."""

    def __init__(self, options: Checkpoint, best: Callable[[], int | None], named: Sequence[int]):
        self.options, self.best, self.named = options, best, set(named)

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        latest = {c.step for c in checkpoints[-self.options.keep:]}
        permanent = self.options.permanent
        best = self.best() if self.options.best else None
        return [c.step in latest | self.named or c.step == best or bool(permanent and c.step % permanent == 0)
                for c in checkpoints]


class Checkpoints:
    """The checkpoints of a run folder; read-only without options. `best()`: the step of the best checkpoint; `named`:
    further steps to keep."""

    def __init__(self, folder: Path, options: Checkpoint | None = None, best: Callable[[], int | None] = lambda: None,
                 processes: Processes = ALONE, named: Sequence[int] = ()):
        import orbax.checkpoint as ocp  # imported late: 0.7 s, not needed for --help and --dry-run

        self.folder, self.processes, self._ocp = folder, processes, ocp
        settings = ({"read_only": True, "create": False} if options is None else
                    {"preservation_policy": _Keep(options, best, named), "cleanup_tmp_directories": True})
        self.remote = "://" in str(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, in the place of the folder of checkpoints. Restore that folder, or "
                            f"start afresh with --run-dir.")
        place = folder if self.remote else folder.absolute()
        try:
            self._manager = ocp.CheckpointManager(place, options=ocp.CheckpointManagerOptions(
                save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1), **settings))
        except (ValueError, TypeError, KeyError, AttributeError) as e:  # a checkpoint has unreadable metadata
            bad = [p.parent.name for p in folder.glob("*/_CHECKPOINT_METADATA") if not _is_object(p)]
            raise UserError(f"{folder} cannot be read: the checkpoint of step {', '.join(bad) or '?'} is damaged "
                            f"({e}). Move it away, and the same command resumes from an earlier one.") from e

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def _strays(self) -> list[int]:
        """Steps whose checkpoint path exists but that Orbax does not list."""
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted({int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,17}", name)} - set(self.steps()))

    def save(self, step: int, state: Any, beside: Any = None) -> None:
        """Starts a save; the state may be donated once this returns. `beside`: a JSON value to save with it.

        Raises:
          UserError: the disk is full or not writable. Earlier checkpoints are not affected.
        """
        state = stored(state)
        need = sum(x.nbytes for x in jax.tree.leaves(state))
        free = None if self.remote else shutil.disk_usage(self.folder).free
        if free is not None and free < need:
            raise CannotWrite(f"The disk of {self.folder} is full: a checkpoint needs {need / 1e6:,.2f} MB and "
                              f"{free / 1e6:,.2f} MB are free. Free some and run the same command: it resumes from the "
                              f"last checkpoint.")
        args = self._ocp.args
        arrays = manifest(state)
        described = args.JsonSave({"step": step, "digest": _digest(arrays, beside), "arrays": arrays}
                                  | ({} if beside is None else {"beside": beside}))
        self._guard(lambda: self._manager.save(step, force=True, args=args.Composite(
            state=args.StandardSave(state), manifest=described)))

    def wait(self) -> None:
        """Blocks until all started saves are on disk."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for saves and releases the writer's threads."""
        self._guard(self._manager.close)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            with _without_echo():
                action()
        except (OSError, ValueError) as e:  # tensorstore reports a full disk as ValueError
            signs = ("No space left", "RESOURCE_EXHAUSTED", "Permission denied", "Read-only", "File too large",
                     "Too many open files", "Disk quota")
            if any(sign in str(e) for sign in signs):
                cause = re.search(r"os_error_code='(\d+)'", str(e))  # tensorstore's, after several paths
                reason = os.strerror(int(cause[1])) if cause else str(e).splitlines()[0][:200]
                reason += "; raise the limit on them (ulimit -n)" if reason == os.strerror(errno.EMFILE) else ""
                raise CannotWrite(f"A checkpoint could not be written to {self.folder}: {reason}. Earlier checkpoints "
                                  f"are intact; run the same command to resume.") from e
            raise

    def restore(self, target: Any, step: int | None = None) -> Any | None:
        """Restores the newest good checkpoint (or that of `step`) with the shardings of `target`; None without any. Of
        adapters' base it has checksums: see `lab.train.restore.with_base`.

        Logs and skips damaged checkpoints.

        Raises:
          UserError: all checkpoints are damaged, `step` is missing, or the checkpoint is of another model.
        """
        strays = self._strays()
        steps = sorted(self.steps() + strays)
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {steps}.")
        for candidate in reversed(steps) if step is None else [step]:
            damage = None
            try:
                if candidate in strays:
                    raise ValueError("it is not a folder")
                with _without_echo():
                    state = self._read(candidate, stored(target))
            except UserError:
                raise
            except Exception as e:  # Orbax raises many types for damaged files
                if "RESOURCE_EXHAUSTED" in str(e):  # out of memory, not a damaged file
                    raise
                damage = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            damages = [found for found in self.processes.gather(damage) if found]
            if not damages:
                return state
            log.warning("The checkpoint of step %d in %s is damaged (%s).", candidate, self.folder, damages[0])
        if step is not None:
            raise UserError(f"The checkpoint of step {step} in {self.folder} is damaged. There are {steps}.")
        if steps:
            raise UserError(f"Every checkpoint in {self.folder} is damaged (steps {steps}). Delete the run folder to "
                            f"start again, or choose another with --run-dir.")
        return None

    def beside(self, step: int | None = None) -> Any:
        """The JSON value saved with the state of `step` (default: the newest checkpoint); None if there is none."""
        step = max(self.steps(), default=None) if step is None else step
        try:
            return None if step is None else self._described(step).get("beside")
        except Exception as e:  # a damaged file; `restore` reports it
            log.debug("no manifest of step %d: %s", step, e)
            return None

    def discard_after(self, step: int) -> None:
        """Moves checkpoints after `step` (all damaged) aside, so that their steps can be saved again."""
        for later in [s for s in self.steps() + self._strays() if s > step]:
            names = (f"damaged-checkpoint-{later}" + (f"-{again}" if again else "") for again in itertools.count())
            aside = next(place for name in names if not (place := self.folder.parent / name).exists())
            aside = self.folder.parent / self.processes.share(aside.name)
            if self.processes.first:
                (self.folder / str(later)).rename(aside)
            log.warning("It was moved to %s; the run continues from step %d.", aside, step)
        self.processes.gather(None)
        self._manager.reload()

    def _described(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(manifest=args.JsonRestore())).manifest

    def _read(self, step: int, target: Any) -> Any:
        args, described = self._ocp.args, self._described(step)
        saved = described["arrays"]
        if described["step"] != step or described["digest"] != _digest(saved, described.get("beside")):
            raise ValueError("its manifest was changed")
        here = {path_of(p): list(x.shape) for p, x in jax.tree.leaves_with_path(target)}
        there = {path: entry["shape"] for path, entry in saved.items()}
        for path in sorted(here.keys() | there.keys()):
            if here.get(path) != there.get(path):
                raise UserError(f"The checkpoint of step {step} in {self.folder} is of another model: {path} is "
                                f"{there.get(path, 'missing')} there and {here.get(path, 'missing')} here.")
        state = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(target))).state
        found = manifest(state)
        if wrong := [path for path, entry in found.items() if entry != saved[path]]:
            raise ValueError(f"checksum of {wrong[0]} does not match")
        return state
