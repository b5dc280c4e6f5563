"""Every setting of a run: its type, default and help, in the groups that --help shows.

A setting's type may carry the marks `Free`, `PaperOnly` and `Metavar`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import NoDecode


@dataclass(frozen=True)
class Metavar:
    """What --help shows in place of a setting's value."""

    text: str


_T = TypeVar("_T")
FREE, PAPER_ONLY = object(), object()
# Such a setting may change when a run is continued: it changes how the run is watched, not what it computes.
Free = Annotated[_T, FREE]
# Such a setting changes the paper's net, and cannot be combined with --preset torchvision.
PaperOnly = Annotated[_T, PAPER_ONLY]

# Bounds keep every number within what torch, DALI and the clocks accept.
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=MOST)]
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
Workers = Annotated[int, Field(ge=1, le=1024)]  # processes, threads or batches that wait
Rate = Annotated[float, Field(gt=0, le=1e6)]
Factor = Annotated[Rate, Metavar("FACTOR")]
Layer = Literal["conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "fc6", "fc7", "fc8"]
Form = Literal["grouped", "grouped-s2d", "towers", "towers-s2d", "block-diagonal", "block-diagonal-s2d"]


class Group(BaseModel):
    """Settings that --help lists together, with the class's docstring as their title."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, defer_build=True)


class DataAndRun(Group):
    """Data and run"""

    data: Free[Path] = Path("shards")
    """Folder of the packed dataset."""
    out: Free[Path | None] = None
    """Folder of the run, runs/RECIPE by default. Running the same command again continues the run."""
    recipe: Free[Annotated[str, Metavar("RECIPE")]] = "paper"
    """Name of a recipe, or path of a TOML file of settings."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed for the initial weights, the order of the images, augmentation and dropout."""


class Net(Group):
    """Net"""

    preset: Literal["paper", "code2012", "torchvision"] = "paper"
    """Net to train: paper follows the paper's text, code2012 the code that produced the paper's numbers, and
    torchvision is torchvision's AlexNet, a different net."""
    dropout: Literal["2012", "inverted", "off"] = "2012"
    """Kind of dropout: 2012 halves the units at test time, inverted doubles them during training."""
    activation: PaperOnly[Literal["relu", "tanh"]] = "relu"
    """Activation function after every layer but the last."""
    lrn: PaperOnly[bool] = True
    """Apply local response normalisation after the first two convolutions."""
    overlapping_pooling: PaperOnly[bool] = True
    """Pool over overlapping windows, 3 pixels wide with a stride of 2; without it, they are 2 pixels wide."""
    towers: PaperOnly[Annotated[int, Field(ge=1, le=2)]] = 2
    """Number of towers: 2, or 1 for the half-size net that the paper trained on one GPU."""
    conv6: PaperOnly[bool] = False
    """Add a sixth convolution after the last pooling layer, as in the paper's CNN*."""
    without: PaperOnly[Literal["none", "conv2", "conv3", "conv4", "conv5"]] = "none"
    """Convolution to leave out of the net."""
    width: PaperOnly[Annotated[float, Field(gt=0, le=16), Metavar("FACTOR")]] = 1.0
    """Factor on the number of kernels and units of each layer; below 1, the net is smaller and faster."""
    crop: Annotated[int, Field(ge=64, le=MOST), Metavar("PIXELS")] = (
        224  # less leaves nothing after the last pooling
    )
    """Side of the net's square input in pixels."""


class BatchesAndAugmentation(Group):
    """Batches and augmentation"""

    batch: PositiveInt = 128
    """Batch size of a training step, over all processes together."""
    crops_and_flips: bool = True
    """Train on random crops and their mirror images; without it, on the centre crop alone."""
    colour: Literal["paper", "code2012", "off"] = "paper"
    """Strength of the colour augmentation (fancy PCA): that of the paper's text, or of its code."""
    colour_epochs: Count | None = None
    """Number of epochs after which colour augmentation ends; by default, it lasts to the end of the run."""
    shuffle_window: Count = 0
    """Number of shards that are shuffled together; 0 shuffles all of them together."""


class Optimisation(Group):
    """Optimisation"""

    epochs: PositiveInt = 90
    """Number of passes over the training images."""
    learning_rate: Annotated[Rate, Metavar("RATE")] = 0.01
    """Initial learning rate, reached at the end of the warm-up if there is one."""
    warmup_epochs: Annotated[float, Field(ge=0), Metavar("N")] = 0.0
    """Number of epochs over which the learning rate rises from 0; fractions are allowed."""
    schedule: Literal["plateau", "steps", "cosine"] = "plateau"
    """Schedule of the learning rate: plateau divides it by ten when the validation error stops falling, steps
    divides it by ten at --drop-epochs, and cosine lowers it to 0."""
    patience: PositiveInt = 5
    """Number of epochs without improvement that count as a plateau."""
    drop_epochs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], NoDecode, Metavar("N,N,…")] = ()
    """Epochs at which --schedule steps divides the learning rate by ten, separated by commas."""
    momentum: Annotated[float, Field(ge=0, lt=1), Metavar("FACTOR")] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6), Metavar("FACTOR")] = 0.0005
    """Weight decay of SGD: each step shrinks every weight by this factor times the learning rate."""
    bias_learning_rate: Factor = 1.0
    """Learning rate of the biases, as a multiple of that of the weights."""
    bias_decay: bool = True
    """Apply weight decay to the biases, too."""
    freeze_conv1_epoch: Count | None = None
    """Epoch from which the first convolution is frozen; by default, it never is."""
    layer_learning_rates: Annotated[dict[Layer, Rate], NoDecode, Metavar("LAYER=FACTOR,…")] = {}
    """Factors on the learning rates of single layers, for example conv1=0.1,fc8=10."""
    initial_weights: Path | None = None
    """Folder of a run whose newest weights to start from; fc8 starts at random if the classes differ."""


