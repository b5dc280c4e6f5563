"""Reading state dicts from .pth and .safetensors files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import path_in_errors
from pipeline.retry import read_with_retries
from trainer.settings import SettingsError

if TYPE_CHECKING:
    from torch import Tensor


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict in the format that the file's content, not its extension, indicates.

    Raises SettingsError, ValueError or OSError.
    """
    head = read_with_retries(path, 9)
    if not head:
        raise ValueError("it is empty")
    is_safetensors = head[8:] == b"{"  # the start of the header in JSON, after its size in 8 bytes
    return read_safetensors(path) if is_safetensors else read_pth(path)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file. Raises ValueError or OSError."""
    import torch

    try:
        # Given a path, torch would decide by its extension.
        with path_in_errors(path), open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch raises any class for a file that torch.save did not write
        raise ValueError("it is damaged, or holds something other than tensors") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError("it is not a dict of tensors")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict in safetensors format. Raises SettingsError, ValueError or OSError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise SettingsError(f"{path} needs safetensors: pip install 'alexnet-train[export]'") from None
    try:
        with path_in_errors(path):
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
