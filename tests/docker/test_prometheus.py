"""The configuration and rules by Prometheus's own promtool, and a real Prometheus that scrapes a real run."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tools.make_dashboard import PATH as DASHBOARD
from tools.make_shards import pack, parse_arguments

PROMETHEUS = Path(__file__).parents[2] / "docker/prometheus"
JOB = "alexnet"
BATCH = 12
# 1,200 training images: 100 steps an epoch. Each step is a row in metrics.csv.
RUN = f"--device cpu --recipe demo --crop 67 --batch {BATCH} --epochs 100 --log-every 1".split()
NO_DATA = {
    "alexnet_gpu_": "no GPU",
    "alexnet_jpeg_": "no GPU",
    "DCGM_": "no dcgm-exporter",
    "node_": "no node-exporter",
    "ALERTS{": "no alert fires",
}


def absent(reason: str) -> None:
    """Skip the test for want of something that is always there in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    """The folder of promtool and prometheus: the installed ones, or those of Debian's package."""
    if found := shutil.which("promtool"):
        return Path(found).parent
    if shutil.which("apt-get") is None:
        absent("promtool is not installed, and there is no apt-get to fetch it")
    folder = tmp_path_factory.mktemp("prometheus")
    fetched = subprocess.run(
        ["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, check=False
    )
    if fetched.returncode:
        absent(f"apt-get download prometheus: {fetched.stderr.decode().strip()}")
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder], check=True)
    return folder / "usr/bin"


