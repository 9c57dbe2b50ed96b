"""The command `batchnorm`, also `python -m batchnorm`."""

import sys


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    try:
        from batchnorm.cli import commands
    except ModuleNotFoundError as error:
        if error.name not in {"click", "rich"}:
            raise
        sys.stderr.write(f"Error: the command line needs {error.name}: pip install 'batchnorm[cli]'\n")
        sys.exit(2)
    except KeyboardInterrupt:  # torch takes a second to load
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    commands()


if __name__ == "__main__":
    main()