class Hardware(Group):
    """Hardware"""

    device: Free[Annotated[str, Metavar("{auto,cuda,cuda:N,cpu}")]] = "auto"
    """Device to train on; cuda:N is one GPU of several, and auto uses the GPUs if there are any."""
    processes: Free[Workers | None] = None
    """Number of processes on this machine; by default, one for each GPU, or one on a CPU."""
    max_restarts: Free[Count] = 3
    """How many times to restart all processes of this machine after one was killed, crashed or stalled."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast precision; auto uses bf16 where the hardware supports it. A run keeps the precision that it
    began with."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which processes exchange gradients; bf16 halves the traffic. A single process exchanges
    none."""
    convolutions: PaperOnly[Literal["auto", Form]] = "auto"
    """How to compute the convolutions; the results differ only by rounding. grouped leaves the groups to the
    library, towers computes each group separately, and block-diagonal computes both as one convolution with
    zeros between them; -s2d also computes conv1 on blocks of 4×4 pixels. auto measures them on a GPU when the
    run begins, and uses the fastest. A run keeps its form."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: Free[Annotated[int, Field(ge=0, le=1024)]] = 0
    """Number of DALI's threads in each process; 0 means one per core or, on a GPU, the fastest number."""
    hw_decoder_load: Free[Annotated[Annotated[float, Field(ge=0, le=1)] | None, Metavar("FRACTION")]] = None
    """Fraction of the images that a GPU's JPEG engine decodes; by default, the fastest one."""
    prefetch: Free[Workers] = 2
    """Number of batches to prepare ahead."""


class Robustness(Group):
    """Robustness"""

    max_bad_samples: Free[Count] = 100
    """Number of damaged samples to leave out before training ends with an error."""
    on_nan: Free[Literal["stop", "skip"]] = "stop"
    """What to do if the loss or the gradients are not finite: stop the run, or skip the update."""
    stall_seconds: Free[Annotated[float, Field(ge=0, le=MOST), Metavar("SECONDS")]] = 900.0
    """Time without progress after which a process exits, so that it can be restarted; 0 means never."""


class Monitoring(Group):
    """Monitoring and checkpoints"""

    evaluate_epochs: Free[PositiveInt] = 1
    """Evaluate every N epochs, and always after the last one."""
    evaluation_batch: Free[PositiveInt] = 128
    """Batch size of an evaluation step in each process."""
    port: Free[Annotated[int, Field(ge=0, le=65535), Metavar("PORT")]] = 9410
    """Port of the metrics server; the process with local rank r uses port + r, and 0 disables the server."""
    address: Free[Annotated[str, Metavar("ADDRESS")]] = "0.0.0.0"
    """Address that the metrics server binds to."""
    calibrate: Free[bool] = False
    """Measure at the start how fast the loader and the model are on their own, for the dashboard."""
    log_every: Free[PositiveInt] = 20
    """Log the metrics every N steps."""
    checkpoint_steps: Free[Count] = 0
    """Also save a checkpoint every N steps; 0 saves one only at the end of each epoch."""
    checkpoint_seconds: Free[Annotated[Count, Metavar("SECONDS")]] = 0
    """Also save a checkpoint at the first logged step after this time; 0 disables this."""
    keep_checkpoints: Free[PositiveInt] = 2
    """Number of newest checkpoints to keep, besides the best one."""
