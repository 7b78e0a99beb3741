"""Attempt: one start of a run, and its right to write into the run folder, for any process of it.

Knows nothing of what is written. Invariant: once another start has taken the folder over, `check`
raises in every process of this one, on whatever machine, although its driver may hang or be gone.

KubeRay may build the next cluster while the last one still trains (kuberay issue 5211): a check
in the driver alone would leave the old workers writing beside the new ones.
"""

from typing import NamedTuple

from pipeline.errors import StoreLocked
from pipeline.store.lease import check_generation
from training.errors import RunTaken


class Attempt(NamedTuple):
    """Travels to workers and actors."""

    out: str = ""
    """The run folder, which all nodes see."""
    number: int = 0
    """Generation of the folder's lease; 0 without one, which nobody can take over."""
    job: str = ""
    """Of the cluster, as `diccae logs` takes it; empty for a start that is none."""

    @property
    def tags(self) -> dict[str, str]:
        """Of the MLflow run: the way from there to this start's folder and logs."""
        if not self.number:
            return {}
        return {"attempt": str(self.number), "out": self.out, "job": self.job}

    def check(self) -> None:
        """Call before each write. Raises: RunTaken."""
        if not self.number:
            return
        try:
            check_generation(self.out, self.number)
        except StoreLocked as error:
            raise RunTaken(str(error)) from None


UNHELD = Attempt()
"""Of callers that write into a folder of their own, such as tests and notebooks."""
