"""The configuration and the rules pass promtool, and a real Prometheus scrapes a real run."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from http import HTTPStatus
from pathlib import Path

import pytest
import yaml

from tests.docker.test_dashboard import queries
from tests.helpers import DEADLINE_SECONDS, REPO, command, free_ports, missing, rows, wait_until
from tests.trees import pack_here
from trainer.monitor import meter

PROMETHEUS = REPO / "docker/prometheus"
JOB = "alexnet"
BATCH, STEPS = 12, 100  # an epoch of 1,200 images
EPOCHS = 100_000  # more than are trained while the tests run
# Several scrapes per epoch, even on a fast machine.
INTERVALS = {"scrape_interval": "100ms", "evaluation_interval": "500ms"}
NO_DATA = {
    "alexnet_gpu_": "no GPU",
    "alexnet_jpeg_": "no GPU",
    "DCGM_": "no dcgm-exporter",
    "node_": "no node-exporter",
    "ALERTS{": "no alert fires",
    "alexnet_pack_": "nothing is being packed",
}


@pytest.fixture(scope="module")
def binaries() -> dict[str, str]:
    """The paths of promtool and prometheus."""
    found = {name: shutil.which(name) for name in ("promtool", "prometheus")}
    for name, path in found.items():
        if path is None:
            missing(name, "apt-get install --no-install-recommends prometheus")
    return found


def promtool(binaries: dict[str, str], *arguments: object) -> str:
    """Return what promtool prints. It must find nothing wrong."""
    command = [binaries["promtool"], *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_use_the_thresholds_of_the_verdict():
    rules = (PROMETHEUS / "rules/recording.yml").read_text()
    busy, ready, wait = (
        set(map(float, re.findall(rf"job:alexnet_{share}:ratio5m [<>]=? bool ([\d.]+)", rules)))
        for share in ("busy", "ready", "wait")
    )
    assert busy == {meter.COMPUTE_BOUND_BUSY}
    assert ready == {meter.INPUT_BOUND_READY, meter.HOST_GAP_READY}
    assert wait == {meter.INPUT_BOUND_WAIT}
    (storage,) = re.findall(r"job:alexnet_storage_wait:ratio5m >= bool ([\d.]+) \* job:alexnet_wait", rules)
    assert float(storage) == meter.STORAGE_BOUND_WAIT


def test_the_configuration_the_targets_and_the_rules_are_valid(binaries, tmp_path):
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
def test_rules_give_the_values_computed_by_hand(binaries, tests):
    assert "SUCCESS" in promtool(binaries, "test", "rules", tests)


def test_every_alert_is_tested_and_has_advice():
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


@dataclass(frozen=True)
class Watched:
    """A run and the Prometheus that scrapes it."""

    url: str
    metrics: Path

    def get(self, path: str, **parameters: object) -> dict:
        """Return the answer of the API; {} until it is ready."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        except OSError:
            pass  # it does not listen yet
        return {}

    def query(self, expr: str) -> list[dict]:
        return self.get("query", query=expr).get("result", [])