def promtool(binaries: Path, *arguments: object) -> str:
    done = subprocess.run(
        [binaries / "promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_its_targets_and_the_rules_are_valid(binaries, tmp_path):
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    targets = tmp_path / "prometheus/targets"
    for example in targets.glob("*.example"):
        example.rename(example.with_suffix(""))
    assert len(list(targets.glob("*.yml"))) == 2
    said = promtool(
        binaries, "check", "config", "--lint=all", "--lint-fatal", tmp_path / "prometheus/prometheus.yml"
    )
    assert "2 rule files found" in said


@pytest.mark.parametrize("tests", sorted((PROMETHEUS / "tests").iterdir()), ids=lambda path: path.name)
def test_the_rules_give_what_was_computed_by_hand(binaries, tests):
    promtool(binaries, "test", "rules", tests)


def test_every_alert_is_tested_and_says_what_to_do():
    tested = (PROMETHEUS / "tests/alerts.yml").read_text()
    explained = (PROMETHEUS.parents[1] / "docs/operations.md").read_text()
    (group,) = yaml.safe_load((PROMETHEUS / "rules/alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        name, annotations = rule["alert"], rule["annotations"]
        assert f"- name: {name}\n" in tested
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert annotations["runbook"] == f"docs/operations.md#{name.lower()}"
        assert f"\n### {name}\n" in explained
        assert annotations["summary"]
        assert annotations["description"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Watched:
    """A run, and the Prometheus that scrapes it."""

    url: str
    metrics: Path

    def get(self, path: str, **parameters: object) -> dict:
        """What the API answers; {} until it is up."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        except OSError:
            return {}

    def query(self, expr: str, at: float | None = None) -> list[dict]:
        moment = {} if at is None else {"time": at}
        return self.get("query", query=expr, **moment).get("result", [])


@pytest.fixture(scope="module")
def many(pictures, tmp_path_factory) -> Path:
    """A dataset of the drawn pictures, each to train on twenty times."""
    source, output = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("packed")
    for picture in pictures.rglob("*.JPEG"):
        folder = source / picture.parent.relative_to(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(20 if "train" in folder.parts else 1):
            os.link(picture, folder / f"{copy}-{picture.name}")
    pack(parse_arguments(["--input", str(source), "--output", str(output), "--size", "80", "--workers", "1"]))
    return output


@pytest.fixture(scope="module")
def watched(binaries, many, tmp_path_factory) -> Iterator[Watched]:
    """A run in its second epoch, scraped each second by the configuration that is shipped."""
    folder, port, api = tmp_path_factory.mktemp("watched"), free_port(), free_port()
    shutil.copytree(PROMETHEUS, folder / "prometheus")
    config = folder / "prometheus/prometheus.yml"
    quick = yaml.safe_load(config.read_text())
    quick["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config.write_text(yaml.safe_dump(quick))
    target = [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": JOB}}]
    (folder / "prometheus/targets/trainer.yml").write_text(yaml.safe_dump(target))

    places = ["--data", many, "--out", folder / "run", "--port", str(port), "--calibrate"]
    database = ["--storage.tsdb.path", folder / "data", "--web.listen-address", f"127.0.0.1:{api}"]
    with open(folder / "log", "w") as log:
        processes = [
            subprocess.Popen(
                [binaries / "prometheus", "--config.file", config, *database], stdout=log, stderr=log
            ),
            subprocess.Popen([sys.executable, "-m", "trainer.cli", *places, *RUN], stdout=log, stderr=log),
        ]
    try:
        watched = Watched(f"http://127.0.0.1:{api}", folder / "run/metrics.csv")
        while not watched.query("alexnet_epoch > 1.2 and on (job) job:alexnet_verdict"):
            assert all(process.poll() is None for process in processes), (folder / "log").read_text()
            time.sleep(0.5)
        yield watched
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def queries() -> list:
    """The dashboard's, with values for its variables."""
    shown = json.loads(DASHBOARD.read_text())
    found = {
        f"{panel['title']}, {target['refId']}": target["expr"]
        for panel in shown["panels"]
        for target in panel.get("targets", [])
    }
    found |= {annotation["name"]: annotation["expr"] for annotation in shown["annotations"]["list"]}
    values = {"$job": JOB, "$instance": ".+", "$__rate_interval": "1m", "$__range": "1h"}
    for variable, value in values.items():
        found = {name: expr.replace(variable, value) for name, expr in found.items()}
    return [pytest.param(expr, id=name) for name, expr in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize("expr", queries())
def test_a_query_of_the_dashboard_finds_data_in_a_real_run(watched, expr):
    reason = next((why for metric, why in NO_DATA.items() if metric in expr and "vector" not in expr), None)
    assert bool(watched.query(expr)) == (reason is None), reason


@pytest.mark.slow
def test_all_rules_work_on_a_real_run_and_no_alert_fires(watched):
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]
    for rule in rules:
        if rule["type"] == "recording":
            assert watched.query(rule["name"]), rule["name"]


@pytest.mark.slow
def test_the_trainer_is_the_only_target_and_prometheus_reads_it_without_error(watched):
    (target,) = watched.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", JOB)
    (info,) = watched.query("alexnet_run_info")
    assert info["metric"]["recipe"] == "demo"


@pytest.mark.slow
def test_the_rate_of_images_is_what_the_trainer_logged_over_the_same_steps(watched):
    """Of the longest stretch within an epoch, where no evaluation or checkpoint comes between."""
    (series,) = watched.query("alexnet_step[10m]")
    samples = [(float(at), int(float(step))) for at, step in series["values"]]
    epoch = [(at, step) for at, step in samples if 1 <= step <= 99]
    (begin, _), (end, last) = epoch[0], epoch[-1]
    stretch = int(end - begin)
    (rate,) = watched.query(f'rate(alexnet_images_total{{phase="train"}}[{stretch}s])', at=end)
    first = min(step for at, step in epoch if at >= end - stretch)

    with open(watched.metrics, newline="") as file:
        rows = [row for row in csv.DictReader(file) if first < int(row["step"]) <= last]
    assert len(rows) == last - first > 20
    seconds = sum(BATCH / float(row["images_per_second"]) for row in rows)
    assert float(rate["value"][1]) == pytest.approx(BATCH * len(rows) / seconds, rel=0.05)
