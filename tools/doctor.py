"""Find out whether a training run can work on this machine, what will limit it, and how long it will take.

    alexnet-train doctor                                      # without a dataset: on drawn pictures
    alexnet-train doctor --data shards --recipe small         # with any setting of alexnet-train train

It looks at the machine, the dataset, the run folder and the ports, and then trains the beginning of the run
for about a minute in a temporary folder, by the trainer's own loader, step, evaluation and checkpoint. From
that, it computes the time of an epoch and of the whole recipe, and advises settings, each with its reason.
It advises only what it has measured or what is certain.

! marks what is worth knowing, ✗ what would stop a run, and → what to do about it. The exit code is 0 if a run
can work, 1 if something would stop it, and 2 for an impossible setting. All figures hold for the load on the
machine while it was measured.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.dataset import Dataset
from pipeline.locations import location_of
from pipeline.mixture import is_present
from pipeline.output import printed, secure
from pipeline.packing.workers import exit_on_signals
from tools.diagnosing import forecast, machine, preparation
from tools.diagnosing.findings import REFUSALS, Finding, Report, ask, problem
from tools.diagnosing.preparation import Data
from tools.diagnosing.rehearsal import DRAWN_SIZE, rehearse
from tools.options import command_parser, positive, program
from trainer.environment import environment
from trainer.initial import with_initial_net
from trainer.preflight import check_data, is_in_container
from trainer.processes.launch import world_size
from trainer.setting_sources import load_settings
from trainer.settings import Settings, SettingsError

MACHINE, RUN, MEASURED, EXPECTED, ADVICE = "this machine", "the run", "measured", "expected", "advice"
SECONDS = 50.0
START_SECONDS = 20  # besides, usually: imports, first steps and a checkpoint


def main() -> None:
    secure()
    exit_on_signals()
    parser = command_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=SECONDS,
        metavar="S",
        help=f"how long to measure, besides start-up and first steps (default {SECONDS:g})",
    )
    options, rest = parser.parse_known_args()
    report = Report(silent=options.json)
    try:
        settings = with_initial_net(load_settings(rest, command=program()))
        with printed():
            found = examine(settings, rest, options.seconds, report)
            count = len(report.problems)
            report.say(f"\n{count} of these (✗) would stop this run" if count else "\nthis run can work")
            if options.json:
                findings = {name: [each._asdict() for each in part] for name, part in report.findings.items()}
                print(json.dumps({"can_run": not report.problems, "findings": findings, **found}, indent=1))
    except REFUSALS as error:
        print(f"doctor: {problem('', error).text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SettingsError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(bool(report.problems))


def examine(settings: Settings, arguments: Sequence[str], seconds: float, report: Report) -> dict[str, Any]:
    """Examine machine, dataset and run, measure, and add all findings to the report.

    arguments: the command line that the settings came from. Returns the figures for JSON.
    """
    report.add(MACHINE, ask("CPU", machine.processor))
    report.add(MACHINE, ask("memory", machine.memory))
    hardware, failed = machine.ask_hardware(settings.device)
    report.add(MACHINE, failed)
    figures: dict[str, Any] = {"environment": environment("")}
    if hardware is None:  # whatever asks the driver now would hang
        return figures
    report.add(MACHINE, ask("GPU", lambda: machine.accelerator(settings, hardware)))
    report.add(MACHINE, ask("/dev/shm", lambda: machine.shared_memory(hardware["gpus"])))
    report.add(MACHINE, ask("Docker", lambda: machine.docker(hardware["gpus"])))

    by_default = os.environ.get("ALEXNET_DATA") if is_in_container() else None
    by_default = by_default or Settings.model_fields["data"].default
    named = any(word.partition("=")[0] == "--data" for word in arguments)
    given = named or settings.data != location_of(by_default)
    processes, data = 1, None

    def check_run() -> Iterator[Finding]:
        nonlocal processes, data
        processes = world_size(settings)
        if not given and not is_present(settings.data):
            yield Finding(
                "dataset",
                f"none at {settings.data}: drawn pictures of {DRAWN_SIZE} px are measured instead, "
                "which take less time to decode than photos",
                "note",
                "pack yours: alexnet-train make-shards --input IMAGES --out shards; or name it with --data",
            )
            return
        check_data(settings, processes)
        dataset = Dataset(settings.data, processes=processes, cache=settings.cache_options)
        try:
            data = preparation.measure_data(dataset)
            yield from preparation.describe(settings, dataset, data)
        finally:
            if dataset.storage is not None:
                dataset.storage.close()

    report.add(RUN, ask("dataset", check_run))
    report.add(RUN, ask("run folder", lambda: preparation.run_folder(settings, data is not None)))
    can_train = not report.problems  # a port that is in use does not prevent measuring
    report.add(RUN, ask("port", lambda: preparation.ports(settings, processes)))
    if can_train:
        figures |= measure(settings, arguments, data, seconds, report)
    return figures


def measure(
    settings: Settings, arguments: Sequence[str], data: Data | None, seconds: float, report: Report
) -> dict[str, Any]:
    """Measure the beginning of the run, and add to the report what was measured and what follows from it.

    data: the dataset, or None to measure drawn pictures. Returns the figures for JSON.
    """
    report.say(f"\nmeasuring for about {seconds + START_SECONDS:.0f} s …")
    free, parent = machine.free_memory(), preparation.existing(settings.run_folder)
    try:
        measured, validation_images = rehearse(arguments, parent, seconds, drawn=data is None)
    except REFUSALS as error:
        report.add(MEASURED, [problem("training", error)])
        return {}
    data = data or preparation.IMAGENET
    expected = forecast.forecast(settings, measured, data, validation_images)
    report.add(MEASURED, forecast.rates(settings, measured))
    report.add(MEASURED, forecast.disk(measured, data))
    report.add(MEASURED, forecast.memory(measured, free))
    report.add(MEASURED, preparation.space(settings, measured.checkpoint_bytes))
    report.add(EXPECTED, forecast.times(settings, measured, expected, data))
    report.add(ADVICE, forecast.advice(settings, measured, expected))
    return {"measured": asdict(measured), "expected": asdict(expected)}


if __name__ == "__main__":
    main()
