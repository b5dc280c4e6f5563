"""Classify pictures and videos: report the five most probable classes of each.

    alexnet-train classify photos/ clip.mp4 --run runs/a
    alexnet-train classify photos/ --net net.onnx --out classes.jsonl --overlay drawn/

The net comes from a run folder, or from a file that `alexnet-train export` wrote. An exported file needs no
settings and no dataset, and an .onnx file needs no PyTorch either.

Pictures are prepared as in packing and evaluation: rotated according to EXIF, converted to RGB, and resized
by their shorter side. The net then sees the centre crop or, with --crops 10, the four corners, the centre and
their mirror images, whose softmax outputs are averaged.

A video gives one result for each --window seconds: the mean softmax output over the frames of that window.

Folders are searched at any depth, also through links, for files with the extension of a picture or a video.
Hidden files and what desktops and archivers leave in folders are skipped. A picture named on the command line
may have any extension, because its content decides. An input that is broken, missing or unreadable is
reported and the others are still classified, but the exit code is then 1. If the storage fails, the command
ends.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import atomic_write, path_in_errors
from pipeline.messages import pluralize
from pipeline.output import printed, secure
from pipeline.printable import as_text
from pipeline.remote_errors import reason_in_full
from tools.classifying.inputs import InputError, Source, errors_of, find
from tools.classifying.nets import Net, NetError, open_export, open_run
from tools.classifying.output import Result, best, csv_rows, json_lines
from tools.classifying.pictures import read, views
from tools.options import command_parser, count, positive

Write = Callable[[Result], None]
CHUNK = 32  # pictures in memory
FORMATS = {".jsonl": json_lines, ".csv": csv_rows}


def main() -> None:
    secure()
    options = parse_arguments()
    try:
        sources, errors, others = find(options.inputs)
        for error in errors:
            report(error)
        failed = len(errors)
        if sources:
            drawn = drawings(sources, options.overlay) if options.overlay else {}
            net = open_net(options)
            with open_output(options.out) as write:
                failed += classify(net, sources, options, write, drawn)
    except (InputError, NetError) as fatal:
        sys.exit(f"classify: {fatal}")
    except OSError as fatal:
        reason = reason_in_full(fatal, options.out or "the results")
        elsewhere = " with another --overlay" if options.overlay else ""
        sys.exit(f"classify: {reason}. Fix the cause and run the same command again{elsewhere}")
    except KeyboardInterrupt:
        sys.exit(130)
    skipped = f"; {pluralize(others, 'other file', 'other files')} skipped" if others else ""
    report(f"{pluralize(len(sources) + len(errors), 'file', 'files')}, {failed} failed{skipped}")
    sys.exit(1 if failed else 0)


def report(message: object) -> None:
    print(f"classify: {message}", file=sys.stderr, flush=True)


def open_net(options: argparse.Namespace) -> Net:
    return open_export(options.net) if options.net else open_run(options.run, options.checkpoint == "best")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="picture, video, or folder of them")
    net = parser.add_mutually_exclusive_group(required=True)
    net.add_argument("--run", type=Path, metavar="DIR", help="run folder of the net")
    net.add_argument("--net", type=Path, metavar="FILE", help="exported net, .onnx or .pt2")
    add(
        "--checkpoint",
        choices=("newest", "best"),
        help="checkpoint of --run to use (default newest)",
    )
    add(
        "--crops",
        type=int,
        choices=(1, 10),
        default=1,
        help="number of crops: the centre crop (1, the default) or ten",
    )
    add(
        "--window",
        type=positive,
        default=1.0,
        metavar="SECONDS",
        help="length of video that one result averages over (default 1)",
    )
    add("--every", type=count, default=1, metavar="N", help="classify every Nth frame of a video (default 1)")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write results to this .jsonl or .csv file (default: readable lines on standard output)",
    )
    add(
        "--overlay",
        type=Path,
        metavar="DIR",
        help="write a copy of each picture and video with its classes drawn below it",
    )
    options = parser.parse_args()
    if options.out and options.out.suffix not in FORMATS:
        parser.error(f"--out {options.out}: its name must end in {' or '.join(FORMATS)}")
    if options.net and options.checkpoint:
        parser.error("--checkpoint is only for --run: an exported net has no checkpoints")
    return options


@contextmanager
def open_output(path: Path | None) -> Iterator[Write]:
    """Open the results: a file, or lines on standard output. Yields a function that writes one result."""
    if path is None:
        with printed():
            yield lambda result: print(result, flush=True)
        return
    with path_in_errors(path), open(path, "w", encoding="utf-8", newline="") as file:
        yield FORMATS[path.suffix](file)


def drawings(sources: list[Source], folder: Path) -> dict[Source, Path]:
    """Return the file that --overlay writes for each source.

    Raises InputError if one would overwrite another, or a file that exists.
    """
    drawn: dict[Source, Path] = {}
    taken = {source.path.resolve() for source in sources}
    for source in sources:
        ending = ".mp4" if source.is_video else ".jpg"
        path = folder / (source.name if source.name.endswith(ending) else source.name + ending)
        if path.resolve() in taken:
            raise InputError(
                f"--overlay {folder}: {path} would be written twice, or over an input: classify these files "
                "with commands of their own, or choose another folder"
            )
        if path.is_file():
            raise InputError(f"--overlay {folder}: {path} exists: delete it, or choose another folder")
        taken.add(path.resolve())
        drawn[source] = path
    return drawn


def classify(
    net: Net, sources: list[Source], options: argparse.Namespace, write: Write, drawn: dict[Source, Path]
) -> int:
    """Report and draw the results of all files; return how many files failed.

    The reason for each failure goes to standard error. Raises OSError if a result cannot be written, or if
    the storage of the inputs is unavailable.
    """
    failed = 0
    for work, of_videos in ((classify_pictures, False), (classify_videos, True)):
        chosen = [source for source in sources if source.is_video == of_videos]
        for error in work(net, chosen, options, write, drawn):
            report(error)
            failed += 1
    return failed


def classify_pictures(
    net: Net, sources: list[Source], options: argparse.Namespace, write: Write, drawn: dict[Source, Path]
) -> Iterator[InputError]:
    """Classify pictures in batches, yielding an error for each broken one."""
    if drawn:
        from tools.classifying.overlay import draw_bars, reduced, with_bars

    def prepare(source: Source) -> tuple[np.ndarray, Image.Image | None] | InputError:
        try:
            with errors_of(source.path):
                image = read(source.path)
                return views(image, net.spec, options.crops), reduced(image) if drawn else None
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(sources), CHUNK):
            part = sources[start : start + CHUNK]
            prepared = list(zip(part, pool.map(prepare, part), strict=True))
            yield from (found for _, found in prepared if isinstance(found, InputError))
            valid = [(source, *found) for source, found in prepared if not isinstance(found, InputError)]
            if not valid:
                continue
            probabilities = net.probabilities(np.stack([seen for _, seen, _ in valid]))
            for (source, _, image), row in zip(valid, probabilities, strict=True):
                result = Result(as_text(source.path), best(row, net.spec))
                write(result)
                if image:
                    try:
                        with errors_of(drawn[source]):
                            drawn[source].parent.mkdir(parents=True, exist_ok=True)
                            with_bars(image, draw_bars(result.top, image.width)).save(
                                drawn[source], quality=90
                            )
                    except InputError as error:
                        yield error


def classify_videos(
    net: Net, sources: list[Source], options: argparse.Namespace, write: Write, drawn: dict[Source, Path]
) -> Iterator[InputError]:
    """Classify videos, yielding an error for each broken one, after the results of its readable part."""
    if sources:
        from tools.classifying.video import annotate, classify_video
    for source in sources:
        results = []
        try:
            for result in classify_video(source.path, net, options.crops, options.window, options.every):
                write(result)
                results.append(result)
        except InputError as error:
            yield error
        if source not in drawn or not results:
            continue
        try:
            with errors_of(drawn[source]):
                drawn[source].parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(drawn[source]) as file:
                    annotate(source.path, results, file)
        except InputError as error:
            yield error


if __name__ == "__main__":
    main()
