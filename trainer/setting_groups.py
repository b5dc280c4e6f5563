"""Define every setting of a run with its type, default and help text, in the groups that --help shows.

The types `MayChange`, `PaperOnly`, `AlexNetOnly` and `OtherNets` mark settings that have a rule in common,
and `Metavar` sets what --help shows in place of a value. trainer/settings.py collects the groups and applies
the rules.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_settings import NoDecode

from pipeline.locations import Location, location_of
from pipeline.remote.options import parse_size


@dataclass(frozen=True)
class Metavar:
    """What --help shows in place of a setting's value."""

    text: str


_T = TypeVar("_T")
MAY_CHANGE, PAPER_ONLY, ALEXNET_ONLY, OTHER_NETS = object(), object(), object(), object()
# A setting that may change when a run is continued, because it does not define what the run computes.
MayChange = Annotated[_T, MAY_CHANGE]
# A setting that changes the paper's net, and so cannot be combined with the other presets or with --net.
PaperOnly = Annotated[_T, PAPER_ONLY]
# A setting of AlexNet that cannot be combined with --net.
AlexNetOnly = Annotated[_T, ALEXNET_ONLY]
# A setting that can only be combined with --net.
OtherNets = Annotated[_T, OTHER_NETS]

ALEXNET = "alexnet"  # the default of --net
FIXED = ("torchvision", "bvlc")  # presets that PaperOnly settings cannot change
_MIN_CROP = 64  # of AlexNet: a smaller crop leaves no pixels for fc6


def _net_from(name: str) -> str:
    """Check the name of a net: ALEXNET, or a module and a factory in it."""
    if name != ALEXNET and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError(f"input should be {ALEXNET}, or a module and a function in it, such as nets:resnet")
    return name


def _is_alexnet(settings: ValidationInfo) -> bool:
    """Return whether the net is AlexNet; --initial-net leaves that open until trainer/initial.py names it."""
    return settings.data.get("net") == ALEXNET and not settings.data.get("initial_net")


def _layer_from(key: str, settings: ValidationInfo) -> str:
    """Check the name of a layer that may be followed by @ and an epoch.

    The layers of another net than AlexNet are not known yet; trainer/factory.py compares the names with them.
    """
    layer = r"(conv[1-6]|fc[678])" if _is_alexnet(settings) else r"\w+(\.\w+)*"
    if not re.fullmatch(rf"{layer}(@\d+(\.\d+)?)?", key):
        raise ValueError("input should be a layer, such as conv1, or a layer and an epoch, such as conv1@5")
    return key


def _crop_of(side: int, settings: ValidationInfo) -> int:
    """Check that a crop is large enough for the net."""
    if _is_alexnet(settings) and side < _MIN_CROP:
        raise ValueError(f"input should be greater than or equal to {_MIN_CROP}")
    return side


def _location(value: object) -> object:
    return location_of(value) if isinstance(value, str) else value


def _bytes_of(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


# The upper limits keep every number within what torch, DALI and the system's clocks can represent.
_MAX = 2**31 - 1
PositiveInt = Annotated[int, Field(ge=1, le=_MAX)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX)]
PositiveFloat = Annotated[float, Field(gt=0, le=_MAX)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_MAX)]
Workers = Annotated[int, Field(ge=1, le=1024)]  # number of processes, threads or prefetched batches
Fraction = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[PositiveFloat, Metavar("FACTOR")]
LayerFrom = Annotated[str, AfterValidator(_layer_from)]
_Intensity = Annotated[float, Field(ge=0, le=255)]
_RGB = tuple[_Intensity, _Intensity, _Intensity]
_PositiveRGB = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
_Data = Annotated[Location, BeforeValidator(_location), Metavar("DIR | URL | DIR=WEIGHT,…")]
_Size = Annotated[int | None, BeforeValidator(_bytes_of), Metavar("SIZE")]
Form = Literal["grouped", "grouped-s2d", "towers", "towers-s2d", "block-diagonal", "block-diagonal-s2d"]


