"""The front door: the `diccae` command and the root config. Nothing imports it."""

__version__ = "0.2.0"
