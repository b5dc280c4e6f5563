"""The direction of imports, which the design fixes."""

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
    """First names of all modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_below_them(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        others = imports(path) & set(PACKAGES) - {package}
        assert others <= MAY_IMPORT[package], f"{path} imports {others}"


@pytest.mark.parametrize(("library", "owners"), ONLY_IMPORTERS.items())
def test_one_module_imports_a_library(library, owners):
    for package in ("pipeline", "model", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert (library in imports(path)) == (name in owners), name


def test_one_function_counts_the_cpus():
    """A count by affinity alone starts a process for each core of a machine of which a container has two."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            counts = "sched_getaffinity" in path.read_text() or "cpu_count" in path.read_text()
            assert counts <= (name in {"pipeline/machine.py", "trainer/run.py"}), (
                name
            )  # which records the machine
