"""Turn torchvision's AlexNet weights into a run that can be evaluated, used and exported like any other run.

    alexnet-train import-torchvision alexnet-owt-7be5be79.pth --out runs/torchvision --data shards
    alexnet-train evaluate runs/torchvision
    alexnet-train export runs/torchvision --out alexnet.safetensors

FILE is a state dict as torchvision publishes it, .pth or .safetensors. Its outputs are the classes of the
dataset in --data, in the same order; ImageNet is packed in torchvision's own order. Without a dataset, use
--classes. The weights are kept bit for bit, and the run subtracts torchvision's mean, not the dataset's.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.documents import ContentError, read_text
from pipeline.files import path_in_errors
from pipeline.manifest import Class, DatasetError, read_manifest
from pipeline.output import secure
from pipeline.retry import read_with_retries
from pipeline.spec import NetSpec
from trainer.run import Run
from trainer.settings import Settings, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 256  # pixels of the shorter side, before the crop


def main() -> None:
    secure()
    options = parse_arguments()
    try:
        print(adopt(options.weights, Run(options.out), options.data, options.classes))
    except (SettingsError, DatasetError) as error:
        sys.exit(f"import-torchvision: {error}")
    except OSError as error:
        reason = f"{error.filename or options.out}: {error.strerror or error}"
        sys.exit(f"import-torchvision: {reason}. Fix the cause and run the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("weights", type=Path, metavar="FILE", help="torchvision's state dict, .pth or .safetensors")
    add("--out", type=Path, required=True, metavar="DIR", help="run folder to create")
    add(
        "--data",
        type=Path,
        default=Path("shards"),
        metavar="DIR",
        help="packed dataset that has the classes of the outputs, in the same order (default shards)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with the id and the name of a class on each line, to use instead of --data",
    )
    return parser.parse_args()


def adopt(weights: Path, run: Run, data: Path, classes: Path | None) -> str:
    """Create the run; return a line that describes it. classes: a file that replaces the dataset's classes.

    Raises SettingsError, DatasetError or OSError.
    """
    # Without a folder for temporary files this import fails, and main() reports it in one line.
    from model.torchvision_alexnet import INPUT_MEAN, from_torchvision
    from trainer import checkpoint

    try:
        state = from_torchvision(read_state(weights))
    except ValueError as error:
        raise SettingsError(f"{weights} is not a state dict of torchvision's AlexNet: {error}") from None
    outputs = len(state["fc8.bias"])
    named = read_classes(classes) if classes else read_manifest(data).classes
    if len(named) != outputs:
        raise SettingsError(f"{weights} has {outputs} classes and {classes or data} has {len(named)}")
    settings = Settings.model_validate(
        {"preset": "torchvision", "dropout": "inverted", "out": run.folder, "data": data}
    )
    spec = NetSpec(geometry="256", size=SIZE, crop=settings.crop, mean=INPUT_MEAN, classes=named)
    run.adopt(settings, spec, origin=f"of {weights.name}")
    checkpoint.write(run.checkpoints, 0, {"step": 0, "model": state}, keep=1, best=True)
    return f"{run.folder}: {outputs} classes, {sum(value.numel() for value in state.values()):,} parameters"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict in the format that the file's content, not its extension, indicates.

    Raises SettingsError, ValueError or OSError.
    """
    head = read_with_retries(path, 9)
    if not head:
        raise ValueError("it is empty")
    is_safetensors = head[8:] == b"{"  # the start of the header in JSON, after its size in 8 bytes
    return read_safetensors(path) if is_safetensors else read_pth(path)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file. Raises ValueError or OSError."""
    import torch

    try:
        # Given a path, torch would decide by its extension.
        with path_in_errors(path), open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch raises any class for a file that torch.save did not write
        raise ValueError("it is damaged, or holds something other than tensors") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError("it is not a dict of tensors")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict in safetensors format. Raises SettingsError, ValueError or OSError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise SettingsError(f"{path} needs safetensors: pip install 'alexnet-train[export]'") from None
    try:
        with path_in_errors(path):
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


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
