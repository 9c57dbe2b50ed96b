"""Checks for the packages that the lab needs besides torch."""

from importlib.util import find_spec

from batchnorm.errors import MissingExtraError

PACKAGES = {"gymnasium": "gymnasium", "matplotlib": "matplotlib", "numpy": "numpy"}


def require() -> None:
    """
    Check that the packages of the extra `lab` can be imported, without importing them.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"the lab needs {', '.join(missing)}: pip install 'batchnorm[lab]'")
