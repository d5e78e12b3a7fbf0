"""The version of the package, for results and cards."""

__version__ = "0.1.0"
