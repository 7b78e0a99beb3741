"""`python -m diccae`, the entry point of a job on a cluster."""

import sys

from diccae.cli import main

sys.exit(main())
