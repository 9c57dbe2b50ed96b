"""The version of this library, in one place: packaging, the commands and every result read it here."""

__version__ = "0.1.0"
