"""Packages import only in the direction that the design allows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "trainer", "tools")
MAY_IMPORT = {"pipeline": set(), "model": set(), "trainer": {"pipeline", "model"}, "tools": set(PACKAGES)}
ONLY_IMPORTERS = {
    "prometheus_client": {"trainer/monitor/metrics.py", "pipeline/packing/exporter.py"},
    "nvidia": {"pipeline/graph.py"},
}


def imports(path: Path) -> set[str]:
    """Return the top-level names of all modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_packages_below_them(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        others = imports(path) & set(PACKAGES) - {package}
        assert others <= MAY_IMPORT[package], f"{path} imports {others}"


@pytest.mark.parametrize(("library", "owners"), ONLY_IMPORTERS.items())
def test_a_library_is_imported_only_by_its_owners(library, owners):
    for package in ("pipeline", "model", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert (library in imports(path)) == (name in owners), name


def test_only_one_function_counts_cpus():
    """A count without quotas would start a process per core even in a container that may use two."""
    allowed = {"pipeline/machine.py", "trainer/environment.py"}  # the latter records the machine
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if any(word in path.read_text() for word in ("sched_getaffinity", "cpu_count")):
                assert str(path.relative_to(ROOT)) in allowed
