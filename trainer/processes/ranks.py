"""Read the ranks of this process, which torchrun or trainer/processes/launch.py sets in the environment."""

from pipeline import ranks
from pipeline.ranks import Ranks, RanksError
from trainer.settings import SettingsError


def read_ranks() -> Ranks:
    """Return the ranks of this process. Without any variables, it is the only process.

    Raises SettingsError, which names the variable, if one is missing or has an impossible value.
    """
    try:
        return ranks.read_ranks()
    except RanksError as error:
        raise SettingsError(str(error)) from None
