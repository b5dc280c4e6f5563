"""The doctor's arithmetic and its advice."""

import math
from dataclasses import replace

import pytest

from tests.calibrations import MEASURED
from tools.diagnosing import forecast, rehearsal
from tools.diagnosing.findings import Finding
from tools.diagnosing.forecast import Calibration
from tools.diagnosing.preparation import IMAGENET, Data
from trainer.settings import Settings


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


DATA = Data(train=5000, val=400, image_bytes=20_000.0, stays_in_memory=True, cold=5e6)


def test_the_forecast_adds_up_training_evaluations_checkpoints_and_start():
    settings = Settings(epochs=10, evaluate_epochs=3, schedule="cosine")
    found = forecast.forecast(settings, MEASURED, DATA, measured_val=200)
    assert found.evaluation_seconds == 4.0  # 400 images where 200 took 2 s
    assert found.epoch_seconds == 50.0 + 4.0 + 0.5
    assert found.run_seconds == 5.0 + 10 * 50.5 + 4 * 4.0 + 3.0  # and the last checkpoint is waited for


def advised(settings: Settings, measured: Calibration = MEASURED, data: Data = DATA) -> list[str]:
    expected = forecast.forecast(settings, measured, data, measured_val=data.val)
    return [each.subject for each in forecast.advice(settings, measured, expected)]


COSINE = {"schedule": "cosine", "epochs": 20}
ADVICE = {
    "nothing": (COSINE, {}, {}, []),
    "compiling gains nothing": (COSINE, {"plain_net": 116.0}, {}, ["--no-compile"]),
    "compiling gains little": (COSINE, {"plain_net": 115.0}, {}, []),
    # 15 s for the evaluation and 50.5 s for the rest: every third epoch makes it 15 of 166.5 s.
    "long evaluations": (COSINE, {"evaluation_seconds": 15.0}, {}, ["--evaluate-epochs 3"]),
    "long evaluations, but rare": (COSINE | {"evaluate_epochs": 3}, {"evaluation_seconds": 15.0}, {}, []),
    "long evaluations of a short run": (COSINE | {"epochs": 3}, {"evaluation_seconds": 15.0}, {}, []),
    "a schedule that needs them": ({"schedule": "plateau"}, {"evaluation_seconds": 15.0}, {}, []),
    "long epochs": (COSINE, {}, {"train": 180_000}, ["--checkpoint-seconds 600"]),
    "long epochs, saved": (COSINE | {"checkpoint_steps": 500}, {}, {"train": 180_000}, []),
    "long steps": (COSINE, {"step_seconds": 12.0}, {}, ["--log-every 5"]),
    "long steps, logged": (COSINE | {"log_every": 10}, {"step_seconds": 12.0}, {}, []),
}


@pytest.mark.parametrize(("settings", "measured", "data", "expected"), ADVICE.values(), ids=ADVICE)
def test_advice_follows_from_what_was_measured(settings, measured, data, expected):
    assert advised(Settings(**settings), replace(MEASURED, **measured), DATA._replace(**data)) == expected


@pytest.mark.parametrize(
    ("cold", "stays", "status", "text"),
    [
        (2e6, True, "ok", "training reads 2 MB/s"),
        (1e6, True, "note", "the limit in the first epoch"),
        (1e6, False, "note", "the limit in each epoch"),
    ],
)
def test_a_disk_slower_than_training_is_noted(cold, stays, status, text):
    [found] = forecast.disk(MEASURED, DATA._replace(cold=cold, stays_in_memory=stays))
    assert found.status == status
    assert text in found.text


def test_more_memory_than_was_free_is_noted():
    assert not list(forecast.memory(replace(MEASURED, processes=2), 4 * 10**9))
    [found] = forecast.memory(replace(MEASURED, processes=3), 4 * 10**9)
    assert found.text == "training takes 6 GB, and 4 GB were free"


def test_the_figures_are_shown_with_what_they_are_for():
    settings = Settings(epochs=90)
    expected = forecast.forecast(settings, MEASURED, IMAGENET, measured_val=100)
    found = by_subject(
        [*forecast.rates(settings, MEASURED), *forecast.times(settings, MEASURED, expected, IMAGENET)]
    )
    assert found["training"].text == "100 images/s (90 to 105), loader and net together"
    assert found["note"].text == "a note"
    assert found["an epoch"].text.startswith(
        "3 h 50 min for 1,281,167 images of ImageNet, with 16 min 40 s for"
    )
    hours = math.floor((90 * (12811.67 + 1000 + 0.5) + 8) / 3600)
    assert found["the run"].text.startswith(f"{hours} h ")


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ({}, "the net, which shares the cores"),
        ({"loader": 105.0}, "the loader, which shares the cores"),
        ({"processes": 2}, "the net, which shares the cores"),
        ({"processes": 2, "net": 200.0}, "the net, which shares the cores"),
        ({"processes": 2, "net": 300.0}, "the exchange of gradients"),
        ({"net": 300.0}, "the net, which shares the cores"),
        ({"verdict": "storage-bound"}, "the storage"),
        ({"device": "H200"}, "the net: the device computes"),
        ({"device": "H200", "verdict": "input-bound"}, "the loader: the device waits"),
    ],
)
def test_the_limit_is_the_verdict_or_on_a_cpu_what_takes_most_of_the_cores(changed, limit):
    measured = replace(MEASURED, **changed)
    found = by_subject(forecast.rates(Settings(), measured))["limit"].text
    assert found.startswith(limit)
    loader, net = measured.training / measured.loader, measured.training / measured.net
    assert found.endswith(f"loader alone would take {loader:.0%}, and the net alone {net:.0%}")


@pytest.mark.parametrize(
    ("code", "errors", "reason"),
    [
        (1, "a\nno room\n", "no room"),
        (2, "", "exit code 2"),
        (-9, "", "smaller --batch"),
        (137, "", "smaller --batch"),
        (-11, "", "SIGSEGV"),
        (None, "", "did not end in time"),
    ],
)
def test_why_the_measurement_failed(code, errors, reason):
    assert reason in rehearsal._reason(code, errors)
