"""The dashboard, its provisioning, and that every query uses metrics that exist.

Grafana itself is not run, as no package registry has it. The JSON is checked against its schema, with the
Python builders and the TypeScript types, and test_prometheus.py runs the queries on a real Prometheus.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from make_dashboard import PATH, dashboard_json

from pipeline.packing.exporter import _ProgressCollector
from pipeline.packing.progress import Progress
from tests.helpers import REPO, missing
from trainer.monitor.metrics import Metrics
from trainer.settings import Settings

DOCKER = REPO / "docker"
GRAFANA = "11.6"
MODULES = REPO / ".npm/node_modules"
# Fields that the schema leaves to Prometheus's plugin, or that the builders write for variables of any type.
TYPES = """import type { AnnotationQuery, Dashboard, VariableModel } from "@grafana/schema";
type Json<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Json<T[K]> } : T;
type Annotation = AnnotationQuery & { expr?: string };
type Variable = VariableModel & { auto?: boolean; auto_count?: number; auto_min?: string };
type Whole = Omit<Dashboard, "annotations" | "templating"> &
    { annotations?: { list?: Annotation[] }; templating?: { list?: Variable[] } };
const dashboard: Json<Whole> = """

# A metric's name with or without its selector, or a selector alone; not the name of a function.
SERIES = re.compile(r"(?<![\w.:$])(?:([a-zA-Z_:][\w:]*)(\{[^{}]*\})?(?![\w:]*\s*\()|(\{[^{}]*\}))")
WORDS = {"and", "or", "unless", "offset", "bool", "Inf"}
OTHERS = re.compile(r"(node|DCGM)_\w+|ALERTS|up")  # of the exporters and of Prometheus itself


def queries() -> Iterator[tuple[str, str]]:
    """Yield the name and expression of panels, annotations and variables."""
    shown = json.loads(PATH.read_text())
    for panel in shown["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']}, {target['refId']}", target["expr"]
    for annotation in shown["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in shown["templating"]["list"]:
        if variable["type"] == "query":
            yield f"${variable['name']}", variable["query"].removeprefix("label_values(").rpartition(",")[0]


def rules() -> Iterator[dict]:
    for path in sorted((DOCKER / "prometheus/rules").iterdir()):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def grouping(expr: str) -> set[str]:
    """Return the labels in by (…) and on (…)."""
    lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expr)
    return {label.strip() for labels in lists for label in labels.split(",")}


def series(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of an expression with the labels that select it."""
    bare = re.sub(r"\[[^\]]*\]|\b(?:by|on)\s*\([^)]*\)", " ", expr)
    for name, selector, alone in SERIES.findall(bare):
        labels = dict(re.findall(r'(\w+)\s*(?:=~?|![=~])\s*"([^"]*)"', selector or alone))
        for metric in labels.pop("__name__", name).split("|"):
            if metric not in WORDS:
                yield metric, set(labels)


def exported() -> dict[str, set[str]]:
    """Return each metric that a process exports, with its labels."""
    metrics = Metrics()
    metrics.describe({"run": "runs/a"})  # as trainer/monitor/journal.py does
    registry = metrics.registry
    packing = {
        sample.name: {"instance"}
        for family in _ProgressCollector(Progress()).collect()
        for sample in family.samples
    }
    known = packing | {
        name: set(collector._labelnames) | ({"le"} if name.endswith("_bucket") else set())
        for collector, names in registry._collector_to_names.items()
        if hasattr(collector, "_labelnames")
        for name in names
    }
    others = {
        sample.name: set(sample.labels)
        for family in registry.collect()
        if family.name.startswith(("process_", "alexnet_storage_", "alexnet_activity_", "alexnet_run"))
        for sample in family.samples
    }
    recorded = {rule["record"]: grouping(rule["expr"]) for rule in rules() if "record" in rule}
    return known | others | recorded


def test_the_committed_dashboard_matches_the_script():
    assert PATH.read_text() == dashboard_json(), "run: python docker/grafana/make_dashboard.py"


def test_the_dashboard_has_no_unknown_fields():
    register_default_plugins()
    held = json.loads(PATH.read_text())
    assert json.loads(json.dumps(Dashboard.from_json(held), cls=JSONEncoder)) == held


@pytest.fixture
def node_modules(tmp_path) -> Path:
    """A folder where TypeScript finds Grafana's types."""
    if not (MODULES / ".bin/tsc").exists():
        missing("TypeScript with Grafana's types, which npm fetches,", "make .npm/.ready")
    (tmp_path / "node_modules").symlink_to(MODULES)
    return tmp_path


