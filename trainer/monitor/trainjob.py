"""Post the progress of a run to Kubeflow Trainer, which shows it as `status.trainerStatus` of the TrainJob.

The protocol is that of Kubeflow Trainer 2.2 and later (its proposal KEP-2779). If the operator's feature gate
TrainJobStatus is on, it sets three variables in the pods: KUBEFLOW_TRAINER_SERVER_URL takes the status by
POST as JSON, KUBEFLOW_TRAINER_SERVER_TOKEN names a file with a bearer token, which changes from time to time,
and KUBEFLOW_TRAINER_SERVER_CA_CERT a file with the authority that signed the server's certificate.
"""

import http.client
import json
import math
import os
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:  # these modules import torch, which takes seconds
    from trainer.evaluate import Scores
    from trainer.monitor.meter import Interval

PERIOD_SECONDS = 15.0  # at most one request in this time; Kubeflow asks for at least five seconds
TIMEOUT_SECONDS = 5.0  # of a request
_URL, _TOKEN, _CA = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "TOKEN", "CA_CERT"))
_MOST_SECONDS = 2**31 - 1  # Kubeflow's field has 32 bits


class TrainJob:
    """Posts the progress of a run from a thread; does nothing outside a TrainJob.

    steps: number of steps of the whole run. warn: prints a line; a request that fails is reported once, until
    one succeeds, and otherwise ignored. silent: whether nothing is posted, as in all processes but the first.
    """

    def __init__(self, steps: int, warn: Callable[[str], None], silent: bool = False):
        self.steps, self._warn = steps, warn
        self._is_active = bool(os.environ.get(_URL)) and not silent
        self._status: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._pending: dict[str, Any] | None = None  # the newest status, until it is posted
        self._changed, self._closed = threading.Event(), threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="trainjob", daemon=True)

    def __enter__(self) -> Self:
        if self._is_active:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._changed.set()
        if self._is_active and kind is None:  # a run that was stopped or has failed has nothing to add
            self._thread.join(2 * TIMEOUT_SECONDS)

    def show_interval(self, step: int, learning_rate: float, interval: "Interval") -> None:
        """Post the measurements of a log interval that ended after `step` steps."""
        seconds = (self.steps - step) * interval.seconds / interval.steps
        self._metrics |= {"loss": interval.loss, "error": interval.error, "learning_rate": learning_rate}
        self._metrics["images_per_second"] = interval.images_per_second
        # The run is complete only after its last evaluation and its report.
        self._update(min(99, 100 * step // self.steps), min(math.ceil(seconds), _MOST_SECONDS))

    def show_evaluation(self, scores: "Scores", with_top5: bool) -> None:
        """Post the result of an evaluation on the validation set."""
        self._metrics |= {"validation_loss": scores.loss, "validation_top1_error": scores.top1_error}
        if with_top5:
            self._metrics["validation_top5_error"] = scores.top5_error
        self._update()

    def complete(self) -> None:
        """Post that the run is complete."""
        self._update(100, 0)

    def _update(self, percent: int | None = None, seconds_left: int | None = None) -> None:
        if percent is not None:
            self._status |= {"progressPercentage": percent, "estimatedRemainingSeconds": seconds_left}
        metrics = [{"name": name, "value": f"{value:.6g}"} for name, value in self._metrics.items()]
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._pending = {**self._status, "metrics": metrics, "lastUpdatedTime": time}
        self._changed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            self._post_pending()
            self._closed.wait(PERIOD_SECONDS)
        self._post_pending()

    def _post_pending(self) -> None:
        status, self._pending = self._pending, None
        if status is None:
            return
        try:
            post({"trainerStatus": status})
        except Exception as error:  # whatever it is, it must not affect the run
            if not self._has_failed:
                self._warn(f"posting the progress to Kubeflow fails, and will be tried again: {error}")
            self._has_failed = True
        else:
            self._has_failed = False


def post(document: dict[str, Any]) -> None:
    """Post a JSON document to the server that the environment names.

    Raises OSError, HTTPException or ValueError if that fails or if the server does not accept it.
    """
    for name in (_TOKEN, _CA):
        if not os.environ.get(name):
            raise ValueError(f"{name} is not set")
    url = urlsplit(os.environ[_URL])
    context = ssl.create_default_context(cafile=os.environ[_CA])
    token = Path(os.environ[_TOKEN]).read_text().strip()  # read again each time, because it changes
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    # Unlike urllib, this uses no proxy, which could not reach a service of the cluster.
    connection = http.client.HTTPSConnection(
        url.hostname or "", url.port, timeout=TIMEOUT_SECONDS, context=context
    )
    try:
        connection.request("POST", url.path, json.dumps(document), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"HTTP {response.status}: {response.read(200).decode(errors='replace').strip()}")
    finally:
        connection.close()
