"""Check, before a run begins, what would stop it; `alexnet-train doctor` makes the same checks.

This module imports torch only for other nets than AlexNet.
"""

import errno
import os
from importlib.util import find_spec

from pipeline.manifest import Manifest
from pipeline.mixture import is_present, read_data
from pipeline.serving import PageServer
from trainer.processes.ranks import read_ranks
from trainer.run import Run
from trainer.setting_groups import ALEXNET
from trainer.settings import Settings, SettingsError


def is_in_container() -> bool:
    """Return whether this is the project's image: docker/Dockerfile sets the variable `container`."""
    return "container" in os.environ


def check_data(settings: Settings, processes: int) -> Manifest:
    """Check that the settings, the dataset, the number of processes and the packages suit each other.

    Returns the dataset's manifest. Raises SettingsError, DatasetError or OSError.
    """
    if settings.batch % processes:
        below = settings.batch // processes * processes
        raise SettingsError(
            f"--batch {settings.batch} cannot be divided evenly among {processes} processes: "
            f"use {below or processes} or {below + processes}"
        )
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise SettingsError(
            "--tensorboard needs the package tensorboard: run pip install 'alexnet-train[tensorboard]'"
        )
    if is_in_container() and not is_present(settings.data):
        raise SettingsError(
            f"no dataset at {settings.data}: mount one with -v $PWD/shards:{settings.data}:ro, and a folder "
            "for runs with -v $PWD/runs:/runs. 'docker run alexnet-train demo' needs neither"
        )
    if settings.compare and not read_ranks().rank and not Run(settings.compare).begun:
        raise SettingsError(
            f"--compare {settings.compare}: the folder holds no run; give that of an earlier run, or omit "
            "--compare"
        )
    manifest = read_data(settings.data)
    for split in ("train", "val"):
        manifest.split(split)
    if settings.crop > manifest.size:
        raise SettingsError(
            f"--crop {settings.crop} does not fit into images of {manifest.size} px: use "
            f"{manifest.size} or less, or pack larger images"
        )
    if settings.net != ALEXNET and not read_ranks().rank:
        from trainer.factory import check_net

        check_net(settings, len(manifest.classes))
    return manifest


def check_ports(settings: Settings, processes: int) -> None:
    """Check that the metrics servers of these processes can use their ports. Raises SettingsError."""
    for port in range(settings.port, settings.port + processes) if settings.port else ():
        try:
            PageServer({}, settings.address, port).close()
        except OSError as error:
            raise port_error(settings, port, error) from None


def port_error(settings: Settings, port: int, error: OSError) -> SettingsError:
    """Return the message for an error of the metrics server when it is started."""
    if error.errno != errno.EADDRINUSE:
        return SettingsError(f"--address {settings.address} --port {port}: {error.strerror}")
    return SettingsError(
        f"port {port} is in use: choose another with --port, or use --port 0 to disable the server"
    )