class Group(BaseModel):
    """Base class of groups of settings; --help shows the docstring of a group as its title."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, defer_build=True)


class DataAndRun(Group):
    """Data and run"""

    data: MayChange[_Data] = Path("shards")
    """Folder or URL of the packed dataset, or several with the same classes, such as
    photos=0.7,drawings=0.3. An epoch has as many images as all of them together, shared among the datasets
    in proportion to these weights; the first one is used for validation."""
    cache: MayChange[Path | None] = None
    """Folder for the shards of a dataset behind a URL, which all processes of a machine share; by default, a
    folder in the user's cache."""
    cache_size: MayChange[_Size] = None
    """How large the cache may become, such as 200GB; by default, nine tenths of the disk's free space."""
    out: MayChange[Path | None] = None
    """Folder of the run, by default runs/RECIPE. If it already holds this run, the run continues."""
    recipe: MayChange[Annotated[str, Metavar("RECIPE")]] = "paper"
    """Name of a recipe, or path of a TOML file with settings."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed for the initial weights, the order of the images, augmentation and dropout."""


class Net(Group):
    """Net"""

    net: Annotated[str, AfterValidator(_net_from), Metavar("MODULE:FACTORY")] = ALEXNET
    """Net to train: alexnet, or a factory in a Python module, found as `python -m` would find it, that takes
    the number of classes and returns a torch.nn.Module."""
    initial_net: bool = False
    """Train the net of the run in --initial-weights: settings of this group that are not given, and the mean,
    are those of that run."""
    preset: AlexNetOnly[Literal["paper", "code2012", "torchvision", "bvlc"]] = "paper"
    """Which AlexNet to train: paper follows the paper's text, code2012 the code that produced the paper's
    numbers, and torchvision and bvlc are torchvision's and Caffe's AlexNet, which differ from both."""
    dropout: AlexNetOnly[Literal["2012", "inverted", "off"]] = "2012"
    """Kind of dropout: 2012 halves the units at test time, inverted doubles them during training, off has
    none."""
    activation: PaperOnly[Literal["relu", "tanh"]] = "relu"
    """Activation function after every layer but the last."""
    lrn: PaperOnly[bool] = True
    """Apply local response normalisation after the first two convolutions."""
    overlapping_pooling: PaperOnly[bool] = True
    """Pool over overlapping windows, 3 pixels wide with a stride of 2; otherwise, they are 2 pixels wide."""
    released_pooling: PaperOnly[bool] = False
    """With --no-overlapping-pooling, pad conv2 and conv5 by one pixel less, and round the number of windows
    up, as in layers-147 of the paper's code."""
    towers: PaperOnly[Annotated[int, Field(ge=1, le=2)]] = 2
    """Number of towers: 2, or 1 for the half-size net that the paper trained on one GPU."""
    conv6: PaperOnly[bool] = False
    """Add a sixth convolution after the last pooling layer, as in the paper's CNN*."""
    without: PaperOnly[Literal["none", "conv2", "conv3", "conv4", "conv5"]] = "none"
    """Convolution to leave out of the net."""
    width: PaperOnly[Annotated[float, Field(gt=0, le=16), Metavar("FACTOR")]] = 1.0
    """Factor by which the number of kernels and units of each layer but the last is multiplied."""
    initial_biases: PaperOnly[Literal["paper", "zeros"]] = "paper"
    """Initial biases: as in the paper, which sets those of some layers to 1 if the activation is relu, or all
    0."""
    crop: Annotated[PositiveInt, AfterValidator(_crop_of), Metavar("PIXELS")] = 224
    """Side of the net's square input in pixels."""
    pixel_mean: Annotated[_RGB | None, NoDecode, Metavar("R,G,B")] = None
    """Mean that is subtracted from pixels, on the 0–255 scale; by default, that of the training images."""
    pixel_std: OtherNets[Annotated[_PositiveRGB, NoDecode, Metavar("R,G,B")]] = (58.395, 57.12, 57.375)
    """Standard deviation by which another net's input is divided after that, on the 0–255 scale; by default,
    that of ImageNet in torchvision. AlexNet's input is not divided: its initial weights are for 0–255."""


