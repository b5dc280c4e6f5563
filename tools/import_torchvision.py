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
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
        read = read_safetensors if weights.suffix == ".safetensors" else read_pth
        state = from_torchvision(read(weights))
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


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file. Raises ValueError or OSError."""
    import torch

    try:
        with path_in_errors(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
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
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def read_classes(path: Path) -> tuple[Class, ...]:
    """Read the ids and names of classes. Raises OSError, or SettingsError if a line has no name."""
    lines = [line.split(maxsplit=1) for line in read_with_retries(path).decode().splitlines()]
    if any(len(line) != 2 for line in lines):
        raise SettingsError(f"{path}: each line must have an id, white space and a name")
    return tuple(Class(id=id_, name=name.strip()) for id_, name in lines)


if __name__ == "__main__":
    main()
