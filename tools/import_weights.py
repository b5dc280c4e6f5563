"""Turn weights that were published elsewhere into a run, to evaluate, use, export or fine-tune it.

    alexnet-train import-weights alexnet-owt-7be5be79.pth --out runs/torchvision --data shards
    alexnet-train import-weights bvlcalexnet-12.onnx --out runs/bvlc --data shards
    alexnet-train evaluate runs/bvlc

FILE holds one of these nets:

    .pth, .safetensors  torchvision's AlexNet, as a state dict that torchvision publishes
    .onnx               Caffe's bvlc_alexnet, as in the ONNX model zoo

Its outputs are the classes of the dataset in --data, in the same order; ImageNet is packed in the order that
both nets have. Without a dataset, use --classes. torchvision's weights are kept bit for bit. Those of Caffe's
net are reordered for RGB, and accepted if the logits of random pixels are those that ONNX Runtime computes.
The run subtracts the mean that belongs to the net, not the dataset's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.documents import ContentError, read_text
from pipeline.locations import Location, location_of
from pipeline.manifest import RGB, Class, DatasetError, read_manifest
from pipeline.output import secure
from pipeline.remote_errors import reason_in_full, redact
from pipeline.spec import NetSpec
from tools.options import command_parser
from trainer.run import Run
from trainer.settings import SettingsError, validated

if TYPE_CHECKING:
    from torch import Tensor

SIZE, CROP = 256, 224  # pixels: of the shorter side, and of torchvision's crop of it


def main() -> None:
    secure()
    options = parse_arguments()
    try:
        print(adopt(options.weights, Run(options.out), options.data, options.classes))
    except (SettingsError, DatasetError) as error:
        sys.exit(f"import-weights: {error}")
    except OSError as error:
        reason = reason_in_full(error, options.out)
        sys.exit(f"import-weights: {reason}. Fix the cause and run the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("weights", type=Path, metavar="FILE", help="weights, .pth, .safetensors or .onnx")
    add("--out", type=Path, required=True, metavar="DIR", help="run folder to create")
    add(
        "--data",
        type=location_of,
        default=Path("shards"),
        metavar="DIR",
        help="folder or URL of the packed dataset that has the classes of the outputs, in the same order "
        "(default shards)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with the id and the name of a class on each line, to use instead of --data",
    )
    return parser.parse_args()


def adopt(weights: Path, run: Run, data: Location, classes: Path | None) -> str:
    """Create the run; return a line that describes it. classes: a file that replaces the dataset's classes.

    Raises SettingsError, DatasetError or OSError.
    """
    # Without a folder for temporary files this import fails, and main() reports it in one line.
    from trainer import checkpoint

    read = _read_caffe if weights.suffix == ".onnx" else _read_torchvision
    net = read(weights)
    outputs = len(net.state["fc8.bias"])
    named = read_classes(classes) if classes else read_manifest(data).classes
    if len(named) != outputs:
        raise SettingsError(f"{weights} has {outputs} classes and {redact(classes or data)} has {len(named)}")
    given = {"preset": net.preset, "dropout": "inverted", "crop": net.crop, "out": run.folder, "data": data}
    spec = NetSpec(geometry="256", size=SIZE, crop=net.crop, mean=net.mean, classes=named)
    run.adopt(validated(given), spec, origin=f"of {weights.name}")
    try:
        checkpoint.write(run.checkpoints, 0, {"step": 0, "model": net.state}, keep=1, best=True)
    except BaseException:
        shutil.rmtree(run.folder, ignore_errors=True)  # it was empty, and would be refused next time
        raise
    parameters = sum(value.numel() for value in net.state.values())
    return f"{run.folder}: {outputs} classes, {parameters:,} parameters"


class Published(NamedTuple):
    """A published net: its preset, weights, crop in pixels and mean, RGB on the 0–255 scale."""

    preset: str
    state: dict[str, Tensor]
    crop: int
    mean: RGB


def _read_torchvision(path: Path) -> Published:
    from model.torchvision_alexnet import INPUT_MEAN, from_torchvision
    from tools.importing.state_dicts import read_state

    try:
        return Published("torchvision", from_torchvision(read_state(path)), CROP, INPUT_MEAN)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{path} is not a state dict of torchvision's AlexNet: {error}") from None


def _read_caffe(path: Path) -> Published:
    from model.bvlc_alexnet import INPUT_MEAN
    from tools.importing.caffe_onnx import read_caffe

    try:
        return Published("bvlc", *read_caffe(path), INPUT_MEAN)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{path} is not Caffe's AlexNet in ONNX: {error}") from None


def read_classes(path: Path) -> tuple[Class, ...]:
    """Read the ids and names of classes from a UTF-8 file, in which blank lines are ignored.

    Raises OSError, or SettingsError if a line has no name or an id is repeated.
    """
    try:
        lines = StringIO(read_text(path), newline=None)
    except ContentError as error:
        raise SettingsError(str(error)) from None
    classes: dict[str, Class] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        id_, *names = line.split(maxsplit=1)
        if not names:
            raise SettingsError(f"{path}, line {number}: it must have an id, white space and a name")
        if id_ in classes:
            raise SettingsError(f"{path}, line {number}: the id {id_} is on an earlier line as well")
        classes[id_] = Class(id=id_, name=names[0].strip())
    return tuple(classes.values())


if __name__ == "__main__":
    main()