@pytest.mark.slow
def test_the_dashboard_has_the_types_of_grafanas_schema(node_modules):
    (node_modules / "dashboard.ts").write_text(f"{TYPES}{PATH.read_text()};\nexport default dashboard;\n")
    resolution = ["--module", "nodenext", "--moduleResolution", "nodenext", "--skipLibCheck"]
    check = [MODULES / ".bin/tsc", "--strict", "--noEmit", *resolution, "dashboard.ts"]
    done = subprocess.run(check, cwd=node_modules, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_builders_the_types_and_the_image_have_one_grafana_version():
    assert version("grafana-foundation-sdk").endswith(f"!{GRAFANA}.0")
    assert f"@grafana/schema@{GRAFANA}." in (REPO / "Makefile").read_text()
    assert services()["grafana"]["image"].startswith(f"grafana/grafana:{GRAFANA}.")


def assert_exported(expr: str, known: dict[str, set[str]]) -> None:
    """Check that the metrics and labels of an expression exist."""
    everywhere = {"job", "instance"}
    found = [(name, used) for name, used in series(expr) if not OTHERS.fullmatch(name)]
    for name, used in found:
        assert name in known, f"{name} is not exported"
        assert used <= known[name] | everywhere, f"{name} has not all labels of {used}"
    labels = everywhere.union(*(known[name] for name, _ in found))
    assert grouping(expr) <= labels, f"{expr} is grouped by labels that its metrics lack"


@pytest.mark.parametrize("expr", [pytest.param(expr, id=name) for name, expr in queries()])
def test_queries_use_exported_metrics(expr):
    assert_exported(expr, exported())


@pytest.mark.parametrize("rule", list(rules()), ids=lambda rule: rule.get("record", rule.get("alert")))
def test_rules_use_exported_metrics(rule):
    known = exported()
    assert_exported(rule["expr"], known)
    used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {}))))
    carried = {"job", "instance"}.union(*(known.get(name, set()) for name, _ in series(rule["expr"])))
    assert used <= (grouping(rule["expr"]) if "by (" in rule["expr"] else carried)


def test_the_query_parser_finds_metrics_and_labels():
    expr = """sum by (job) (rate(a_total{x="1",y=~"b|c"}[5m] offset 10m)) / on (job) d:e{z!="f"} > bool 1e3
        or {__name__=~"g|h"} and i"""
    assert dict(series(expr)) == {"a_total": {"x", "y"}, "d:e": {"z"}, "g": set(), "h": set(), "i": set()}
    assert grouping(expr) == {"job"}


@pytest.mark.parametrize(
    "expr",
    [
        'rate(alexnet_pictures_total{phase="train"}[1m])',
        'rate(alexnet_images_total{part="train"}[1m])',
        "sum by (part) (alexnet_images_total)",
    ],
)
def test_unknown_metrics_and_labels_are_detected(expr):
    with pytest.raises(AssertionError):
        assert_exported(expr, exported())


def test_every_panel_has_a_description_and_a_unit():
    for panel in json.loads(PATH.read_text())["panels"]:
        if panel["type"] != "row":
            assert len(panel["description"]) > 20, panel["title"]
        if panel["type"] in ("stat", "timeseries"):
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb, as defined by WCAG 2.2."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_colour_is_visible_on_light_and_dark_panels():
    used = set(re.findall(r"#[0-9A-Fa-f]{6}", PATH.read_text()))
    assert len(used) >= 4
    for colour in used:
        for background in ("#ffffff", "#181b1f"):
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3, f"{colour} on {background}"  # WCAG's least for graphics


def services() -> dict[str, dict]:
    """Return the services of compose.yaml and of its GPU additions."""
    base, gpu = (yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml"))
    return gpu["services"] | base["services"]


def provisioned(name: str) -> dict:
    return yaml.safe_load((DOCKER / "grafana/provisioning" / name).read_text())


def mounts(service: str) -> dict[str, Path]:
    """Return where a service finds which folder of the project."""
    pairs = (volume.split(":") for volume in services()[service]["volumes"])
    return {target: (DOCKER / source).resolve() for source, target, *_ in pairs if source.startswith(".")}


def test_grafana_finds_prometheus_its_data_source_and_the_dashboard():
    (source,) = provisioned("datasources/prometheus.yaml")["datasources"]
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services()

    (provider,) = provisioned("dashboards/alexnet.yaml")["providers"]
    folder, grafana = provider["options"]["path"], services()["grafana"]
    assert mounts("grafana") == {
        folder: PATH.parent,
        "/etc/grafana/provisioning": DOCKER / "grafana/provisioning",
    }
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/{PATH.name}"


def test_prometheus_finds_its_configuration_and_its_targets():
    assert mounts("prometheus") == {"/etc/prometheus": DOCKER / "prometheus"}
    (group,) = yaml.safe_load((DOCKER / "prometheus/targets/trainer.yml").read_text())
    assert group["targets"] == [f"trainer:{Settings.model_fields['port'].default}"]
    jobs = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    exporters = {name for job in jobs for found in job.get("dns_sd_configs", []) for name in found["names"]}
    assert exporters == {name for name, service in services().items() if "profiles" in service}
    assert services().keys() == {"trainer", "prometheus", "grafana", *exporters}