class BatchesAndAugmentation(Group):
    """Batches and augmentation"""

    batch: PositiveInt = 128
    """Batch size of a training step, over all processes together."""
    crops_and_flips: bool = True
    """Train on random crops, half of them mirrored; otherwise, train on centre crops."""
    crop_chunk: PositiveInt = 1
    """Number of consecutive images in a batch that share a crop position and are mirrored together; 32 in the
    paper's code."""
    colour: Literal["paper", "code2012", "off"] = "paper"
    """Colour augmentation along principal components: as in the paper's text, as in its code, or off."""
    colour_epochs: NonNegativeInt | None = None
    """Number of epochs after which colour augmentation ends; by default, it never ends."""
    shuffle_window: NonNegativeInt = 0
    """Number of shards whose samples are shuffled together; 0 means all."""
    balance: Annotated[Fraction, Metavar("FRACTION")] = 0.0
    """How far to balance the classes of each dataset: 0 takes each image once an epoch, and 1 takes the
    same number of images of each class. In between, a class of n images has a share in proportion to n to the
    power of 1 − balance."""


class Optimisation(Group):
    """Optimisation"""

    epochs: PositiveInt = 90
    """Number of epochs; each has as many images as the training set."""
    learning_rate: Annotated[PositiveFloat, Metavar("RATE")] = 0.01
    """Initial learning rate, reached at the end of the warm-up if there is one."""
    rate_rule: Literal["fixed", "sqrt", "linear"] = "fixed"
    """How the learning rate follows the batch size: fixed ignores it, sqrt multiplies --learning-rate by the
    square root of --batch / --base-batch, and linear by --batch / --base-batch."""
    base_batch: PositiveInt = 128
    """Batch size for which --learning-rate is meant, if --rate-rule is sqrt or linear."""
    warmup_epochs: Annotated[NonNegativeFloat, Metavar("N")] = 0.0
    """Number of epochs over which the learning rate rises from 0; fractions are allowed."""
    schedule: Literal["plateau", "steps", "cosine"] = "plateau"
    """Schedule of the learning rate: plateau divides it by ten when the validation error stops falling, steps
    divides it by ten at --drop-epochs, and cosine lowers it to 0."""
    patience: PositiveInt = 5
    """Number of epochs without improvement that count as a plateau."""
    stop_after: PositiveInt | None = None
    """Number of evaluations without a lower top-1 error on the validation set after which the run ends; by
    default, it never ends early. There is an evaluation every --evaluate-epochs."""
    drop_epochs: Annotated[tuple[PositiveFloat, ...], NoDecode, Metavar("N,N,…")] = ()
    """Epochs at which --schedule steps divides the learning rate by ten, separated by commas."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """Update rule: sgd is the paper's; lars, for large batches, scales the step of a layer's weights by the
    ratio of the norms of the weights and of their gradient (arXiv:1708.03888). Biases, and other parameters
    of one dimension, are updated by SGD at the learning rate of the biases."""
    trust_coefficient: Factor = 0.001
    """Trust coefficient of LARS: without momentum, a step changes a layer's weights by at most this factor
    times the learning rate times their norm."""
    momentum: Annotated[float, Field(ge=0, lt=1), Metavar("FACTOR")] = 0.9
    """Momentum of the update rule."""
    weight_decay: Annotated[NonNegativeFloat, Metavar("FACTOR")] = 0.0005
    """Weight decay: each step of SGD shrinks every weight by this factor times the learning rate; LARS scales
    it together with the gradient."""
    bias_learning_rate: Factor = 1.0
    """Learning rate of the biases, as a multiple of that of the weights."""
    bias_decay: bool = True
    """Apply weight decay to the biases, too."""
    bias_schedule: Literal["weights", "constant"] = "weights"
    """Whether the biases' learning rate is lowered with that of the weights, or stays constant after the
    warm-up, as in the paper's code."""
    freeze_conv1_epoch: AlexNetOnly[Annotated[NonNegativeFloat | None, Metavar("N")]] = None
    """Epoch from which the first convolution is frozen, biases included; by default, it is never frozen."""
    layer_learning_rates: Annotated[
        dict[LayerFrom, NonNegativeFloat], NoDecode, Metavar("LAYER[@EPOCH]=FACTOR,…")
    ] = {}
    """Factors for the learning rates of individual layers, from an epoch on if one is given. For example,
    conv1=0.1,conv1@5=0 trains the first layer at a tenth of the learning rate and freezes it at epoch 5. With
    --bias-schedule constant, a factor concerns the layer's biases only if it is 0. The layers of another net
    are its modules, such as layer4 or layer4.1; of several around a weight, the innermost applies."""
    initial_weights: Path | None = None
    """Folder of a run from whose newest weights to start; the last layer (AlexNet's fc8) starts at random if
    the classes differ."""
    initial_layers: AlexNetOnly[Literal["all", "convolutions"]] = "all"
    """Layers that start from --initial-weights: all, or only the convolutions that both nets have."""


