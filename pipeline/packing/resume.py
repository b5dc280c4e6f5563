"""Keep the state of a packing run in the output's folder `.packing`, so that a stopped run can be continued.

    plan.json                    everything that the shards depend on
    <shard>.result.json          the result of a finished shard
    <digest>.contents            the contents of an input file that had to be extracted
    lock                         locked by the kernel while a run is active, so a crash releases it
    tmp…/                        files that are being written

The folder exists until the dataset is complete. An output behind a URL has no lock: two runs of the same plan
write the same bytes, and a run of another plan is refused.
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
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.packing.workers import warn

REPORT = "report.tsv"
_PLAN = "plan.json"
_LOCK = "lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 10  # attempts to lock a file that other runs remove when they end
_SHARDS = re.compile(r"(train|val)-\d{6,}\.(tar|idx)")
_OTHERS = re.compile(rf"(train|val)\.(index|checksums)\.npy|{re.escape(MANIFEST_NAME)}|{re.escape(REPORT)}")

Plan = Mapping[str, object]


@contextmanager
def locked(output: Folder) -> Iterator[None]:
    """Lock a local output against other runs, and remove what killed runs left there.

    Raises SourceError if another run is active, and OSError.
    """
    if not output.is_local:
        yield
        return
    folder = Path(output.path, STATE_FOLDER)
    try:
        with held_open(_lock(folder, output)):
            for leftover in folder.glob("tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                yield
            finally:
                if _is_absent(folder / _PLAN):
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # until now, NFS and FUSE kept the removed lock file under another name
            folder.rmdir()


def _is_absent(path: Path) -> bool:
    """Return whether a file is known not to exist; one whose status cannot be read may exist."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _lock(folder: Path, output: Folder) -> TextIO:
    """Return the open lock file, which stays locked until it is closed, if its storage supports locks."""
    path = folder / _LOCK
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
        # On storage that reports a new inode number at each call, the file never seems to be the same one.
        if _still_has_name(path, lock) or attempt == _ATTEMPTS - 1:
            return lock
        close_quietly(lock)
    raise SourceError(
        f"{path} cannot be locked, because it disappears again and again: run the same command again"
    )


def _still_has_name(path: Path, lock: TextIO) -> bool:
    """Return whether the open file is still at the path; another run may have removed it when it ended."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def is_shard(name: str) -> bool:
    """Return whether a file has the name of a shard or of its .idx file."""
    return _SHARDS.fullmatch(name) is not None


def prepare(output: Folder, plan: Plan, overwrite: bool, in_place: bool) -> bool:
    """Prepare an output for a plan; return whether its dataset is already complete.

    Unless the output already holds the same plan, this records the plan, and removes a dataset that is to be
    replaced. in_place: the tars in the output are the input, and are never removed. Raises SourceError if the
    output holds shards or a dataset that must not be replaced, and OSError.
    """
    files, recorded = output.sizes(), _read_plan(output)
    if recorded == plan:
        return MANIFEST_NAME in files
    shards = [] if in_place else sorted(filter(is_shard, files))
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
        # Any plan differs from this one, so after a kill in the next lines, the same command starts over.
        _write_plan(output, {"--in-place": in_place})
        output.remove({MANIFEST_NAME} & files.keys())
        output.remove(
            [*shards, *(name for name in files if _OTHERS.fullmatch(name) and name != MANIFEST_NAME)]
        )
        _remove_records(output)
    _write_plan(output, plan)
    return False


def _written_by_packer(output: Folder, files: Mapping[str, int], recorded: Plan | None) -> bool:
    """Return whether this packer wrote the shards in the output, and not another program."""
    if recorded is not None:
        return not recorded.get("--in-place")
    try:
        return MANIFEST_NAME in files and not json.loads(output.read(MANIFEST_NAME)).get("in_place")
    except (ValueError, AttributeError):  # a broken manifest
        return True


def clean_up(output: Folder) -> None:
    """Remove the state of a run whose dataset is complete. Raises OSError.

    The plan is removed last, so that if this is interrupted, the same command completes it.
    """
    _remove_records(output)
    output.remove([f"{STATE_FOLDER}/{_PLAN}"])


def _remove_records(output: Folder) -> None:
    names = output.sizes(STATE_FOLDER).keys() - {_PLAN, _LOCK}
    output.remove(f"{STATE_FOLDER}/{name}" for name in sorted(names))


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
