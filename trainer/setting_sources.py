"""Resolve the settings of a run from four sources. Each overrides those before it:

    defaults < recipe (--recipe NAME or a TOML file) < environment (ALEXNET_EPOCHS=90) < command line

An unknown name is an error that suggests the nearest known one. This module does not import torch or DALI, so
--help and error messages appear at once.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic.fields import FieldInfo
from pydantic_settings import CliSettingsSource, EnvSettingsSource
from pydantic_settings import SettingsError as SourceError

from pipeline.documents import ContentError, read_toml
from pipeline.remote_errors import redact
from trainer.setting_groups import Group, Metavar
from trainer.settings import PREFIX, Settings, SettingsError, flag_of, nearest, validated

RECIPES = Path(__file__).parent / "recipes"

# Placeholders that --help shows instead of pydantic-settings' names of types.
_METAVARS = {"int": "N", "Path": "DIR"}
_SHOWN = 60  # number of characters of a value that an error shows


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = unknown.split()[0]
            message = f"unknown setting {name}{nearest(name, (flag_of(f) for f in Settings.model_fields))}"
        raise SettingsError(message)


class _Datasets(argparse.Action):
    """Join datasets that are given one by one, as in --data a=0.7 --data b=0.3.

    Anything else replaces what was given before, as for other settings.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object
    ) -> None:
        earlier = str(getattr(namespace, self.dest, ""))
        is_one_more = "=" in earlier and "=" in values and "," not in values
        setattr(namespace, self.dest, f"{earlier},{values}" if is_one_more else values)


def load_settings(
    arguments: Sequence[str], command: str = "alexnet-train", description: str = ""
) -> Settings:
    """Resolve the settings from a command line, the environment and the recipe.

    Prints the help and exits if asked to. Raises SettingsError for an unknown or impossible setting.
    """
    parser = _Parser(
        prog=command, usage="%(prog)s [setting ...]", description=description, allow_abbrev=False
    )
    groups = {
        name: group
        for owner in reversed(Settings.__bases__)
        if issubclass(owner, Group)
        for group in [parser.add_argument_group(owner.__doc__)]
        for name in owner.model_fields
    }

    def add_argument(_parser: object, *flags: str, dest: str, **options: Any) -> None:
        field = Settings.model_fields[dest]
        options["help"] = _help(field)
        if "metavar" in options:
            chosen = [mark.text for mark in field.metadata if isinstance(mark, Metavar)]
            shown = options["metavar"]
            options["metavar"] = chosen[0] if chosen else _METAVARS.get(shown, shown)
        if dest == "data":
            options["action"] = _Datasets
        groups[dest].add_argument(*flags, dest=dest, **options)

    command_line: Any = CliSettingsSource(
        Settings,
        root_parser=parser,
        add_argument_method=add_argument,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )(args=list(arguments))
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"unknown setting {name} in the environment{nearest(name, known)}")
    try:
        flags, variables = command_line(), EnvSettingsSource(Settings)()
    except SourceError as error:
        raise SettingsError(str(error)) from None
    given = variables | flags
    name = given.get("recipe", Settings.model_fields["recipe"].default)
    recipe = read_recipe(name)

    def shown(field: str, value: object) -> str:
        """Return a setting and its value in the syntax of where it was set."""
        text = redact(str(value))
        text = f"{text[:_SHOWN]}…" if len(text) > _SHOWN else text
        if field in variables and field not in flags:
            return f"{PREFIX}{field.upper()}={text} in the environment"
        if field in recipe and field not in given:
            return f"{field} = {text} in the recipe {name}"
        return f"{flag_of(field)} {text or repr(text)}"

    return validated({**recipe, **given}, shown)


def _help(field: FieldInfo) -> str:
    """Return the help text of a setting: its description, and its default if it has one."""
    default = {True: "on", False: "off"}[field.default] if field.annotation is bool else field.default
    shown = f" (default: {default})" if default not in (None, (), {}) else ""
    return f"{field.description}{shown}".replace("%", "%%")


def read_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe, given its name or the path of a TOML file.

    Raises SettingsError if there is no such recipe, or if it is not valid TOML.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))
        raise SettingsError(
            f"unknown recipe {name}{nearest(name, known)} "
            f"(choose from {', '.join(known)}, or give the path of a TOML file)"
        )
    try:
        return read_toml(path)
    except ContentError as error:
        raise SettingsError(f"the recipe {error}") from None
