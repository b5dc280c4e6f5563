"""What lets a run be continued: the folder `.packing` in its output, there until dataset.json is.

    plan.json                    all that the shards depend on
    <split>-<number>.result.json what came of a shard that is whole
    lock                         locked while a run is at work, by the kernel, so that no crash leaves it so
    tmp…/                        files on their way

Behind a URL there is no lock: two runs of one plan write the same bytes there, and another is refused.
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

from pipeline.files import atomic_write, close_quietly, held_open, naming
from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.shard_results import SUFFIX
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import UNFINISHED, Folder
from pipeline.packing.workers import say

REPORT = "report.tsv"
_PLAN = "plan.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 10  # to lock a file that no run removes meanwhile
_SHARDS = re.compile(r"(train|val)-\d{6,}\.(tar|idx)")
_OTHERS = re.compile(rf"(train|val)\.index\.npy|{re.escape(MANIFEST_NAME)}|{re.escape(REPORT)}")

Plan = Mapping[str, object]


@contextmanager
def locked(output: Folder) -> Iterator[None]:
    """Keep other runs out of a local output. Raises SourceError if one is at work, or OSError."""
    if not output.is_local:
        yield
        return
    folder = Path(output.path, UNFINISHED)
    try:
        with held_open(_lock(folder, output)):
            for left in folder.glob("tmp*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield
            finally:
                if _is_absent(folder / _PLAN):
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # NFS and FUSE keep the lock that is removed under another name until here
            folder.rmdir()


def _is_absent(path: Path) -> bool:
    """Whether a file is known not to be there: one that cannot be looked at may be."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _lock(folder: Path, output: Folder) -> TextIO:
    """The lock file, locked until it is closed, if its storage can lock."""
    path = folder / "lock"
    for attempt in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(path, "w")  # noqa: SIM115 – the caller closes it
        except FileNotFoundError:  # the run that had it has just ended, and removed its folder
            continue
        try:
            with naming(path):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(f"{output} cannot be locked ({error.strerror}): see that no other run packs into it")
                return lock
            close_quietly(lock)
            if isinstance(error, BlockingIOError):
                raise SourceError(
                    f"another run is packing into {output}: wait for it, or choose another --out"
                ) from None
            raise
        # Some storage makes up another number for a file at each look: then it never is the same.
        if _is_at(path, lock) or attempt == _ATTEMPTS - 1:
            return lock
        close_quietly(lock)
    raise SourceError(
        f"{path} cannot be locked, for it vanishes again and again: give the same command again"
    )


def _is_at(path: Path, lock: TextIO) -> bool:
    """Whether the file is still the one of that name; the run that had it may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def begin(output: Folder, plan: Plan, overwrite: bool, in_place: bool) -> bool:
    """Make an output ready for a plan; returns whether its dataset is whole already.

    in_place: its tars are not to be replaced. Raises SourceError if it holds something else that is not.
    """
    files, recorded = output.sizes(), _read_plan(output)
    if recorded == plan:
        return MANIFEST_NAME in files
    shards = [] if in_place else sorted(filter(_SHARDS.fullmatch, files))
    if shards and not _packed_here(output, files, recorded):
        raise SourceError(f"{output} holds {shards[0]}, which was not packed there: choose another --out")
    if recorded is not None and not overwrite:
        differing = (name for name in {**plan, **recorded} if plan.get(name) != recorded.get(name))
        raise SourceError(
            f"{output} holds an unfinished dataset, from which this differs in {', '.join(differing)}: "
            "continue that with its own options, choose another --out, or replace it with --overwrite"
        )
    if MANIFEST_NAME in files and not overwrite:
        raise SourceError(
            f"{output} already holds a dataset: choose another --out, or replace it with --overwrite"
        )
    if MANIFEST_NAME in files or recorded is not None:
        _write_plan(output, {"--in-place": in_place})  # killed amid this, the same command is back here
        output.remove({MANIFEST_NAME} & files.keys())
        output.remove(
            [*shards, *(name for name in files if _OTHERS.fullmatch(name) and name != MANIFEST_NAME)]
        )
        _remove_records(output)
    _write_plan(output, plan)
    return False


def _packed_here(output: Folder, files: Mapping[str, int], recorded: Plan | None) -> bool:
    """Whether the shards there are of a packing, and not only indexed or nobody's."""
    if recorded is not None:
        return not recorded.get("--in-place")
    try:
        return MANIFEST_NAME in files and not json.loads(output.read(MANIFEST_NAME)).get("in_place")
    except (ValueError, AttributeError):  # a broken manifest
        return True


def end(output: Folder) -> None:
    """Remove what a whole dataset does not need; the plan last, by which a run killed here ends this."""
    _remove_records(output)
    output.remove([f"{UNFINISHED}/{_PLAN}"])


def _remove_records(output: Folder) -> None:
    names = output.sizes(UNFINISHED)
    output.remove(f"{UNFINISHED}/{name}" for name in names if name.endswith(SUFFIX))


def _write_plan(output: Folder, plan: Plan) -> None:
    with output.staged(UNFINISHED) as folder, atomic_write(folder / _PLAN) as file:
        file.write(json.dumps(plan, indent=1).encode() + b"\n")


def _read_plan(output: Folder) -> Plan | None:
    try:
        return json.loads(output.read(f"{UNFINISHED}/{_PLAN}"))
    except FileNotFoundError:
        return None
    except ValueError:  # damaged
        return {}
