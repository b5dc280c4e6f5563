"""Train from a bucket while requests fail, and while the run is killed, and compare it with a local run.

    python tests/endurance/bucket.py --faults 200 --kills 50 --seed 0 --record runs/bucket.jsonl

Drawn pictures are packed into many small shards and uploaded to an S3 server on this machine, SeaweedFS,
which checks signatures. The runs read them through a proxy with some latency, with a small cache and a
shuffle window, so that they fetch and evict until the end.

    faults   a run whose requests fail, in all ways of tests/remote/faults.py, and whose link is broken
             for seconds
    kills    runs on one and on two processes that get SIGKILL while they start, fetch, evict and train, and
             that the same command continues with the same cache

The exit code is 1 at the first difference, and that run's folder is kept. These count as differences: losses,
weights and the best checkpoint, bit for bit; any image that the net was given; a shard in the cache that has
other bytes than were packed; a cache that is too large; a run that does not end. Any other option is a
setting of `alexnet-train train`.
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.manifest import DatasetError, read_manifest
from tests.endurance.chaos import SETTINGS
from tests.endurance.lives import DifferenceError
from tests.endurance.record import write_record
from tools.options import command_parser, count, natural, positive
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

LONGER = ["--batch", "32", "--epochs", "24"]  # so that there are enough requests


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--faults", type=natural, default=200, metavar="N", help="requests that fail (default 200)")
    add("--ratio", type=positive, default=0.3, metavar="X", help="their share of requests (default .3)")
    add("--path", default=r"\.tar$", metavar="REGEX", help=r"objects whose requests fail (default \.tar$)")
    add("--outages", type=natural, default=3, metavar="N", help="outages of the link (default 3)")
    add("--stall", type=positive, default=5.0, metavar="S", help="length of a stall (default 5)")
    add("--kills", type=natural, default=50, metavar="N", help="kills (default 50)")
    add("--delay", type=positive, default=0.02, metavar="S", help="latency of a request (default .02)")
    add("--window", type=natural, default=4, metavar="N", help="--shuffle-window of the runs (default 4)")
    add("--pictures", type=natural, default=240, metavar="N", help="in each of ten classes (default 240)")
    add("--shard-samples", type=count, default=20, metavar="N", help="pictures in a shard (default 20)")
    add("--share", type=positive, default=0.6, metavar="X", help="of the shards in the cache (default .6)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of faults and kills (default 0)")
    folder = Path("runs/bucket")
    add("--folder", type=Path, default=folder, metavar="DIR", help="of the runs (default runs/bucket)")
    add("--record", type=Path, metavar="FILE", help="also append the last line to this file")
    return parser.parse_known_args()


def pack_pictures(folder: Path, pictures: int, shard_samples: int) -> Path:
    """Draw and pack pictures of ten classes; return the dataset's folder."""
    from pipeline.packing.options import PackingOptions
    from pipeline.packing.pack import pack
    from tests.endurance.faults import draw_input

    draw_input(folder, classes=10, train=pictures, val=2)
    output = folder / "shards"
    pack(PackingOptions(str(folder / "in"), str(output), size=80, shard_samples=shard_samples, workers=1))
    return output


def disturb_all(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Do all runs; return their results. Raises SettingsError, DatasetError, OSError or DifferenceError."""
    if options.folder.exists() and any(options.folder.iterdir()):
        raise SettingsError(f"{options.folder} is not empty: delete it, or choose another --folder")

    from tests.endurance.bucket_runs import ONE, TWO, BucketRuns, Place
    from tests.remote.faulty_proxy import FaultyProxy
    from tests.remote.seaweedfs import served
    from tests.trees import upload

    work = options.folder.resolve()
    data = pack_pictures(work / "pictures", options.pictures, options.shard_samples)
    shards = read_manifest(data).split("train").shards
    results: dict[str, Any] = {"shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}
    cache_bytes = int(results["bytes"] * options.share)
    arguments = [*SETTINGS, *LONGER, "--shuffle-window", str(options.window), *rest]
    settings = load_settings([*arguments, "--data", str(data)], command="bucket.py")
    with ExitStack() as stack:
        server = stack.enter_context(served(work / "server"))
        upload(data, "s3://bucket/shards")
        proxy = stack.enter_context(FaultyProxy(server, delay=options.delay, stall_seconds=options.stall))
        os.environ["AWS_ENDPOINT_URL"] = proxy.url  # until `served` restores the environment
        place = Place("s3://bucket/shards", data, work / "cache", cache_bytes, proxy)
        runs = BucketRuns(settings, arguments, work / "runs", options.seed, place)
        if options.faults:
            proxy.faults.fail_at_random(options.seed, options.faults, options.ratio, path=options.path)
            done = runs.disturb(ONE, options.outages)
            results["faults"] = vars(done)
            print(f"{done.faults.total()} faults, {done.outages} outages: same result as without", flush=True)
        for scenario in (ONE, TWO):
            if kills := options.kills // 2 + options.kills % 2 * (scenario is ONE):
                tally = runs.kill(scenario, kills)
                results[scenario.name] = vars(tally)
                print(
                    f"{scenario.name}: {kills} kills {dict(tally.kills)}, same result as without", flush=True
                )
    shutil.rmtree(work)
    return results


def main() -> None:
    options, rest = parse_arguments()
    begun = time.monotonic()
    try:
        results = disturb_all(options, rest)
    except (SettingsError, DatasetError, OSError, DifferenceError) as error:
        sys.exit(f"bucket: {error}")
    write_record(begun, results, options.record)


if __name__ == "__main__":
    main()
