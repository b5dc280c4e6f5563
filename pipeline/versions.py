"""Which packages are installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """The version of a package, or `not installed`, as for this project in a clone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
