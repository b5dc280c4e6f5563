"""Collect the settings of a run from their groups, and check values and combinations.

trainer/setting_sources.py reads the values. Neither module imports torch or DALI.
"""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.locations import Location
from pipeline.mixture import weights_of
from pipeline.remote.options import CacheOptions
from trainer.setting_groups import (
    ALEXNET,
    ALEXNET_ONLY,
    FIXED,
    MAY_CHANGE,
    OTHER_NETS,
    PAPER_ONLY,
    BatchesAndAugmentation,
    DataAndRun,
    Form,
    Hardware,
    Monitoring,
    Net,
    Optimisation,
    Robustness,
)

PREFIX = "ALEXNET_"  # of the settings in the environment


class SettingsError(ValueError):
    """Settings that cannot be used. The message names the setting and says what to do."""


# pydantic orders the fields from the last base class to the first.
class Settings(
    Monitoring, Robustness, Hardware, Optimisation, BatchesAndAugmentation, Net, DataAndRun, BaseSettings
):
    """Everything that a run depends on."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        validate_default=True,
        defer_build=False,
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Ignore the environment, which must not change the settings of a recorded run."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_or_zero_byte(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation is not bool:
            raise ValueError("input should not be true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("input should not contain a zero byte")
        return value

    @field_validator("data")
    @classmethod
    def _names_datasets(cls, value: Location) -> Location:
        weights_of(value)
        return value

    @field_validator("drop_epochs", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("pixel_mean", "pixel_std", mode="before")
    @classmethod
    def _has_three_numbers(cls, value: object) -> object:
        numbers = value.split(",") if isinstance(value, str) else value
        if numbers is not None and not (isinstance(numbers, (list, tuple)) and len(numbers) == 3):
            raise ValueError("input should be three numbers, for red, green and blue")
        return numbers

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("input should be auto, cuda, cuda:N or cpu")
        return value

    @field_validator("layer_learning_rates", mode="before")
    @classmethod
    def _split_at_equal_signs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = (part.partition("=") for part in value.split(",") if part.strip())
        return {layer.strip(): rate for layer, _, rate in parts}

    @model_validator(mode="after")
    def _warms_up_before_the_end(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs} must be less than --epochs {self.epochs}")
        return self

    @model_validator(mode="after")
    def _has_what_its_options_are_for(self) -> Self:
        if self.optimizer != "lars" and self._differs("trust_coefficient"):
            raise ValueError(
                "--trust-coefficient is only for LARS: add --optimizer lars, or omit --trust-coefficient"
            )
        if self.rate_rule == "fixed" and self._differs("base_batch"):
            raise ValueError(
                "--base-batch has no effect: add --rate-rule sqrt or linear, or omit --base-batch"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_often_enough_for_the_schedule(self) -> Self:
        if self.schedule == "plateau" and self.evaluate_epochs != 1:
            raise ValueError(
                f"--evaluate-epochs {self.evaluate_epochs}: --schedule plateau needs each epoch's error; "
                "omit --evaluate-epochs, or use --schedule steps or cosine"
            )
        return self

    @model_validator(mode="after")
    def _lowers_the_rate_before_it_stops(self) -> Self:
        if self.schedule == "plateau" and self.stop_after is not None and self.stop_after <= self.patience:
            raise ValueError(
                f"--stop-after {self.stop_after} would end the run before --schedule plateau lowers the "
                f"learning rate: use more than --patience {self.patience}"
            )
        return self

    @model_validator(mode="after")
    def _suits_the_net(self) -> Self:
        if self.net != ALEXNET and (changed := self._changed(ALEXNET_ONLY, PAPER_ONLY)):
            raise ValueError(
                f"--net {self.net} is not AlexNet: omit {', '.join(changed)}, and use a recipe without them"
            )
        if self.net == ALEXNET and (changed := self._changed(OTHER_NETS)):
            raise ValueError(f"{', '.join(changed)} is only for nets that --net names: omit it for AlexNet")
        if self.preset in FIXED and (changed := self._changed(PAPER_ONLY)):
            raise ValueError(f"--preset {self.preset} is a fixed net: omit {', '.join(changed)}")
        if self.initial_net and self.initial_weights is None:
            raise ValueError("--initial-net needs --initial-weights with the folder of a run")
        return self

    def _changed(self, *marks: object) -> list[str]:
        """Return the flags of the settings with any of the marks that do not have their defaults."""
        return [flag_of(name) for mark in marks for name in _marked(mark) if self._differs(name)]

    def _differs(self, name: str) -> bool:
        """Return whether a setting does not have its default."""
        return getattr(self, name) != type(self).model_fields[name].default

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up, before the schedule lowers it; it follows the batch size."""
        exponent = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}[self.rate_rule]
        return self.learning_rate * (self.batch / self.base_batch) ** exponent

    @property
    def form(self) -> str:
        """The form of the convolutions: `grouped`, as the layers are written, until `auto` is resolved."""
        return "grouped" if self.convolutions == "auto" else self.convolutions

    @property
    def cache_options(self) -> CacheOptions:
        """Where shards behind URLs are kept."""
        return CacheOptions(self.cache, self.cache_size)

    @property
    def run_folder(self) -> Path:
        """The folder of the run: --out or, without it, runs/RECIPE."""
        return self.out or Path("runs") / Path(self.recipe).stem

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change when the run is continued, as JSON values."""
        return self.model_dump(mode="json", exclude=set(CHANGEABLE))


def _marked(mark: object) -> list[str]:
    """Return the names of the settings with a mark, in the order of --help."""
    return [name for name, field in Settings.model_fields.items() if mark in field.metadata]


CHANGEABLE = _marked(MAY_CHANGE)  # names of the settings that may change when a run is continued


class Resolved(BaseModel):
    """What `auto` resolved to when a run began."""

    model_config = ConfigDict(extra="forbid")

    device: Literal["cpu", "cuda"]
    precision: Literal["bf16", "fp16", "fp32"]
    # It may be missing, but not null: until it is chosen, or if an earlier version began the run.
    convolutions: Form = None  # type: ignore[assignment]


def flag_of(field: str) -> str:
    """Return the flag of a setting on the command line."""
    return "--" + field.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion of the known name that is most similar, or an empty string."""
    close = get_close_matches(name.split("=", maxsplit=1)[0], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def validated(
    values: dict[str, Any],
    shown: Callable[[str, object], str] = lambda field, value: f"{flag_of(field)} {value}",
) -> Settings:
    """Return the settings with these values, or defaults. Raises SettingsError.

    shown: returns a setting and its value as text.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail, shown) for detail in error.errors())) from None


def _explain(detail: Any, shown: Callable[[str, object], str]) -> str:
    """Return a message for one of the errors that pydantic lists.

    shown: returns a setting and its value as text.
    """
    if not detail["loc"]:  # the error concerns a combination of settings
        return detail["msg"].removeprefix("Value error, ")
    field = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting '{field}' in the recipe{nearest(field, Settings.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{shown(field, detail['input'])}: {message[0].lower()}{message[1:]}"