@pytest.fixture(scope="module")
def many(pictures, tmp_path_factory) -> Path:
    """A dataset of the drawn pictures in which each training picture occurs twenty times."""
    source, output = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("packed")
    for picture in pictures.rglob("*.JPEG"):
        folder = source / picture.parent.relative_to(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(20 if "train" in folder.parts else 1):
            os.link(picture, folder / f"{copy}-{picture.name}")
    pack_here("--input", source, "--out", output, "--size", "80")
    return output


@pytest.fixture(scope="module")
def watched(binaries, many, tmp_path_factory) -> Iterator[Watched]:
    """A run in its second epoch, scraped with the shipped configuration, but more often."""
    folder, (port, api) = tmp_path_factory.mktemp("watched"), free_ports(2)
    shutil.copytree(PROMETHEUS, folder / "prometheus")
    config = folder / "prometheus/prometheus.yml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"global": INTERVALS}))
    target = [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": JOB}}]
    (folder / "prometheus/targets/trainer.yml").write_text(yaml.safe_dump(target))

    database = ["--storage.tsdb.path", folder / "data", "--web.listen-address", f"127.0.0.1:{api}"]
    run = ["--port", str(port), "--batch", str(BATCH), "--epochs", str(EPOCHS), "--calibrate"]
    commands = (
        [binaries["prometheus"], "--config.file", config, *database],
        [sys.executable, *command(many, folder / "run", *run)],
    )
    watched = Watched(f"http://127.0.0.1:{api}", folder / "run/metrics.csv")

    def has_a_verdict() -> list[dict]:
        assert all(process.poll() is None for process in processes), (folder / "log").read_text()
        return watched.query("alexnet_epoch > 1.2 and on (job) job:alexnet_verdict")

    processes = []
    with open(folder / "log", "w") as log:
        try:
            processes += [subprocess.Popen(each, stdout=log, stderr=log) for each in commands]
            wait_until(has_a_verdict, pause=0.2, seconds=500)
            yield watched
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(DEADLINE_SECONDS)


def queries_with_values() -> Iterator:
    """Yield the queries of panels and annotations, with values for the variables."""
    values = {"$job": JOB, "$instance": ".+", "$__rate_interval": "1m", "$__range": "1h"}
    for name, expr in queries():
        if not name.startswith("$"):
            yield pytest.param(reduce(lambda text, pair: text.replace(*pair), values.items(), expr), id=name)


@pytest.mark.slow
@pytest.mark.parametrize("expr", [*queries_with_values()])
def test_a_query_of_the_dashboard_finds_data_in_a_real_run(watched, expr):
    if any(metric in expr for metric in NO_DATA) and "vector" not in expr:
        assert not watched.query(expr)
    else:
        wait_until(lambda: watched.query(expr))  # a rate takes two scrapes


@pytest.mark.slow
def test_rules_work_on_a_real_run_and_no_alert_fires(watched):
    def rules() -> list[dict]:
        return [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()))  # each was evaluated once
    assert {rule["health"] for rule in rules()} == {"ok"}
    assert not [rule["name"] for rule in rules() if rule.get("state") == "firing"]
    for rule in rules():
        if rule["type"] == "recording":
            wait_until(partial(watched.query, rule["name"]))  # a scrape that takes over 100 ms fails


@pytest.mark.slow
def test_the_trainer_is_the_only_target_and_is_scraped_without_error(watched):
    def target() -> tuple[str, str, str]:
        (found,) = watched.get("targets")["activeTargets"]
        return found["health"], found["lastError"], found["labels"]["job"]

    wait_until(lambda: target() == ("up", "", JOB))  # a scrape that takes over 100 ms fails
    wait_until(lambda: [info["metric"]["recipe"] for info in watched.query("alexnet_run_info")] == ["demo"])


@pytest.mark.slow
def test_the_image_rate_matches_the_trainers_log(watched):
    """The rate is that of the longest series of scrapes in an epoch, without evaluations or checkpoints."""
    (series,) = watched.query('alexnet_images_total{phase="train"}[1h]')
    took = {int(row["step"]): BATCH / float(row["images_per_second"]) for row in rows(watched.metrics)}
    epochs: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for at, images in series["values"]:
        step = int(images) // BATCH
        if step % STEPS and step + 1 in took:
            epochs[step // STEPS].append((at, step))
    (begin, first), *_, (end, last) = max(epochs.values(), key=len)
    assert first < last
    logged = sum(took[step] for step in range(first + 1, last + 1))
    # A scrape finds the state of some moment between its beginning and its end. A step is counted while it is
    # timed; its time ends after that and before the next step is counted.
    (longest,) = watched.query("max_over_time(scrape_duration_seconds[1h])")
    scrape = float(longest["value"][1])
    assert logged < end - begin + scrape + took[first + 1] + took[last]
    assert logged > end - begin - scrape - took[first] - took[last + 1]
