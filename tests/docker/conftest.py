"""The image and its containers, for the tests marked `image`.

`make image-test` names the image in TEST_IMAGE, and then a missing engine is a failure. Without the
name these tests skip, since an image takes minutes to build.
"""

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers import wait_until

# Enough for starting a container whose image is not in memory yet, and less than pytest's limit, which would
# not show what was waited for.
DEADLINE_SECONDS = 500.0


def run_docker(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Docker's client; a failure shows its output."""
    command = ["docker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


class Container:
    """A container that was started in the background."""

    def __init__(self, *arguments: object):
        self.id = run_docker("run", "--detach", *arguments).stdout.strip()

    def state(self) -> dict[str, Any]:
        return json.loads(run_docker("inspect", "--format", "{{json .State}}", self.id).stdout)

    def health(self) -> str:
        return self.state()["Health"]["Status"]

    def logs(self) -> str:
        done = run_docker("logs", self.id)
        return done.stdout + done.stderr

    def sh(self, script: str, *, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the container, with any exit code."""
        options = ["--user", user] if user else []
        return run_docker("exec", *options, self.id, "sh", "-c", script, check=False)

    def stop(self, seconds: int = 120) -> int:
        """Stop it; return the exit code, which is 137 if it had to be killed."""
        run_docker("stop", "--time", seconds, self.id)
        return self.state()["ExitCode"]

    def metric(self, sample: str) -> float | None:
        """Return a sample such as `name{label="value"}` of /metrics; None before the port answers."""
        port = run_docker("port", self.id, "9410/tcp").stdout.split(":")[-1].strip()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return None
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Poll until the condition holds. Fails at the deadline or when the container has ended."""

        def holds() -> bool:
            found = bool(condition())
            assert found or self.state()["Running"], self.logs()
            return found

        wait_until(holds, pause=0.2, seconds=DEADLINE_SECONDS)

    def wait_for_images(self, more_than: float = 0) -> float:
        """Wait until it has trained on more images; return the number."""
        self.wait_until(lambda: (self.metric('alexnet_images_total{phase="train"}') or 0) > more_than)
        return self.metric('alexnet_images_total{phase="train"}') or 0

    def remove(self) -> None:
        run_docker("rm", "--force", "--volumes", self.id)


@pytest.fixture(scope="session")
def image() -> str:
    """The name of the image."""
    name = os.environ.get("TEST_IMAGE")
    if not name:
        pytest.skip("TEST_IMAGE is not set, which `make image-test` does")
    run_docker("image", "inspect", name)
    return name


@pytest.fixture(scope="session")
def docker(image: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Docker's client, in tests that need the image."""
    return run_docker


@pytest.fixture(scope="module")
def start(image: str) -> Iterator[Callable[..., Container]]:
    """Start a container with arguments of `docker run`; it is removed after the module's tests."""
    containers: list[Container] = []

    def begin(*arguments: object) -> Container:
        containers.append(Container(*arguments))
        return containers[-1]

    yield begin
    for container in containers:
        container.remove()
