"""How much of the machine this process may use: what its container or group allows, not what there is.

Linux limits processes by groups in groups, and the least limit counts. The groups of this process stand in
/proc/self/cgroup, a line for version 2 and one for each controller of version 1; their limits are files
below /sys/fs/cgroup. In a container that sees only its own group, that group's files are the topmost there.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """CPUs to make full use of: those this process may run on, or fewer under a quota of time; at least 1.

    A quota of 1.5 counts as 2: one worker would leave a third of it unused, and two that are paused now and
    then do as much as is paid for. root: where /proc and /sys are.
    """
    quotas = (_quota_v2(folder) for folder in _groups(root, ""))
    quotas_v1 = (_quota_v1(folder) for folder in _groups(root, "cpu"))
    least = min((*quotas, *quotas_v1), default=math.inf)
    allowed = len(os.sched_getaffinity(0))
    return allowed if least >= allowed else max(1, math.ceil(least))


def cores(root: Path = ROOT) -> tuple[int, ...]:
    """The numbers of the cores that this process may run on; none under a quota, which is of time on any."""
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed) if cpus(root) == len(allowed) else ()


def memory_bytes(root: Path = ROOT) -> int:
    """Bytes of memory this process may use: the machine's, or fewer in a group with a limit."""
    limits = [_number(_words(folder / "memory.max")) for folder in _groups(root, "")]
    limits += [_number(_words(folder / "memory.limit_in_bytes")) for folder in _groups(root, "memory")]
    return int(min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits]))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those around it. controller: of version 1, or "" for 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controller not in controllers.split(",") or (not controller and number != "0"):
            continue
        inside = PurePosixPath(group.lstrip("/"))
        # Version 2 lies in `unified` beside version 1; a controller by itself or under all names of its line.
        for mount in (controllers, controller) if controller else (".", "unified"):
            top = root / "sys/fs/cgroup" / mount
            yield from (top / above for above in (inside, *inside.parents) if ".." not in above.parts)


def _quota_v2(group: Path) -> float:
    """CPUs' worth of time: microseconds, or max, of each period of microseconds."""
    words = _words(group / "cpu.max")
    return _number(words) / _number(words[1:], 100_000)


def _quota_v1(group: Path) -> float:
    quota = _number(_words(group / "cpu.cfs_quota_us"))  # -1 is none
    return quota / _number(_words(group / "cpu.cfs_period_us"), 100_000)


def _number(words: list[str], otherwise: float = math.inf) -> float:
    """The first word if it is a number above 0."""
    return float(words[0]) if words and words[0].isdecimal() and int(words[0]) else otherwise


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """The content of a file, or nothing where there is none: then there is no limit, either."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
