"""Writing a trained net in each format, and comparing each file with the net after reading it back."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model.torchvision_alexnet import TorchvisionAlexNet, to_torchvision
from pipeline.files import atomic_write
from pipeline.spec import NET_NAME, NetSpec
from tools.classifying.nets import Net, NetError, open_onnx, open_pt2
from tools.importing.state_dicts import read_pth, read_safetensors
from trainer.evaluate import TrainedNet, load_trained
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.setting_groups import ALEXNET
from trainer.settings import Settings

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # relative to the largest logit: fp32 sums in a different order
IMAGES = 16  # validation images on which a file is compared with the net


def export(settings: Settings, run: Run, output: Path, best: bool = False) -> str:
    """Write a checkpoint's net to `output`; return a line that describes the file.

    Raises NetError, leaving no file, if the file does not compute what the net does; OSError; and whatever
    `load_trained` raises.
    """
    settings = settings.model_copy(update={"evaluation_batch": IMAGES})
    # On the CPU every operator of the net is one of torch's own.
    trained = load_trained(settings, run, CPU, best)
    trained.model.eval()
    with atomic_write(output) as file, warnings.catch_warnings(action="ignore", category=FutureWarning):
        checked = WRITERS[output.suffix](trained, run.net(settings), file)
    notes = [
        *trained.notes,
        f"{output}: {output.stat().st_size / 1e6:.0f} MB, step {trained.step}, {checked}",
    ]
    return "\n".join(notes)


def write_onnx(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    """Write and check a file, like the other WRITERS; return what the check found, in words."""
    try:
        import onnxruntime  # noqa: F401 – for the check
        import onnxscript  # noqa: F401 – torch.onnx needs it
    except ImportError as error:
        raise NetError(f"{error.name} is missing: pip install 'alexnet-train[export]'") from None
    # torch.onnx warns that torchvision's operators are missing, which the net does not use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        traced(trained), dynamo=True, input_names=["pixels"], output_names=["logits"], verbose=False
    )
    assert program is not None
    program.model.metadata_props[NET_NAME] = spec.model_dump_json()
    file.write(program.model_proto.SerializeToString())
    return compare(trained, spec, file, open_onnx)


def write_pt2(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    torch.export.save(traced(trained), file, extra_files={NET_NAME: spec.model_dump_json()})
    return compare(trained, spec, file, open_pt2)


def traced(trained: TrainedNet) -> torch.export.ExportedProgram:
    """Trace the net to torch's own operators, for any batch size."""
    crop, shapes = trained.settings.crop, {0: torch.export.Dim("batch")}
    model = trained.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        return torch.export.export(model, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=(shapes,))
    except Exception as error:  # it has many kinds
        if trained.settings.net == ALEXNET:
            raise
        reason = " ".join(str(error).split())[:200]
        raise NetError(f"torch.export cannot trace {trained.settings.net}: {reason}") from None


def compare(trained: TrainedNet, spec: NetSpec, file: BinaryIO, opened: Callable[[Path], Net]) -> str:
    """Read a file back and compare its logits, for several images and for one. Raises NetError."""
    file.flush()
    net = opened(Path(file.name))
    if net.spec != spec:
        raise NetError(f"the file's {NET_NAME} differs when it is read back")
    [pixels, _] = next(iter(trained.batches("val", 1, World(0, 1, 0, CPU))))
    pixels = pixels.contiguous().clone()
    with torch.inference_mode():
        expected = trained.model(pixels)
    found = torch.cat(
        [torch.from_numpy(net.logits(part.numpy())) for part in (pixels[:-1], pixels[-1:]) if len(part)]
    )
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # also if it is NaN
        raise NetError(
            f"the file's logits of {len(pixels)} validation images differ by {difference:.1e} of the "
            f"largest, and rounding explains no more than {TOLERANCE:.0e}; nothing was written"
        )
    return f"logits of {len(pixels)} validation images within {difference:.0e} of the largest"


def write_pth(trained: TrainedNet, _spec: NetSpec, file: BinaryIO) -> str:
    state = state_dict(trained)
    torch.save(state, file)
    return compare_state(state, file, read_pth)


def write_safetensors(trained: TrainedNet, spec: NetSpec, file: BinaryIO) -> str:
    try:
        from safetensors.torch import save
    except ImportError:
        raise NetError("safetensors is missing: pip install 'alexnet-train[export]'") from None
    state = state_dict(trained)
    file.write(save(state, {NET_NAME: spec.model_dump_json()}))
    return compare_state(state, file, read_safetensors)


def state_dict(trained: TrainedNet) -> dict[str, Tensor]:
    """Return the state dict of another net, or torchvision's. Raises NetError for the paper's net."""
    if trained.settings.net != ALEXNET:  # safetensors takes no tensor whose memory another one shares
        return {name: value.clone().contiguous() for name, value in trained.model.state_dict().items()}
    if not isinstance(trained.model, TorchvisionAlexNet):
        raise NetError(
            f"preset {trained.settings.preset} is not torchvision's AlexNet, which has other kernels and no "
            "response normalisation: export .onnx or .pt2 instead"
        )
    return to_torchvision(trained.model.state_dict())


def compare_state(state: dict[str, Tensor], file: BinaryIO, read: Callable[[Path], dict[str, Tensor]]) -> str:
    """Read a state dict back and compare it bit for bit. Raises NetError."""
    file.flush()
    found = read(Path(file.name))
    if state.keys() != found.keys() or not all(torch.equal(state[name], found[name]) for name in state):
        raise NetError("the file's state dict differs when it is read back")
    return "state dict equal bit for bit"


WRITERS = {".onnx": write_onnx, ".pt2": write_pt2, ".safetensors": write_safetensors, ".pth": write_pth}
