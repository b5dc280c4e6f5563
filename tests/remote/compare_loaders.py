"""Compare the first and later epochs from a bucket with those from a local disk, and with other loaders.

    make .loader-peers
    python tests/remote/compare_loaders.py --data shards --delay 0.05 --megabytes-per-second 200

The packed dataset is uploaded to SeaweedFS on this machine, in this project's format and in those of MosaicML
Streaming and LitData. Each loader reads it through a proxy that adds latency and limits the bandwidth, in its
own process and with an empty cache that has room for everything. `disk` is this project's loader on the local
files. For each epoch, a line has the images/s, the seconds until its first batch, and the bytes and requests
that passed the proxy during it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import REPO
from tests.remote.faulty_proxy import FaultyProxy
from tests.remote.seaweedfs import served
from tests.trees import upload
from tools.options import command_parser, count, positive

CANDIDATES = ("disk", "alexnet-train", "streaming", "litdata")
OURS = ("disk", "alexnet-train")


class Comparison:
    """Runs candidates one after the other. scratch: an empty folder, for conversions and caches."""

    def __init__(self, options: argparse.Namespace, scratch: Path, proxy: FaultyProxy):
        self.options, self.scratch, self.proxy = options, scratch, proxy

    def prepare(self, name: str) -> str:
        """Upload the dataset in a candidate's format; return the URL, or the local folder of `disk`."""
        data = self.options.data.resolve()
        if name == "disk":
            return str(data)
        folder, url = data, f"s3://bucket/{name}"
        if name not in OURS:
            folder = self.scratch / f"{name}-packed"
            subprocess.run(
                [*self.command("pack", name), f"--data={data}", f"--out={folder}"],
                check=True,
                cwd=REPO,
                stdout=sys.stderr,
            )
        upload(folder, url)
        return url

    def command(self, action: str, name: str) -> list[str]:
        python = sys.executable if name in OURS else str(self.options.loader_peers)
        loader = "alexnet-train" if name in OURS else name
        return [python, "-m", "tools.benchmarks.bucket_peers", action, loader]

    def read(self, name: str, url: str) -> Iterator[dict[str, Any]]:
        """Yield the results of each epoch of a candidate."""
        cache = self.scratch / f"{name}-cache"
        cache.mkdir()
        numbers = {"batch": self.options.batch, "crop": self.options.crop, "epochs": self.options.epochs}
        arguments = [f"--url={url}", f"--cache={cache}"]
        arguments += [f"--{option}={number}" for option, number in numbers.items()]
        # Streaming takes the server from its own variable.
        environment = {**os.environ, "AWS_ENDPOINT_URL": self.proxy.url, "S3_ENDPOINT_URL": self.proxy.url}
        before = self.proxy.bytes_sent, self.proxy.requests
        with subprocess.Popen(
            [*self.command("read", name), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env=environment,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if not line.startswith("{"):  # some packages print to stdout
                    continue
                now = self.proxy.bytes_sent, self.proxy.requests
                fetched, requests = (after - earlier for after, earlier in zip(now, before, strict=True))
                before = now
                yield {"loader": name, **json.loads(line), "bytes": fetched, "requests": requests}
        if process.returncode:
            print(f"compare_loaders: {name} ended with exit code {process.returncode}", file=sys.stderr)


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("candidates", nargs="*", default=CANDIDATES, help=f"by default {' '.join(CANDIDATES)}")
    add("--data", type=Path, required=True, metavar="DIR", help="packed dataset")
    peers = Path(".loader-peers/bin/python")
    add(
        "--loader-peers",
        type=Path,
        default=peers,
        metavar="FILE",
        help=f"the peers' Python (default {peers})",
    )
    add("--delay", type=positive, default=0.05, metavar="S", help="latency of a request (default .05)")
    add("--megabytes-per-second", type=positive, default=200.0, metavar="X", help="of the link (default 200)")
    add("--epochs", type=count, default=3, metavar="N", help="epochs of each (default 3)")
    add("--batch", type=count, default=128, metavar="N", help="batch size (default 128)")
    add("--crop", type=count, default=224, metavar="PX", help="side of the crop (default 224)")
    options = parser.parse_args()
    options.loader_peers = Path(os.path.abspath(options.loader_peers))  # noqa: PTH100 – a link, not its target
    link = {"delay": options.delay, "bytes_per_second": 1e6 * options.megabytes_per_second}
    with tempfile.TemporaryDirectory(prefix="compare-loaders-") as folder:
        scratch = Path(folder)
        with served(scratch / "server") as url, FaultyProxy(url, **link) as proxy:
            comparison = Comparison(options, scratch, proxy)
            places = {name: comparison.prepare(name) for name in options.candidates}
            print(f"{'loader':14} epoch  images/s  first batch  megabytes  requests")
            for name, place in places.items():
                for epoch in comparison.read(name, place):
                    print(
                        f"{name:14} {epoch['epoch']:5} {epoch['images'] / epoch['seconds']:9,.0f}"
                        f" {epoch['first_batch_seconds']:10.2f} s {epoch['bytes'] / 1e6:10,.1f}"
                        f" {epoch['requests']:9,}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
