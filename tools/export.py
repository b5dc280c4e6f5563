"""Export a trained net, to be used without this project.

    python tools/export.py runs/a --output net.onnx
    python tools/export.py runs/a --output net.pt2 --checkpoint best

    .onnx          for ONNX Runtime and others
    .pt2           torch.export, for PyTorch alone; opening one can run code, so take none from strangers
    .safetensors,  torchvision's state dict, of a run of tools/import_torchvision.py
    .pth

The first two map `pixels` [N,3,crop,crop], for any N, to `logits` [N,classes], in fp32 as in evaluation.
`net.json`, in the ONNX file's metadata_props or the other's extra_files, says how a picture becomes pixels
and what the classes are: pipeline/spec.py. A file gets its name only once it was read back, and its logits of
validation images differ from the checkpoint's by at most 0.0001 of the largest; a state dict, once it is
equal bit for bit.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import whole_file
from pipeline.manifest import DatasetError
from pipeline.spec import NAME, NetSpec
from tools.classifying.nets import Net, NetError, open_onnx, open_pt2
from tools.import_torchvision import read_pth, read_safetensors
from trainer.processes.distributed import World
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError

# The model's modules are imported where an error can be told: torch needs a folder for temporary files then.
if TYPE_CHECKING:
    from trainer.evaluate import TrainedNet

TOLERANCE = 1e-4  # of the largest logit: other orders of summing in fp32
IMAGES = 16  # of the validation set, on which the two are compared
CPU = World(0, 1, 0, torch.device("cpu"))  # where all operators are plain ones


class ExportError(ValueError):
    """A net that cannot be exported; the message says why."""


def main() -> None:
    options = parse_arguments()
    run = Run(options.run)
    try:
        settings = run.settings().model_copy(update={"evaluation_batch": IMAGES})
        if options.data:
            settings = settings.model_copy(update={"data": options.data})
        print(export(settings, run, options.output, options.checkpoint == "best"))
    except (ExportError, NetError, SettingsError, DatasetError, RunError) as error:
        sys.exit(f"export: {error}")
    except OSError as error:
        reason = f"{error.filename or options.output}: {error.strerror or error}"
        sys.exit(f"export: {reason}: mend the cause and give the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--output", type=Path, required=True, metavar="FILE", help=f"by its form: {', '.join(FORMS)}")
    add("--checkpoint", choices=("newest", "best"), default="newest", help="default newest")
    add("--data", type=Path, metavar="DIR", help="the run's dataset, if it is not where it was")
    options = parser.parse_args()
    if options.output.suffix not in FORMS:
        parser.error(f"--output {options.output}: its name must end in {', '.join(FORMS)}")
    return options


def export(settings: Settings, run: Run, output: Path, best: bool = False) -> str:
    """Write a checkpoint's net; returns a line about it.

    Raises ExportError where the file does not compute what the net does, after which nothing is left of it,
    OSError, and what `load_trained` does.
    """
    from trainer.evaluate import load_trained

    trained = load_trained(settings, run, CPU.device, best)
    trained.model.eval()
    with whole_file(output) as file, warnings.catch_warnings(action="ignore", category=FutureWarning):
        found = FORMS[output.suffix](trained, run.net(settings), file)
    notes = [*trained.notes, f"{output}: {output.stat().st_size / 1e6:.0f} MB, step {trained.step}, {found}"]
    return "\n".join(notes)


def write_onnx(trained: "TrainedNet", spec: NetSpec, file: BinaryIO) -> str:
    try:
        import onnxruntime  # noqa: F401 – for the check
        import onnxscript  # noqa: F401 – torch.onnx needs it
    except ImportError as error:
        raise ExportError(f"{error.name} is missing: pip install 'alexnet-train[export]'") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision's operators, which none needs
    program = torch.onnx.export(
        traced(trained), dynamo=True, input_names=["pixels"], output_names=["logits"], verbose=False
    )
    assert program is not None
    program.model.metadata_props[NAME] = spec.model_dump_json()
    file.write(program.model_proto.SerializeToString())
    return compare(trained, spec, file, open_onnx)


def write_pt2(trained: "TrainedNet", spec: NetSpec, file: BinaryIO) -> str:
    torch.export.save(traced(trained), file, extra_files={NAME: spec.model_dump_json()})
    return compare(trained, spec, file, open_pt2)


def traced(trained: "TrainedNet") -> torch.export.ExportedProgram:
    """The net as torch's own operators, for any number of images."""
    crop, shapes = trained.settings.crop, {"x": {0: torch.export.Dim("batch")}}
    model = trained.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.export.export(model, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=shapes)


def compare(trained: "TrainedNet", spec: NetSpec, file: BinaryIO, opened: Callable[[Path], Net]) -> str:
    """Read a file back and compare logits, for several images and for one. Raises ExportError."""
    file.flush()
    net = opened(Path(file.name))
    if net.spec != spec:
        raise ExportError(f"its {NAME} reads back other than it was written")
    pixels = next(iter(trained.batches("val", 1, CPU)))[0].contiguous().clone()
    with torch.inference_mode():
        expected = trained.model(pixels)
    found = torch.cat(
        [torch.from_numpy(net.logits(part.numpy())) for part in (pixels[:-1], pixels[-1:]) if len(part)]
    )
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # nor NaN
        raise ExportError(
            f"its logits of {len(pixels)} validation images differ by {difference:.1e} of the largest, more "
            f"than the {TOLERANCE:.0e} that rounding explains: nothing was written"
        )
    return f"logits of {len(pixels)} validation images within {difference:.0e} of the largest"


def write_pth(trained: "TrainedNet", _spec: NetSpec, file: BinaryIO) -> str:
    state = torchvision_state(trained)
    torch.save(state, file)
    return compare_state(state, file, read_pth)


def write_safetensors(trained: "TrainedNet", spec: NetSpec, file: BinaryIO) -> str:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ExportError("safetensors is missing: pip install 'alexnet-train[export]'") from None
    state = torchvision_state(trained)
    file.write(save(state, {NAME: spec.model_dump_json()}))
    return compare_state(state, file, read_safetensors)


def torchvision_state(trained: "TrainedNet") -> dict[str, Tensor]:
    from model.torchvision_alexnet import TorchvisionAlexNet, to_torchvision

    if not isinstance(trained.model, TorchvisionAlexNet):
        raise ExportError(
            f"torchvision's alexnet is another net than preset {trained.settings.preset}, with other kernels "
            "and no response normalisation, so that no state dict of it fits: export .onnx or .pt2"
        )
    return to_torchvision(trained.model.state_dict())


def compare_state(state: dict[str, Tensor], file: BinaryIO, read: Callable[[Path], dict[str, Tensor]]) -> str:
    """Read a file back and compare its bits. Raises ExportError."""
    file.flush()
    found = read(Path(file.name))
    if state.keys() != found.keys() or not all(torch.equal(state[name], found[name]) for name in state):
        raise ExportError("its state dict reads back other than it was written")
    return "state dict equal bit for bit"


FORMS = {".onnx": write_onnx, ".pt2": write_pt2, ".safetensors": write_safetensors, ".pth": write_pth}


if __name__ == "__main__":
    main()
