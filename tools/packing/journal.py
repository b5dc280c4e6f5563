"""What lets a run be continued: the folder `.packing` in its output, there until dataset.json is.

    plan.json                    all that the shards depend on
    <split>-<number>.result.json what came of a shard that is whole
    lock                         locked while a run is at work, by the kernel, so that no crash leaves it so
    tmp…/                        files on their way

Behind a URL there is no lock: two runs of one plan write the same bytes there, and another is refused.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.files import whole_file
from pipeline.manifest import NAME
from tools.inputs.sources import SourceError
from tools.packing.results import SUFFIX
from tools.storage import UNFINISHED, Folder

REPORT = "report.tsv"
_PLAN = "plan.json"
_SHARDS = re.compile(r"(train|val)-\d{6,}\.(tar|idx)")
_OTHERS = re.compile(rf"(train|val)\.index\.npy|{re.escape(NAME)}|{re.escape(REPORT)}")

Plan = Mapping[str, object]


@contextmanager
def locked(output: Folder) -> Iterator[None]:
    """Keep other runs out of a local output. Raises SourceError if one is at work."""
    if not output.is_local:
        yield
        return
    folder = Path(output.path, UNFINISHED)
    with _lock(folder, output):
        for left in folder.glob("tmp*"):  # by a run that was killed
            shutil.rmtree(left)
        try:
            yield
        finally:
            if not (folder / _PLAN).exists():
                shutil.rmtree(folder)


def _lock(folder: Path, output: Folder) -> TextIO:
    """The lock file, locked until it is closed."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 – the caller closes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                return lock
        except BlockingIOError:
            lock.close()
            raise SourceError(
                f"another run is packing into {output}: wait for it, or choose another --output"
            ) from None
        except FileNotFoundError:  # the run that had it has just ended, and removed it
            pass
        lock.close()


def begin(output: Folder, plan: Plan, overwrite: bool, in_place: bool) -> bool:
    """Make an output ready for a plan; returns whether its dataset is whole already.

    in_place: its tars are not to be replaced. Raises SourceError if it holds something else that is not.
    """
    files, recorded = output.sizes(), _read_plan(output)
    if recorded == plan:
        return NAME in files
    shards = [] if in_place else sorted(filter(_SHARDS.fullmatch, files))
    if shards and not _packed_here(output, files, recorded):
        raise SourceError(f"{output} holds {shards[0]}, which was not packed there: choose another --output")
    if recorded is not None and not overwrite:
        differing = (name for name in {**plan, **recorded} if plan.get(name) != recorded.get(name))
        raise SourceError(
            f"{output} holds an unfinished dataset, from which this differs in {', '.join(differing)}: "
            "continue that with its own options, choose another --output, or replace it with --overwrite"
        )
    if NAME in files and not overwrite:
        raise SourceError(
            f"{output} already holds a dataset: choose another --output, or replace it with --overwrite"
        )
    if NAME in files or recorded is not None:
        _write_plan(output, {"--in-place": in_place})  # killed amid this, the same command is back here
        output.remove({NAME} & files.keys())
        output.remove([*shards, *(name for name in files if _OTHERS.fullmatch(name) and name != NAME)])
        _remove_records(output)
    _write_plan(output, plan)
    return False


def _packed_here(output: Folder, files: Mapping[str, int], recorded: Plan | None) -> bool:
    """Whether the shards there are of a packing, and not only indexed or nobody's."""
    if recorded is not None:
        return not recorded.get("--in-place")
    try:
        return NAME in files and not json.loads(output.read(NAME)).get("in_place")
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
    with output.staged(UNFINISHED) as folder, whole_file(folder / _PLAN) as file:
        file.write(json.dumps(plan, indent=1).encode() + b"\n")


def _read_plan(output: Folder) -> Plan | None:
    try:
        return json.loads(output.read(f"{UNFINISHED}/{_PLAN}"))
    except FileNotFoundError:
        return None
    except ValueError:  # damaged
        return {}
