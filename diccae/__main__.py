"""`python -m diccae`, the entry point of a job on a cluster."""

from diccae.cli import run

run()
