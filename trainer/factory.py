"""Make the net that --net names as module:factory, and check at the start of a run that it can be trained."""

import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.messages import join_names, one_line
from pipeline.names import ROOT
from trainer.optim import layers_of
from trainer.settings import Settings, SettingsError

# They hide modules of the same name. In a wheel, only alexnet_train lies at the top.
_OWN_PACKAGES = ("model", "pipeline", "tools", "trainer") if not ROOT else (ROOT.strip("."),)
_DIVISOR = "_divisor_of_alexnet_train"  # the buffer of a net that holds --pixel-std


def make_net(settings: Settings, classes: int) -> nn.Module:
    """Call the factory with the number of classes. The net that it returns divides its input by --pixel-std.

    Raises SettingsError if there is no such factory, if it raises an error, or if it returns no module.
    """
    module, _, name = settings.net.partition(":")
    factory = _find(module, name)
    try:
        net = factory(classes)
    except Exception as error:
        raise SettingsError(f"--net {settings.net} cannot make a net: {_reason(error, module)}") from None
    if not isinstance(net, nn.Module):
        raise SettingsError(
            f"--net {settings.net} returns {_kind(net)}: it must return a torch.nn.Module when it is called "
            "with the number of classes"
        )
    if hasattr(net, _DIVISOR):
        raise SettingsError(
            f"--net {settings.net} returns the same net again: it must create a new one at each call"
        )
    # A hook leaves the names of the weights as they are, and a traced net contains it.
    net.register_buffer(_DIVISOR, torch.tensor(settings.pixel_std).view(1, 3, 1, 1), persistent=False)
    net.register_forward_pre_hook(_divide)
    return net


def _divide(net: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    [pixels] = inputs
    return pixels / net.get_buffer(_DIVISOR)


def _find(module: str, name: str) -> Callable[[int], object]:
    """Import a module as `python -m` would, and return a callable in it. Raises SettingsError."""
    top, folder = module.partition(".")[0], str(Path.cwd())
    if top in _OWN_PACKAGES:
        raise SettingsError(f"--net {module}:{name}: alexnet-train has its own {top}; rename your module")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:
        where = f"start in the folder that holds {top}, or add that folder to PYTHONPATH"
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        advice = f"; {where}" if missing else ""
        raise SettingsError(
            f"--net {module}:{name} cannot be imported: {_reason(error, module)}{advice}"
        ) from None
    if not callable(found):
        problem = f"has no {name}" if found is None else f"has a {name} that cannot be called"
        raise SettingsError(f"--net {module}:{name}: {sys.modules[module].__file__} {problem}")
    return found


def check_net(settings: Settings, classes: int) -> None:
    """Check, on the CPU, that the net and the settings suit each other and training.

    Raises SettingsError if --layer-learning-rates names a layer that the net does not have, if the weights
    are not fp32, if two images in channels_last format do not give floating-point outputs [2,classes] in
    training and in evaluation, or if no gradient reaches a weight that requires one.
    """
    torch.manual_seed(settings.seed)
    net, label = make_net(settings, classes), f"--net {settings.net}"
    _check_weights(net, label)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check_layers(net, settings)
    pixels = 60 * torch.randn(2, 3, settings.crop, settings.crop)  # as varied as those of photos
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    net.eval()
    _outputs(net, pixels, classes, label, "evaluation")
    net.train()
    _check_gradients(net, _outputs(net, pixels, classes, label, "training"), label)


def _outputs(net: nn.Module, pixels: Tensor, classes: int, label: str, mode: str) -> Tensor:
    """Return the outputs for pixels [n,3,crop,crop]. Raises SettingsError unless they can be logits."""
    try:
        outputs = net(pixels)
    except Exception as error:
        reason = _reason(error, label.removeprefix("--net ").partition(":")[0])
        raise SettingsError(
            f"{label} fails in {mode} with pixels {list(pixels.shape)} in channels_last format: {reason}"
        ) from None
    expected = [len(pixels), classes]
    if not isinstance(outputs, Tensor) or list(outputs.shape) != expected:
        raise SettingsError(
            f"{label} returns {_kind(outputs)} in {mode} for {len(pixels)} images and {classes} classes: it "
            f"must return a tensor of shape {expected}"
        )
    if not outputs.is_floating_point():
        raise SettingsError(f"{label} returns {outputs.dtype}: it must return floating-point numbers")
    return outputs


def _check_weights(net: nn.Module, label: str) -> None:
    parameters = dict(net.named_parameters())
    if any(isinstance(value, nn.parameter.UninitializedParameter) for value in parameters.values()):
        raise SettingsError(
            f"{label} has layers without a size: call the net on a batch before the factory returns it"
        )
    if wrong := [name for name, value in parameters.items() if value.dtype != torch.float32]:
        raise SettingsError(
            f"{label} has weights that are not fp32: {join_names(wrong)}. Create it in fp32, and choose the "
            "precision of training with --precision"
        )
    if not any(value.requires_grad for value in parameters.values()):
        raise SettingsError(f"{label} has no weights that require a gradient, so it cannot be trained")


def _check_layers(net: nn.Module, settings: Settings) -> None:
    known = dict.fromkeys(layer for name, _ in net.named_parameters() for layer in layers_of(name))
    wanted = (key.partition("@")[0] for key in settings.layer_learning_rates)
    if unknown := [layer for layer in wanted if layer not in known]:
        outermost = [layer for layer in known if "." not in layer]
        raise SettingsError(
            f"--layer-learning-rates: --net {settings.net} has no weights in {', '.join(unknown)}; "
            f"its layers are {', '.join(outermost)} and those in them"
        )


def _check_gradients(net: nn.Module, outputs: Tensor, label: str) -> None:
    if outputs.requires_grad:
        outputs.float().square().sum().backward()
    missed = [name for name, value in net.named_parameters() if value.requires_grad and value.grad is None]
    if missed:
        raise SettingsError(
            f"{label}: no gradient reaches {join_names(missed)}. Use these weights in forward(), or set "
            "their requires_grad to False"
        )


def _kind(value: object) -> str:
    """Describe a value by its shape, if it is a tensor, or by its type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _reason(error: BaseException, module: str) -> str:
    """Return an error in one line, with the line of the module that raised it, if that is known."""
    path = getattr(sys.modules.get(module), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" ({path}, line {lines[-1]})" if lines else ""
    return one_line(error) + where
