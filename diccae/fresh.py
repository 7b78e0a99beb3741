"""--fresh of a command: what it must not delete.

Knows nothing of stages. Invariant: nothing that the new run reads goes with the old one.
"""

from collections.abc import Mapping

from diccae.errors import UsageError
from diccae.run_folder import RunFolder, run_place


def refuse_deleting(folder: RunFolder, reads: Mapping[str, str | None]) -> None:
    """Before the run in a folder is deleted.

    Args: reads: path or URI by option, of what the run that begins is to read.
    Raises: UsageError for one that lies in the folder.
    """
    for option, uri in reads.items():
        if uri is not None and f"{run_place(uri).uri}/".startswith(f"{folder.uri}/"):
            raise UsageError(
                f"{option} {uri} lies in --out {folder.uri}, all of which --fresh deletes: copy it "
                "to another place, or name another --out"
            )
