"""The ranks of a process in torchrun's variables, and the errors if those are not valid."""

import os

import pytest

from trainer.processes.ranks import Ranks, read_ranks
from trainer.settings import SettingsError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture
def given(monkeypatch):
    """given(RANK=…): the ranks of a process that has only these variables."""

    def of(**variables: str) -> Ranks:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setitem(os.environ, name, value)
        return read_ranks()

    return of


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1, False)),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "host"}, Ranks(0, 1, 0, 1, False)),
        ({"WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, True)),
        (TWO, Ranks(1, 2, 0, 1, True)),
        (TWO | {"LOCAL_RANK": "1"}, Ranks(1, 2, 1, 1, True)),
        (TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2, True)),
    ],
)
def test_the_ranks_of_a_process_come_from_the_environment(given, variables, expected):
    assert given(**variables) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"WORLD_SIZE": "1.0"}, "WORLD_SIZE=1.0"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9"),
        ({"RANK": "1"}, "RANK=1"),
        ({"RANK": ""}, "RANK= "),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        (TWO | {"RANK": "2"}, "RANK=2"),
        (TWO | {"RANK": ""}, "RANK is not"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        (TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1"),
        (TWO | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
    ],
)
def test_variables_that_are_missing_or_impossible_are_named(given, variables, named):
    with pytest.raises(SettingsError) as error:
        given(**variables)
    assert named in str(error.value)
    assert "unset it" in str(error.value)
    assert len(str(error.value)) < 300
