"""Export a trained net for use without this project.

    alexnet-train export runs/a --out net.onnx
    alexnet-train export runs/a --out net.pt2 --checkpoint best

The extension of --out chooses the format:

    .onnx          for ONNX Runtime and other ONNX readers
    .pt2           torch.export, for PyTorch; opening such a file can run code, so accept none from strangers
    .safetensors,  torchvision's state dict, for a run made by `alexnet-train import-torchvision`
    .pth

The first two map `pixels` [N,3,crop,crop], for any N, to `logits` [N,classes], in fp32 as in evaluation. They
carry `net.json`, in the ONNX file's metadata_props or in the .pt2 file's extra_files; it says how a picture
becomes pixels and what the classes are (see pipeline/spec.py).

Each file is read back before it gets its name. Its logits of validation images must differ from the
checkpoint's by at most 0.0001 of the largest logit; a state dict must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import atomic_write
from pipeline.manifest import DatasetError
from pipeline.output import secure
from pipeline.spec import NET_NAME, NetSpec
from tools.classifying.nets import Net, NetError, open_onnx, open_pt2
from tools.import_torchvision import read_pth, read_safetensors
from tools.options import refuse_old_name
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError

# torch and the modules that need it are imported by the functions that use them: help does not wait for them,
# and their errors (torch needs a folder for temporary files) become one line.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.evaluate import TrainedNet

TOLERANCE = 1e-4  # relative to the largest logit: fp32 sums in a different order
IMAGES = 16  # validation images on which the two are compared


class ExportError(ValueError):
    """A net that cannot be exported; the message says why."""


def main() -> None:
    secure()
    options = parse_arguments()
    run = Run(options.run)
    try:
        settings = run.settings().model_copy(update={"evaluation_batch": IMAGES})
        if options.data:
            settings = settings.model_copy(update={"data": options.data})
        print(export(settings, run, options.out, options.checkpoint == "best"))
    except (ExportError, NetError, SettingsError, DatasetError, RunError) as error:
        sys.exit(f"export: {error}")
    except OSError as error:
        reason = f"{error.filename or options.out}: {error.strerror or error}"
        sys.exit(f"export: {reason}. Fix the cause and run the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"file to write; its extension, one of {', '.join(FORMS)}, chooses the format",
    )
    refuse_old_name(parser, "--output", "--out")
    add(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="checkpoint to export (default newest)",
    )
    add("--data", type=Path, metavar="DIR", help="the run's dataset, if it has moved")
    options = parser.parse_args()
    if options.out.suffix not in FORMS:
        parser.error(f"--out {options.out}: its name must end in one of {', '.join(FORMS)}")
    return options


def export(settings: Settings, run: Run, output: Path, best: bool = False) -> str:
    """Write a checkpoint's net to `output`; return a line that describes the file.

    Raises ExportError, leaving no file, if the file does not compute what the net does; OSError; and whatever
    `load_trained` raises.
    """
    import torch

    from trainer.evaluate import load_trained

    # On the CPU, where every operator is one of torch's own.
    trained = load_trained(settings, run, torch.device("cpu"), best)
    trained.model.eval()
    with atomic_write(output) as file, warnings.catch_warnings(action="ignore", category=FutureWarning):
        found = FORMS[output.suffix](trained, run.net(settings), file)
    notes = [*trained.notes, f"{output}: {output.stat().st_size / 1e6:.0f} MB, step {trained.step}, {found}"]
    return "\n".join(notes)


def write_onnx(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    try:
        import onnxruntime  # noqa: F401 – for the check
        import onnxscript  # noqa: F401 – torch.onnx needs it
        import torch
    except ImportError as error:
        raise ExportError(f"{error.name} is missing: pip install 'alexnet-train[export]'") from None
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it warns of torchvision's operators, which the net does not use
    program = torch.onnx.export(
        traced(trained), dynamo=True, input_names=["pixels"], output_names=["logits"], verbose=False
    )
    assert program is not None
    program.model.metadata_props[NET_NAME] = spec.model_dump_json()
    file.write(program.model_proto.SerializeToString())
    return compare(trained, spec, file, open_onnx)


def write_pt2(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    import torch

    torch.export.save(traced(trained), file, extra_files={NET_NAME: spec.model_dump_json()})
    return compare(trained, spec, file, open_pt2)


def traced(trained: TrainedNet) -> torch.export.ExportedProgram:
    """Trace the net to torch's own operators, for any batch size."""
    import torch

    crop, shapes = trained.settings.crop, {"x": {0: torch.export.Dim("batch")}}
    model = trained.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.export.export(model, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=shapes)


def compare(trained: TrainedNet, spec: NetSpec, file: BinaryIO, opened: Callable[[Path], Net]) -> str:
    """Read a file back and compare its logits, for several images and for one. Raises ExportError."""
    import torch

    from trainer.processes.distributed import World

    file.flush()
    net = opened(Path(file.name))
    if net.spec != spec:
        raise ExportError(f"its {NET_NAME} differs when it is read back")
    pixels = (
        next(iter(trained.batches("val", 1, World(0, 1, 0, torch.device("cpu")))))[0].contiguous().clone()
    )
    with torch.inference_mode():
        expected = trained.model(pixels)
    found = torch.cat(
        [torch.from_numpy(net.logits(part.numpy())) for part in (pixels[:-1], pixels[-1:]) if len(part)]
    )
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # nor NaN
        raise ExportError(
            f"its logits of {len(pixels)} validation images differ by {difference:.1e} of the largest, more "
            f"than the {TOLERANCE:.0e} that rounding explains; nothing was written"
        )
    return f"logits of {len(pixels)} validation images within {difference:.0e} of the largest"


def write_pth(trained: TrainedNet, _spec: NetSpec, file: BinaryIO) -> str:
    import torch

    state = torchvision_state(trained)
    torch.save(state, file)
    return compare_state(state, file, read_pth)


def write_safetensors(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ExportError("safetensors is missing: pip install 'alexnet-train[export]'") from None
    state = torchvision_state(trained)
    file.write(save(state, {NET_NAME: spec.model_dump_json()}))
    return compare_state(state, file, read_safetensors)


def torchvision_state(trained: TrainedNet) -> dict[str, Tensor]:
    from model.torchvision_alexnet import TorchvisionAlexNet, to_torchvision

    if not isinstance(trained.model, TorchvisionAlexNet):
        raise ExportError(
            f"torchvision's AlexNet is another net than preset {trained.settings.preset}, with other "
            "kernels and no response normalisation: export .onnx or .pt2 instead"
        )
    return to_torchvision(trained.model.state_dict())


def compare_state(state: dict[str, Tensor], file: BinaryIO, read: Callable[[Path], dict[str, Tensor]]) -> str:
    """Read a state dict back and compare it bit for bit. Raises ExportError."""
    import torch

    file.flush()
    found = read(Path(file.name))
    if state.keys() != found.keys() or not all(torch.equal(state[name], found[name]) for name in state):
        raise ExportError("its state dict differs when it is read back")
    return "state dict equal bit for bit"


FORMS = {".onnx": write_onnx, ".pt2": write_pt2, ".safetensors": write_safetensors, ".pth": write_pth}


if __name__ == "__main__":
    main()
