"""compose.yaml as Compose reads it and, in tests marked `image`, as it runs on a real engine.

Grafana is checked but never started, because only a registry has its image. Prometheus's image can be
replaced by Debian's Prometheus with prometheus.Dockerfile.
"""

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.remote.options import CacheOptions
from tests.helpers import wait_until
from trainer.setting_sources import load_settings
from trainer.settings import Settings

FOLDER = Path(__file__).parents[2] / "docker"
COMPOSE, GPU = FOLDER / "compose.yaml", FOLDER / "compose.gpu.yaml"
BUCKET = FOLDER / "compose.bucket.yaml"
VARIABLES = {"BIND", "BUCKET", "DATA", "GRAFANA_PASSWORD", "RECIPE", "RUN_AS", "TARGET", "TORCH_INDEX"}
VARIABLES |= {"ALEXNET_CACHE_SIZE", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"}


def compose(files: list[Path], *arguments: str, **variables: str) -> str:
    """Return what docker-compose prints, with these variables instead of the user's."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [Path(sys.executable).with_name("docker-compose"), *(f"--file={file}" for file in files), *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def services(*files: Path, **variables: str) -> dict[str, Any]:
    arguments = ("--profile", "exporters", "config", "--format", "json")
    return json.loads(compose([COMPOSE, *files], *arguments, **variables))["services"]


def test_exporters_start_only_on_request_and_dcgm_only_with_a_gpu():
    usual = {"trainer", "prometheus", "grafana"}
    for files, exporters in (([], {"node-exporter"}), ([GPU], {"node-exporter", "dcgm-exporter"})):
        assert set(compose([COMPOSE, *files], "config", "--services").split()) == usual
        assert services(*files).keys() == usual | exporters


def test_only_the_override_reserves_a_gpu():
    assert "deploy" not in services()["trainer"]
    (device,) = services(GPU)["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


@pytest.mark.parametrize(("given", "mount", "command"), [("", "volume", "demo\n"), ("/shards", "bind", "\n")])
def test_the_trainer_uses_the_given_data_or_runs_the_demo(given, mount, command, tmp_path):
    trainer = services(DATA=given, RECIPE="small")["trainer"]
    (data,) = (volume for volume in trainer["volumes"] if volume["target"] == "/data")
    assert data["type"] == mount
    assert data["read_only"]
    stub = tmp_path / "alexnet-train"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    script = trainer["entrypoint"][-1].replace("$$", "$")
    environment = trainer["environment"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == command
    assert environment["ALEXNET_RECIPE"] == "small"


def test_with_a_bucket_the_trainer_has_a_cache_and_the_credentials_of_the_shell(monkeypatch):
    given = {"BUCKET": "s3://bucket/shards", "ALEXNET_CACHE_SIZE": "50GB", "AWS_ACCESS_KEY_ID": "key"}
    trainer = services(BUCKET, **given)["trainer"]
    environment = trainer["environment"]
    assert environment["AWS_ACCESS_KEY_ID"] == "key"
    assert environment.get("AWS_SESSION_TOKEN") is None
    assert environment["DATA"]  # so that it does not run the demo
    (cache,) = (volume for volume in trainer["volumes"] if volume["target"] == "/cache")
    assert cache["type"] == "volume"
    assert not cache.get("read_only")
    for name, value in environment.items():
        if name.startswith("ALEXNET_"):
            monkeypatch.setenv(name, value)
    settings = load_settings([])
    assert settings.data == given["BUCKET"]
    assert settings.cache_options == CacheOptions(Path("/cache"), 50 * 10**9)
    assert services(BUCKET, BUCKET="s3://b")["trainer"]["environment"]["ALEXNET_CACHE_SIZE"] is None


def test_ports_match_the_services_and_are_local_by_default():
    port = Settings.model_fields["port"].default
    for variables, address in (({}, "127.0.0.1"), ({"BIND": "0.0.0.0"}, "0.0.0.0")):
        found = services(**variables)
        for name, target in (("trainer", port), ("prometheus", 9090), ("grafana", 3000)):
            (published,) = found.pop(name)["ports"]
            assert (published["host_ip"], published["target"]) == (address, target)
        assert not any("ports" in other for other in found.values())


def test_the_grace_period_matches_kubernetes():
    job = yaml.safe_load((FOLDER / "kubernetes/one-gpu.yaml").read_text())
    seconds = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert services()["trainer"]["stop_grace_period"] == f"{seconds // 60}m{seconds % 60}s"


@pytest.fixture(scope="module")
def running(image: str, packed: Path) -> Iterator[Callable[..., str]]:
    """Start the trainer on the packed pictures, and Prometheus; yields a function that calls compose."""
    files = [COMPOSE, Path(__file__).with_name("compose.test.yaml")]
    variables = {"DATA": str(packed), "RECIPE": "demo", "RUN_AS": str(os.getuid())}
    variables |= dict.fromkeys(("TRAINER_PORT", "PROMETHEUS_PORT"), "0")

    def call(*arguments: str) -> str:
        return compose(files, "--project-name", "alexnet-test", *arguments, **variables)

    try:
        call("up", "--detach", "--wait", "--no-build")
        yield call
    finally:
        call("down", "--volumes")


TRAINED = 'alexnet_images_total{job="alexnet", instance="trainer:9410", phase="train"}'


def value(running: Callable[..., str], query: str) -> float:
    """Return the only value that Prometheus has for a query, or 0 if it has none or does not answer."""
    address = running("port", "prometheus", "9090").strip()
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except OSError:
        return 0.0
    return float(result[0]["value"][1]) if result else 0.0


@pytest.mark.image
def test_prometheus_scrapes_the_trainer_by_name_and_sees_it_train(running):
    wait_until(lambda: value(running, TRAINED) > 0, pause=1)
    before = value(running, TRAINED)
    wait_until(lambda: value(running, TRAINED) > before, pause=1)
    assert value(running, 'up{job="alexnet"}') == 1


@pytest.mark.image
def test_the_run_resumes_after_a_stop_and_restarts_after_a_crash(running):
    wait_until(lambda: value(running, TRAINED) > 0, pause=1)  # a run that has not begun has nothing to save
    running("stop", "trainer")
    trainer = json.loads(running("ps", "--all", "--format", "json", "trainer"))
    assert trainer["ExitCode"] == 128 + 15  # SIGTERM
    assert "saved after step" in running("logs", "trainer")

    def continuations() -> int:
        return running("logs", "trainer").count("continuing runs/demo after step")

    running("up", "--detach", "--no-build")
    wait_until(lambda: continuations() >= 1, pause=1)
    running("exec", "trainer", "sh", "-c", "kill -KILL -1")  # all but tini
    wait_until(lambda: continuations() >= 2, pause=1)
