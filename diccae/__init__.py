"""The front door: the `diccae` command and the root config. Imports the rest; nothing imports it."""
