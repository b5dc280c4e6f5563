"""CPUs and memory are limited by control groups, in trees like /proc and /sys and on the real system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.machine import cores, cpus, memory_bytes, share_of_cpus
from tests.trees import write

GROUPS = Path("/sys/fs/cgroup/cpu")
OWN_CORES = sorted(os.sched_getaffinity(0))
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Write a root folder whose process is in these control groups, with these limits."""
    write(root / "proc/self/cgroup", f"{groups}\n")
    for name, content in files.items():
        write(root / "sys/fs/cgroup" / name, f"{content}\n")
    return root


def version_1(group: str, quota: str, period: str) -> dict[str, str]:
    """Return the files of a control group of version 1."""
    return {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": period}


POD = "0::/kubepods/pod1/container"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc"
CPUS = {
    "no groups at all": ("", {}, 32),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, 32),
    "two CPUs": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "another period": ("0::/", {"cpu.max": "100000 25000"}, 4),
    "without a period": ("0::/", {"cpu.max": "300000"}, 3),
    "one and a half CPUs": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "a fifth of a CPU": ("0::/", {"cpu.max": "20000 100000"}, 1),
    "more than there are": ("0::/", {"cpu.max": "9000000 100000"}, 32),
    "the own group": (POD, {"kubepods/pod1/container/cpu.max": "200000 100000"}, 2),
    "an outer group": (POD, {"kubepods/pod1/cpu.max": "200000 100000"}, 2),
    "the least of all": (POD, {"kubepods/cpu.max": "300000", "kubepods/pod1/container/cpu.max": "800000"}, 3),
    "a container that sees its own group as the root": (POD, {"cpu.max": "200000 100000"}, 2),
    "a group outside of the container's": ("0::/../other", {"cpu.max": "200000 100000"}, 2),
    "another's group": (POD, {"kubepods/pod2/cpu.max": "200000 100000"}, 32),
    "version 2 beside version 1": ("0::/a\n" + V1, {"unified/a/cpu.max": "200000 100000"}, 2),
    "version 1": (V1, version_1("cpu/docker/abc", "200000", "100000"), 2),
    "version 1 under both names": (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000"}, 2),
    "version 1 with another period": (V1, version_1("cpu/docker", "200000", "50000"), 4),
    "version 1 in a container": (V1, {"cpu/cpu.cfs_quota_us": "50000"}, 1),
    "version 1 without a quota": (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1"}, 32),
    "nonsense": ("0::/\n:::\nx", {"cpu.max": "many 0"}, 32),
    "an empty file": ("0::/", {"cpu.max": ""}, 32),
    "a period of zero": ("0::/", {"cpu.max": "200000 0"}, 2),
}


@pytest.mark.parametrize(("groups", "files", "expected"), CPUS.values(), ids=CPUS)
def test_the_number_of_cpus_is_limited_by_the_quota(tmp_path, groups, files, expected):
    assert cpus(tree(tmp_path, groups, files)) == expected


def test_the_number_of_cpus_is_limited_by_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert cpus(tree(tmp_path, "0::/", {"cpu.max": "200000 100000"})) == 1


GIB = 1 << 30
LIMITS = {
    "no groups at all": ("", {}, MEMORY),
    "no limit": ("0::/", {"memory.max": "max"}, MEMORY),
    "one": ("0::/", {"memory.max": f"{GIB}"}, GIB),
    "an outer group": (POD, {"kubepods/memory.max": f"{GIB}", f"{POD[4:]}/memory.max": "max"}, GIB),
    "version 1": (V1, {"memory/docker/abc/memory.limit_in_bytes": f"{GIB}"}, GIB),
    "version 1 without one": (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, MEMORY),
    "version 1 in a container": (V1, {"memory/memory.limit_in_bytes": f"{GIB}"}, GIB),
}


@pytest.mark.parametrize(("groups", "files", "expected"), LIMITS.values(), ids=LIMITS)
def test_the_memory_is_limited_by_the_control_group(tmp_path, groups, files, expected):
    assert memory_bytes(tree(tmp_path, groups, files)) == expected


@pytest.fixture
def half_a_cpu():
    """A real control group of version 1 within one that has a quota of half a CPU."""
    outer, inner = GROUPS / f"test-{os.getpid()}", GROUPS / f"test-{os.getpid()}/inner"
    try:
        inner.mkdir(parents=True)
        (outer / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        pytest.skip(f"this system lets no control group be made: {error}")
    yield inner
    inner.rmdir()
    outer.rmdir()


def test_the_quota_of_a_real_control_group_is_found(half_a_cpu):
    code = f"open('{half_a_cpu}/cgroup.procs', 'w').write('0'); import pipeline.machine as m; print(m.cpus())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


@pytest.mark.parametrize(("quota", "expected"), [("max", (3, 8, 20)), ("300000", (3, 8, 20)), ("200000", ())])
def test_cores_are_numbered_unless_the_quota_is_smaller(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {20, 3, 8})
    assert cores(tree(tmp_path, "0::/", {"cpu.max": f"{quota} 100000"})) == expected


@pytest.mark.parametrize(
    ("own", "parents", "processes", "expected"),
    [
        (16, 16, 4, 4),  # none is bound
        (4, 16, 4, 4),  # each to its own cores
        (8, 16, 4, 4),  # each to a node of two processes
        (4, 16, 1, 4),
        (3, 3, 4, 0),
        (16, 4, 4, 4),  # the process has freed itself
    ],
)
def test_cpus_are_divided_unless_the_launcher_has_done_so(
    tmp_path, monkeypatch, own, parents, processes, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(parents if pid else own)))
    assert share_of_cpus(processes, tree(tmp_path, "0::/", {})) == expected
    quota = {"cpu.max": "200000 100000"}
    assert share_of_cpus(processes, tree(tmp_path, "0::/", quota)) == min(expected, 2 // processes)


@pytest.mark.skipif(len(OWN_CORES) < 2, reason="this machine has one core")
def test_a_process_that_is_bound_to_a_core_pins_its_thread_to_it():
    last = OWN_CORES[-1]
    code = f"""
import os
os.sched_setaffinity(0, {{{last}}})
from pipeline.loader_options import find_ranks, make_decoding
decoding = make_decoding(64, find_ranks(None, None), device="cpu")
print(decoding.threads, decoding.cores)
"""
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    found = subprocess.check_output([sys.executable, "-c", code], env=os.environ | launched, text=True)
    assert found == f"1 ({last},)\n"
