"""Continue a packing run by the state in the output's folder `.packing`, kept until the dataset is complete.

    plan.json                    everything that the shards depend on
    <split>-<number>.result.json the result of a finished shard
    lock                         locked by the kernel while a run is active, so a crash releases it
    tmp…/                        files that are being written

Behind a URL there is no lock: two runs of the same plan write the same bytes, and a run of another plan is
refused.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pipeline.files import atomic_write, close_quietly, held_open, path_in_errors
from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.shard_results import SUFFIX
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.packing.workers import warn

REPORT = "report.tsv"
_PLAN = "plan.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 10  # to lock a file before another run removes it
_SHARDS = re.compile(r"(train|val)-\d{6,}\.(tar|idx)")
_OTHERS = re.compile(rf"(train|val)\.index\.npy|{re.escape(MANIFEST_NAME)}|{re.escape(REPORT)}")

Plan = Mapping[str, object]


@contextmanager
def locked(output: Folder) -> Iterator[None]:
    """Lock a local output against other runs. Raises SourceError if another run is active, or OSError."""
    if not output.is_local:
        yield
        return
    folder = Path(output.path, STATE_FOLDER)
    try:
        with held_open(_lock(folder, output)):
            for left in folder.glob("tmp*"):  # left by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield
            finally:
                if _is_absent(folder / _PLAN):
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # NFS and FUSE keep the removed lock file under another name until here
            folder.rmdir()


def _is_absent(path: Path) -> bool:
    """Whether a file is known not to exist; one whose status cannot be read may exist."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _lock(folder: Path, output: Folder) -> TextIO:
    """Open the lock file, and lock it until it is closed if its storage supports locks."""
    path = folder / "lock"
    for attempt in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(path, "w")  # noqa: SIM115 – the caller closes it
        except FileNotFoundError:  # the run that held it has just ended and removed the folder
            continue
        try:
            with path_in_errors(path):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warn(
                    f"{output} cannot be locked ({error.strerror}): make sure that no other run packs into it"
                )
                return lock
            close_quietly(lock)
            if isinstance(error, BlockingIOError):
                raise SourceError(
                    f"another run is packing into {output}: wait for it, or choose another --out"
                ) from None
            raise
        # Some storage reports a new inode number at each call, so the file never seems to be the same.
        if _still_has_name(path, lock) or attempt == _ATTEMPTS - 1:
            return lock
        close_quietly(lock)
    raise SourceError(
        f"{path} cannot be locked, because it disappears again and again: run the same command again"
    )


def _still_has_name(path: Path, lock: TextIO) -> bool:
    """Whether the open file still has that name; the run that held the lock may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def prepare(output: Folder, plan: Plan, overwrite: bool, in_place: bool) -> bool:
    """Prepare an output for a plan; return whether its dataset is already complete.

    in_place: the tars in the output are the input, and are never removed. Raises SourceError if the output
    holds shards or a dataset that must not be replaced.
    """
    files, recorded = output.sizes(), _read_plan(output)
    if recorded == plan:
        return MANIFEST_NAME in files
    shards = [] if in_place else sorted(filter(_SHARDS.fullmatch, files))
    if shards and not _written_by_packer(output, files, recorded):
        raise SourceError(
            f"{output} contains {shards[0]}, which this packer did not write: choose another --out"
        )
    if recorded is not None and not overwrite:
        differing = (name for name in {**plan, **recorded} if plan.get(name) != recorded.get(name))
        raise SourceError(
            f"{output} contains an unfinished dataset; this run differs from it in {', '.join(differing)}: "
            "continue it with its own options, choose another --out, or replace it with --overwrite"
        )
    if MANIFEST_NAME in files and not overwrite:
        raise SourceError(
            f"{output} already contains a dataset: choose another --out, or replace it with --overwrite"
        )
    if MANIFEST_NAME in files or recorded is not None:
        _write_plan(
            output, {"--in-place": in_place}
        )  # if killed during this, the same command comes back here
        output.remove({MANIFEST_NAME} & files.keys())
        output.remove(
            [*shards, *(name for name in files if _OTHERS.fullmatch(name) and name != MANIFEST_NAME)]
        )
        _remove_records(output)
    _write_plan(output, plan)
    return False


def _written_by_packer(output: Folder, files: Mapping[str, int], recorded: Plan | None) -> bool:
    """Whether the packer wrote the shards in the output, rather than another program."""
    if recorded is not None:
        return not recorded.get("--in-place")
    try:
        return MANIFEST_NAME in files and not json.loads(output.read(MANIFEST_NAME)).get("in_place")
    except (ValueError, AttributeError):  # a broken manifest
        return True


def clean_up(output: Folder) -> None:
    """Remove what a complete dataset does not need.

    The plan is removed last, so the same command completes this if it is killed here.
    """
    _remove_records(output)
    output.remove([f"{STATE_FOLDER}/{_PLAN}"])


def _remove_records(output: Folder) -> None:
    names = output.sizes(STATE_FOLDER)
    output.remove(f"{STATE_FOLDER}/{name}" for name in names if name.endswith(SUFFIX))


def _write_plan(output: Folder, plan: Plan) -> None:
    with output.staged(STATE_FOLDER) as folder, atomic_write(folder / _PLAN) as file:
        file.write(json.dumps(plan, indent=1).encode() + b"\n")


def _read_plan(output: Folder) -> Plan | None:
    try:
        return json.loads(output.read(f"{STATE_FOLDER}/{_PLAN}"))
    except FileNotFoundError:
        return None
    except ValueError:  # damaged
        return {}
