"""Which packages are installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Return a package's version, or `not installed`, as for this project when run from a clone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
