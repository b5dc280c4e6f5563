"""Train a tiny net for a long time and check whether memory, open files or threads grow.

    python tests/endurance/soak.py --out runs/soak
    python tests/endurance/soak.py --out runs/soak --bucket

The trainer runs in its own process, with evaluations, checkpoints and its metrics server, and with a narrow
net: steps are short and 1 % of its memory is little. Meanwhile pages are requested from its server, and the
process and all its children are sampled together with the step:

    resident_bytes    RSS, part of which are pages of files that the kernel may reclaim
    anonymous_bytes   the rest: allocated memory, where leaks show
    shared_bytes      mapped shared memory, and System V segments that the processes created
    open_files        file descriptors without those of connections
    threads           threads of all processes
    connections       TCP sockets

With --bucket, the run reads the dataset from an S3 server on this machine, SeaweedFS, through a cache for
60 % of it, so that it fetches and evicts until the end.

The first fifth of the steps is the warm-up. Growth is the median of a series over the last tenth of the
steps, compared with the median over the tenth after the warm-up, so what comes and goes with a checkpoint
does not count. Of open files and connections the largest number counts instead, compared with that until
then: a run from a bucket opens shards and closes them, and keeps connections for a while. If anything grew by
more than --limit, it is named and the exit code is 1. Any other option is a setting of `alexnet-train train`.
--out must be a new folder; soak.json and soak.png are written to it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.manifest import DatasetError, read_manifest
from tests.endurance.lives import free_port
from tests.remote.seaweedfs import served
from tests.trees import upload
from tools.options import command_parser, count, positive
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

SERIES = ("resident_bytes", "anonymous_bytes", "shared_bytes", "open_files", "threads", "connections")
WARM_UP, WINDOW = 0.2, 0.1  # as fractions of the steps
LEAST = 5  # least number of samples in a window
CACHE_SHARE = 0.6  # of the dataset, with --bucket
TRAIN = "from trainer.cli import main; main()"
# Otherwise the dataset would be kept in memory, and nothing would be fetched after the first epoch.
NOT_IN_MEMORY = "from pipeline import reader; reader.memory_bytes = lambda: 0; "
SHORT_STEPS = ["--recipe", "demo", "--crop", "64", "--width", "0.0625", "--batch", "8", "--threads", "1"]
SHORT_STEPS += ["--log-every", "10", "--checkpoint-steps", "50"]

Samples = dict[str, list[float]]  # `step`, `seconds` and SERIES


class SoakError(RuntimeError):
    """A soak without a result; the message is one line."""


def sample(pid: int) -> dict[str, float]:
    """Sample SERIES for a process and all its descendants. Raises OSError or psutil.Error if it has ended."""
    figures, parent = dict.fromkeys(SERIES, 0.0), psutil.Process(pid)
    tree = {process.pid: process for process in (parent, *parent.children(recursive=True))}
    for process in tree.values():
        try:
            # psutil does not distinguish anonymous memory from shared memory.
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kilobytes = dict(line.split()[:2] for line in lines)
            figures["resident_bytes"] += 1024 * int(kilobytes["Rss:"])
            figures["anonymous_bytes"] += 1024 * int(kilobytes["Pss_Anon:"])
            figures["shared_bytes"] += 1024 * int(kilobytes["Pss_Shmem:"])
            connections = len(process.net_connections("tcp"))
            figures["connections"] += connections
            figures["open_files"] += process.num_fds() - connections
            figures["threads"] += process.num_threads()
        except (OSError, psutil.Error):
            if process is parent:
                raise
    for segment in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        _, _, _, size, creator, *_ = map(int, segment.split())
        figures["shared_bytes"] += size if creator in tree else 0
    return figures


def step_of(port: int) -> float | None:
    """Return the trainer's current step from its metrics; its other pages are requested, too.

    Returns None while its server is not running.
    """
    try:
        pages = {}
        for page in ("/", "/healthz", "/metrics"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=30) as answer:
                pages[page] = answer.read().decode()
    except OSError:
        return None
    (line,) = (line for line in pages["/metrics"].splitlines() if line.startswith("alexnet_step "))
    return float(line.split()[1])


def watch(command: list[str], port: int, steps: int, seconds: float, log: Path) -> Samples:
    """Sample a training run every `seconds`, from its first step to its last. Raises SoakError."""
    samples: Samples = {name: [] for name in ("step", "seconds", *SERIES)}
    # Steps this small are fastest with one thread.
    begun, quiet = time.monotonic(), {"OMP_NUM_THREADS": "1"} | os.environ
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=quiet) as process:
        try:
            while process.poll() is None:
                step = step_of(port)
                if step and step < steps:  # after the last step it draws its report
                    taken = {"step": step, "seconds": round(time.monotonic() - begun, 1)}
                    with suppress(OSError, psutil.Error):  # it has just ended
                        for name, value in (taken | sample(process.pid)).items():
                            samples[name].append(value)
                time.sleep(seconds)
        finally:
            process.kill()
    if process.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        raise SoakError(f"the trainer ended with exit code {process.returncode}, see {log}: {' '.join(last)}")
    return samples


def growth(samples: Samples, steps: int) -> dict[str, dict[str, float]]:
    """Return each series' medians after the warm-up and at the end, and its growth in percent.

    Raises SoakError if either window has fewer than LEAST samples.
    """

    def within(begin: float) -> list[int]:
        window = range(round(begin * steps), round((begin + WINDOW) * steps))
        return [n for n, step in enumerate(samples["step"]) if step in window]

    first, last = within(WARM_UP), within(1 - WINDOW)
    if min(len(first), len(last)) < LEAST:
        raise SoakError(
            f"fewer than {LEAST} samples in a tenth of the steps: lower --seconds or raise --steps"
        )
    grown = {}
    for name in SERIES:
        if name in ("open_files", "connections"):
            before, after = max(samples[name][: first[-1] + 1]), max(samples[name][n] for n in last)
        else:
            before, after = (median(samples[name][n] for n in window) for window in (first, last))
        grown[name] = {"before": before, "after": after, "percent": 100 * (after - before) / max(before, 1)}
    return grown


def table(grown: dict[str, dict[str, float]], limit: float) -> Iterator[str]:
    """Yield a line for each series: its medians, its growth and whether that exceeds the limit."""
    for name, figures in grown.items():
        verdict = "flat" if figures["percent"] <= limit else "GREW"
        medians = f"{figures['before']:>14,.0f} to {figures['after']:>14,.0f}"
        yield f"{name:17}{medians}  {figures['percent']:+8.2f} %  {verdict}"


def draw(path: Path, samples: Samples, grown: dict[str, dict[str, float]], steps: int) -> None:
    """Draw a panel for each series, with the two numbers that are compared over their windows."""
    import matplotlib

    matplotlib.use("Agg")  # files only: there may be no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(11, 8.4), layout="constrained")
    for panel, (name, figures) in zip(axes.flat, grown.items(), strict=True):
        scale, unit = (1e6, "MB") if name.endswith("_bytes") else (1, None)
        panel.plot(samples["step"], [value / scale for value in samples[name]], color="tab:blue", linewidth=1)
        for begin, value in ((WARM_UP, figures["before"]), (1 - WINDOW, figures["after"])):
            window = [begin * steps, (begin + WINDOW) * steps]
            panel.plot(window, [value / scale] * 2, color="tab:orange", linewidth=3)
        panel.axvspan(0, WARM_UP * steps, color="tab:gray", alpha=0.15)
        panel.set(title=f"{name}: {figures['percent']:+.2f} %", xlabel="step", ylabel=unit)
        panel.set_ylim(0, 1.15 * max(samples[name]) / scale or 1)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def prepare(out: Path, shard_samples: int) -> Path:
    """Draw and pack a thousand training pictures; return the dataset's folder."""
    pictures, shards = out / "pictures", out / "shards"
    drawn = ["--out", pictures, "--train", "100", "--val", "10"]
    packed = ["--input", pictures, "--out", shards, "--size", "80", "--shard-samples", shard_samples]
    for command in (["tools.draw_pictures", *drawn], ["tools.make_shards", *packed]):
        subprocess.run([sys.executable, "-m", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return shards


def upload_to_bucket(data: Path, out: Path, stack: ExitStack) -> list[str]:
    """Serve a dataset from a bucket; return the settings with which a run reads it through a small cache."""
    stack.enter_context(served(out / "server"))
    upload(data, "s3://bucket/shards")
    manifest = read_manifest(data)
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    cache = ["--cache", str(out / "cache"), "--cache-size", str(int(CACHE_SHARE * size))]
    return ["--data", "s3://bucket/shards", "--shuffle-window", "2", *cache]


def soak(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Run a soak; return its record and the growth of each series.

    Raises SoakError, SettingsError, DatasetError or OSError.
    """
    run, port = options.out / "run", free_port()
    if run.exists():
        raise SoakError(f"{run} already exists: choose another --out, or delete it")
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.data or prepare(options.out, 50 if options.bucket else 250)
    with ExitStack() as stack:
        source = upload_to_bucket(data, options.out, stack) if options.bucket else ["--data", str(data)]
        given = [*source, "--out", str(run), "--address", "127.0.0.1", "--port", str(port)]
        arguments = [*SHORT_STEPS, *rest, *given]
        batch = load_settings(arguments, command="soak.py").batch
        samples_an_epoch = read_manifest(data).split("train").samples
        epochs = -(-options.steps * batch // samples_an_epoch)
        steps = -(-epochs * samples_an_epoch // batch)
        program = NOT_IN_MEMORY + TRAIN if options.bucket else TRAIN
        command = [sys.executable, "-c", program, *arguments, "--epochs", str(epochs)]
        samples = watch(command, port, steps, options.seconds, options.out / "trainer.log")
    grown = growth(samples, steps)
    about = Run(run).starts()[-1]
    record = {"command": " ".join(sys.argv), "environment": about, "steps": steps, "batch": batch}
    record |= {"evaluations": len(Run(run).evaluations.rows()), "growth": grown, "samples": samples}
    draw(options.out / "soak.png", samples, grown, steps)
    return record, grown


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the run and the results")
    add("--steps", type=count, default=20_000, metavar="N", help="least number of steps (default 20,000)")
    add("--data", type=Path, metavar="DIR", help="packed dataset (default: pictures are drawn)")
    add("--bucket", action="store_true", help="read the dataset from a bucket")
    add("--seconds", type=positive, default=1.0, metavar="S", help="time between samples (default 1)")
    add("--limit", type=positive, default=1.0, metavar="PERCENT", help="growth that is allowed (default 1)")
    return parser.parse_known_args()


def main() -> None:
    options, rest = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # this also ends the trainer
    try:
        record, grown = soak(options, rest)
        (options.out / "soak.json").write_text(json.dumps(record) + "\n")
    except (SoakError, SettingsError, DatasetError, OSError) as error:
        sys.exit(f"soak: {error}")
    print(*table(grown, options.limit), sep="\n")
    grew = [name for name, figures in grown.items() if figures["percent"] > options.limit]
    if grew:
        sys.exit(f"soak: grew by more than {options.limit:g} %: {', '.join(grew)}")


if __name__ == "__main__":
    main()
