"""Determine how many CPUs and how much memory this process may use, within the limits of its container.

Linux limits processes by nested control groups (cgroups), and the lowest limit applies. /proc/self/cgroup
lists the groups of this process: one line for version 2, and one for each controller of version 1. Their
limits are files below /sys/fs/cgroup. In a container that sees only its own group, the files of that group
are at the top of /sys/fs/cgroup.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """Return the number of CPUs this process can use: those it may run on, or fewer under a CPU quota.

    A quota of 1.5 counts as 2: one worker would leave a third of it unused, while two workers that are
    throttled at times use all of it. root: the folder that holds /proc and /sys.
    """
    return _within_quota(len(os.sched_getaffinity(0)), root)


def share_of_cpus(processes: int, root: Path = ROOT) -> int:
    """Return how many CPUs each of so many processes of this machine can use; 0 if there are fewer CPUs.

    A launcher may have bound each process to some of the CPUs already, such as torchrun --numa-binding, so
    those that its parent may run on are divided. Binding all processes to the same CPUs is not seen.
    """
    own = len(os.sched_getaffinity(0))
    try:
        parents = len(os.sched_getaffinity(os.getppid()))  # of this process itself if the parent is hidden
    except OSError:  # it has just ended, or may not be asked
        parents = own
    return min(cpus(root), _within_quota(max(own, parents), root) // processes)


def _within_quota(allowed: int, root: Path) -> int:
    quotas_v2 = (_quota_v2(folder) for folder in _groups(root, ""))
    quotas_v1 = (_quota_v1(folder) for folder in _groups(root, "cpu"))
    quota = min((*quotas_v2, *quotas_v1), default=math.inf)
    return allowed if quota >= allowed else max(1, math.ceil(quota))


def cores(root: Path = ROOT) -> tuple[int, ...]:
    """Return the indices of the cores this process may run on, or none under a quota, which names none."""
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed) if cpus(root) == len(allowed) else ()


def memory_bytes(root: Path = ROOT) -> int:
    """Return the memory this process may use, in bytes: the machine's, or less if a group limits it."""
    limits = [_number(_words(folder / "memory.max")) for folder in _groups(root, "")]
    limits += [_number(_words(folder / "memory.limit_in_bytes")) for folder in _groups(root, "memory")]
    return int(min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits]))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and its parents.

    controller: a controller of version 1, or "" for version 2.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controller not in controllers.split(",") or (not controller and number != "0"):
            continue
        inside = PurePosixPath(group.lstrip("/"))
        # Where both versions are in use, version 2 is in `unified`. In version 1, a folder is named after one
        # controller, or after all controllers of its line.
        for mount in (controllers, controller) if controller else (".", "unified"):
            top = root / "sys/fs/cgroup" / mount
            yield from (top / above for above in (inside, *inside.parents) if ".." not in above.parts)


def _quota_v2(group: Path) -> float:
    """Return the quota as a number of CPUs. cpu.max holds microseconds, or `max`, and the period of both."""
    words = _words(group / "cpu.max")
    return _number(words) / _number(words[1:], 100_000)


def _quota_v1(group: Path) -> float:
    quota = _number(_words(group / "cpu.cfs_quota_us"))  # -1 means none
    return quota / _number(_words(group / "cpu.cfs_period_us"), 100_000)


def _number(words: list[str], default: float = math.inf) -> float:
    """Return the first word if it is a number above 0, else the default."""
    return float(words[0]) if words and words[0].isdecimal() and int(words[0]) else default


def _words(path: Path) -> list[str]:
    return text_of(path).split()


def text_of(path: Path) -> str:
    """Return the content of a file, or nothing if it cannot be read, which means that there is no limit."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