class Hardware(Group):
    """Hardware"""

    device: MayChange[Annotated[str, Metavar("{auto,cuda,cuda:N,cpu}")]] = "auto"
    """Device to train on: cuda uses all GPUs, cuda:N uses one, and auto uses all GPUs if there are any."""
    processes: MayChange[Workers | None] = None
    """Number of processes on this machine; by default, one for each GPU, or one without GPUs."""
    max_restarts: MayChange[NonNegativeInt] = 3
    """Number of times to restart all processes of this machine after one was killed, crashed or stalled."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of autocast; auto uses bf16 if the hardware supports it. A run keeps the precision that it
    began with."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which processes exchange gradients; bf16 halves the traffic. A single process exchanges
    none."""
    convolutions: PaperOnly[Literal["auto", Form]] = "auto"
    """How to compute the convolutions; results differ only by rounding. grouped uses grouped convolutions,
    towers computes each group separately, and block-diagonal computes both groups as one convolution with
    zeros in between; -s2d also computes conv1 on blocks of 4×4 pixels. On a GPU, auto measures all of them
    when the run begins, and uses the fastest. A run keeps the form that it began with."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: MayChange[Annotated[int, Field(ge=0, le=1024)]] = 0
    """Number of threads of a DALI pipeline; 0 means one per core or, with a GPU, the fastest number."""
    pipelines: MayChange[Workers | None] = None
    """Number of DALI pipelines that prepare training batches in turn in each process; by default one or, with
    a GPU, the fastest number."""
    hw_decoder_load: MayChange[Annotated[Fraction | None, Metavar("FRACTION")]] = None
    """Fraction of the images that a GPU's JPEG engine decodes; by default, the fastest measured one."""
    prefetch: MayChange[Workers] = 2
    """Number of batches to prepare in advance."""


class Robustness(Group):
    """Robustness"""

    max_bad_samples: MayChange[NonNegativeInt] = 100
    """Number of damaged samples to leave out; one more ends training with an error."""
    on_nan: MayChange[Literal["stop", "skip"]] = "stop"
    """Stop the run if the loss is not finite, or skip each update whose gradients are not finite."""
    stall_seconds: MayChange[Annotated[NonNegativeFloat, Metavar("SECONDS")]] = 900.0
    """Time without progress after which a process exits, so that it can be restarted; 0 means never."""


class Monitoring(Group):
    """Monitoring and checkpoints"""

    evaluate_epochs: MayChange[PositiveInt] = 1
    """Evaluate every N epochs, and always after the last one."""
    evaluation_batch: MayChange[PositiveInt] = 128
    """Batch size of an evaluation step in each process."""
    port: MayChange[Annotated[int, Field(ge=0, le=65535), Metavar("PORT")]] = 9410
    """Port of the metrics server; the process with local rank r uses port + r, and 0 disables the server."""
    address: MayChange[Annotated[str, Metavar("ADDRESS")]] = "0.0.0.0"
    """Address that the metrics server binds to."""
    compare: MayChange[Annotated[Path | None, Metavar("RUN")]] = None
    """Run folder of an earlier run that the live page compares this one with; by default, the most recent one
    in the same parent folder with the same recipe and dataset."""
    show_images: MayChange[bool] = True
    """Show a few images of the current batch, and their classes, on the live page."""
    calibrate: MayChange[bool] = False
    """Measure the throughput of the loader and of the model separately at the start, for the dashboard."""
    log_every: MayChange[PositiveInt] = 20
    """Log the metrics every N steps."""
    tensorboard: MayChange[bool] = False
    """Also write the metrics for TensorBoard, into the folder tensorboard of the run."""
    checkpoint_steps: MayChange[NonNegativeInt] = 0
    """Also save a checkpoint every N steps; 0 saves one only at the end of each epoch."""
    checkpoint_seconds: MayChange[Annotated[NonNegativeInt, Metavar("SECONDS")]] = 0
    """Also save a checkpoint at the first logged step this long after the last save; 0 disables this."""
    keep_checkpoints: MayChange[PositiveInt] = 2
    """Number of newest checkpoints to keep, besides the best one."""
