"""Load batches of augmented images from a packed dataset: manifest, shards, plan, graph and loader.

The names below are for training loops outside this project, and docs/loader.md describes them. They are
imported when they are first used, because torch and DALI take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.checked import Damage
    from pipeline.dataset import Dataset, open_dataset
    from pipeline.evaluation import EvaluationLoader
    from pipeline.loader import Batch
    from pipeline.loader_options import LoaderError
    from pipeline.manifest import DatasetError
    from pipeline.reader import OutageError
    from pipeline.training import Loader

# The version of the whole project.
__version__ = "0.1.0"

_MODULES = {
    "Batch": "loader",
    "Damage": "checked",
    "Dataset": "dataset",
    "DatasetError": "manifest",
    "EvaluationLoader": "evaluation",
    "Loader": "training",
    "LoaderError": "loader_options",
    "OutageError": "reader",
    "open_dataset": "dataset",
}
__all__ = [
    "Batch",
    "Damage",
    "Dataset",
    "DatasetError",
    "EvaluationLoader",
    "Loader",
    "LoaderError",
    "OutageError",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
