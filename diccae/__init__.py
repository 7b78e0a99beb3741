"""The front door: the `diccae` command and the root config. Nothing imports it."""
