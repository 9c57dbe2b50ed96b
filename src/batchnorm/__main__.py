"""The command `batchnorm`, also `python -m batchnorm`."""

import sys
from importlib.util import find_spec

# Packages that the commands import, and how to install them.
PACKAGES = {"torch": "torch", "click": "'batchnorm[cli]'", "rich": "'batchnorm[cli]'"}


def main() -> None:
    """Run the command line, or print in one line which packages are missing."""
    missing = [package for package in PACKAGES if not _is_installed(package)]
    if missing:
        install = " ".join(dict.fromkeys(PACKAGES[package] for package in missing))
        sys.stderr.write(f"Error: the command line needs {', '.join(missing)}: pip install {install}\n")
        sys.exit(2)
    try:
        from batchnorm.cli import commands
    except KeyboardInterrupt:  # while click is loading
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    commands()


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # a custom import finder may raise
        return False


if __name__ == "__main__":
    main()
