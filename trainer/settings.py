"""All settings of a run, from four places; the later wins.

    defaults < recipe (--recipe NAME or a TOML file) < environment (ALEXNET_EPOCHS=90) < command line

Unknown names are errors that say the nearest known one. Nothing here imports torch or DALI, so
that help and refusals come at once.
"""

import argparse
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
)

PREFIX = "ALEXNET_"
RECIPES = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(ge=0)]
Layer = Literal["conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "fc6", "fc7", "fc8"]
Form = Literal["grouped", "grouped-s2d", "towers", "towers-s2d", "block-diagonal", "block-diagonal-s2d"]

# What is changed of the paper's net: the fields of model.alexnet.Variant.
_VARIANT = ("activation", "lrn", "overlapping_pooling", "towers", "conv6", "without", "width")


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the setting and what would do."""


class Settings(BaseSettings):
    """Everything that a run depends on."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, use_attribute_docstrings=True, validate_default=True
    )

    data: Path = Path("shards")
    """Folder with the packed dataset."""
    out: Path | None = None
    """Run folder; the same command again continues the run in it. Without it, runs/RECIPE."""
    recipe: str = "paper"
    """Recipe by name, or a TOML file of settings."""
    seed: Count = 0
    """Of weights, order, augmentation and dropout."""

    preset: Literal["paper", "code2012", "torchvision"] = "paper"
    """The net of the paper's text, of the code that produced its numbers, or torchvision's, another one."""
    dropout: Literal["2012", "inverted", "off"] = "2012"
    """2012 halves units at test, inverted doubles them in training."""
    activation: Literal["relu", "tanh"] = "relu"
    """What follows each layer but the last."""
    lrn: bool = True
    """Whether responses are normalised after the first two convolutions."""
    overlapping_pooling: bool = True
    """Whether pooling's windows are 3 pixels wide, or 2 as is their stride."""
    towers: Annotated[int, Field(ge=1, le=2)] = 2
    """2, or 1 for the half net that the paper trained on one GPU."""
    conv6: bool = False
    """Whether a sixth convolution follows the last pooling, as in CNN*."""
    without: Literal["none", "conv2", "conv3", "conv4", "conv5"] = "none"
    """A convolution that is left out."""
    width: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Kernels and units of each layer as a share of the paper's; less than 1 is a smaller and faster net."""
    crop: Annotated[int, Field(ge=64)] = 224  # less leaves nothing after the last pooling
    """Side of the net's input in pixels."""

    batch: PositiveInt = 128
    """Images in a step over all processes."""
    crops_and_flips: bool = True
    """Whether to train on random crops and their mirror images, or on the centre alone."""
    colour: Literal["paper", "code2012", "off"] = "paper"
    """Strength of the colour augmentation (fancy PCA)."""
    colour_epochs: Count | None = None
    """Epochs after which colour augmentation ends."""
    shuffle_window: Count = 0
    """Shards that are shuffled together; 0 is all of them."""

    epochs: PositiveInt = 90
    """Passes over the training images."""
    learning_rate: PositiveFloat = 0.01
    """At first, or after the warm-up."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises from 0."""
    schedule: Literal["plateau", "steps", "cosine"] = "plateau"
    """How the learning rate falls: by ten on a plateau of the error, by ten at set epochs, or to 0."""
    patience: PositiveInt = 5
    """Epochs without improvement that make a plateau."""
    drop_epochs: Annotated[tuple[PositiveFloat, ...], NoDecode] = ()
    """Epochs at which the schedule 'steps' divides by ten, with commas between them."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the gradient descent."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0005
    """Share of each weight that is taken off, times the learning rate."""
    bias_learning_rate: PositiveFloat = 1.0
    """Learning rate of biases over that of weights."""
    bias_decay: bool = True
    """Whether weight decay applies to biases."""
    freeze_conv1_epoch: Count | None = None
    """Epoch from which the first layer learns no more."""
    layer_learning_rates: Annotated[dict[Layer, PositiveFloat], NoDecode] = {}
    """Learning rates of single layers over that of the others, as conv1=0.1,fc8=10."""
    initial_weights: Path | None = None
    """Run folder whose newest weights training begins with; fc8 begins anew where the classes differ."""

    device: str = "auto"
    """cuda, cuda:1 for one GPU of several, or cpu; auto is cuda if there is a GPU."""
    processes: PositiveInt | None = None
    """Processes of this machine; without it, one for each GPU, or one on a CPU."""
    max_restarts: Count = 3
    """How often all processes of this machine are started again after one was killed, crashed or stalled."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast precision; auto is bf16 where the hardware has it. A run keeps what it began with."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """As processes send them to each other: bf16 is half the traffic. One process alone sends none."""
    convolutions: Literal["auto", Form] = "auto"
    """How the convolutions are computed, with the same result but for rounding: grouped leaves the groups to
    the library, towers computes each by itself, block-diagonal both as one with zeros between them; -s2d
    computes conv1 on blocks of 4×4 pixels. auto measures them on a GPU when the run begins, and takes the
    fastest. A run keeps its form."""
    compile: bool = False
    """Whether to run the model through torch.compile."""
    threads: Count = 0
    """DALI's threads in each process; 0 is one for each core, or on a GPU what is fastest there."""
    hw_decoder_load: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the images that a GPU's JPEG engine decodes; without it, what is fastest there."""
    prefetch: PositiveInt = 2
    """Batches that are prepared ahead."""
    max_bad_samples: Count = 100
    """Damaged samples that are left out before training ends with an error."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Whether a loss or gradients that are not finite end the run, or have their update left out."""
    stall_seconds: Annotated[float, Field(ge=0)] = 900.0
    """Time without progress after which a process ends, to be started again; 0 is never."""
    evaluate_epochs: PositiveInt = 1
    """Epochs between two evaluations; the last is always evaluated."""
    evaluation_batch: PositiveInt = 128
    """Images in an evaluation step of each process."""

    port: Annotated[int, Field(ge=0, le=65535)] = 9410
    """Of the metrics server; process r of a machine takes port+r, and 0 is none."""
    address: str = "0.0.0.0"
    """Address that the metrics server binds."""
    calibrate: bool = False
    """Whether to measure first what the loader and the model can each do alone, for the dashboard."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics."""
    checkpoint_steps: Count = 0
    """Steps between two checkpoints; 0 is at the end of each epoch alone."""
    checkpoint_seconds: Count = 0
    """Seconds between two checkpoints, at a step that is logged; 0 does not count them."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept, and the best one besides."""

    @field_validator("drop_epochs", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("it should be auto, cuda, cuda:N or cpu")
        return value

    @field_validator("layer_learning_rates", mode="before")
    @classmethod
    def _split_at_equal_signs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return {layer: rate for layer, _, rate in (part.partition("=") for part in value.split(","))}

    @model_validator(mode="after")
    def _warms_up_before_the_end(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs} must be less than --epochs {self.epochs}")
        return self

    @model_validator(mode="after")
    def _knows_each_error_that_the_schedule_needs(self) -> Self:
        if self.schedule == "plateau" and self.evaluate_epochs != 1:
            raise ValueError(
                f"--evaluate-epochs {self.evaluate_epochs}: --schedule plateau needs each epoch's error; "
                "leave it away, or take --schedule steps or cosine"
            )
        return self

    @model_validator(mode="after")
    def _varies_a_net_of_the_paper(self) -> Self:
        changed = [_flag(f) for f in _VARIANT if getattr(self, f) != type(self).model_fields[f].default]
        changed += ["--convolutions"] * (self.convolutions != "auto")
        if self.preset == "torchvision" and changed:
            raise ValueError(f"--preset torchvision is one net: leave out {', '.join(changed)}")
        return self

    @property
    def form(self) -> str:
        """Of the convolutions; until it is found what is fastest, that in which the layers are written."""
        return "grouped" if self.convolutions == "auto" else self.convolutions

    @property
    def run_folder(self) -> Path:
        return self.out or Path("runs") / Path(self.recipe).stem


class Resolved(BaseModel):
    """What `auto` was when a run began."""

    model_config = ConfigDict(extra="forbid")

    device: Literal["cpu", "cuda"]
    precision: Literal["bf16", "fp16", "fp32"]
    # It may be missing, though not null: not chosen yet, or of an earlier version.
    convolutions: Form = None  # type: ignore[assignment]


# These may differ when a run is continued: they change how it is watched, not what it computes.
FREE_TO_CHANGE = frozenset(
    {"data", "out", "recipe", "device", "processes", "max_restarts", "threads", "hw_decoder_load", "prefetch",
     "max_bad_samples", "on_nan", "stall_seconds", "evaluate_epochs", "evaluation_batch", "port", "address",
     "calibrate", "log_every", "checkpoint_steps", "checkpoint_seconds", "keep_checkpoints"}
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = unknown.split()[0]
            message = f"unknown setting {name}{_nearest(name, (_flag(f) for f in Settings.model_fields))}"
        raise SettingsError(message)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name.split("=", maxsplit=1)[0], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def load_settings(
    arguments: Sequence[str], command: str = "alexnet-train", description: str = ""
) -> Settings:
    """The settings that a command line resolves to.

    Prints help and exits where asked to. Raises SettingsError for an unknown or impossible one.
    """
    parser = _Parser(prog=command, description=description, allow_abbrev=False)
    command_line: Any = CliSettingsSource(
        Settings, root_parser=parser, cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True
    )(args=list(arguments))
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"unknown setting {name} in the environment{_nearest(name, known)}")
    try:
        given = EnvSettingsSource(Settings)() | command_line()
        recipe = read_recipe(given.get("recipe", Settings.model_fields["recipe"].default))
        return Settings.model_validate({**recipe, **given})
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail) for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    if not detail["loc"]:  # of several settings together
        return detail["msg"].removeprefix("Value error, ")
    field = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting '{field}' in the recipe{_nearest(field, Settings.model_fields)}"
    return f"{_flag(field)} {detail['input']}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises SettingsError if there is none of that name."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))
        raise SettingsError(
            f"unknown recipe {name}{_nearest(name, known)} "
            f"(there are {', '.join(known)}, or give a TOML file)"
        )
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the recipe {path} is not TOML: {error}") from None
