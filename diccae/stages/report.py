"""The report stage: everything a run folder holds, as one page, here and in MLflow.

Knows nothing of the page. Invariant: it reads the folder and changes no result.
"""

from pathlib import Path

from diccae.run_folder import RunFolder
from diccae.stages.run_record import tracking_handle
from training.report.page import write_report
from training.tracking import tracker as tracking


def run_report(folder: RunFolder, store: str | None, *, with_sound: bool = True) -> Path:
    """Write the page and hand it, the results and the encoder to MLflow."""
    page = write_report(folder.path, store, with_sound=with_sound, may_write=folder.check)
    handle = tracking_handle(folder)
    if handle.run_id:
        present = [
            folder.path / name
            for name in ("report.html", "results.json", "config.yaml", "encoder", "classifier")
        ]
        tracking.log_artifacts(handle, [path for path in present if path.exists()])
        name = folder.config().tracking.register_as
        if name and (folder.path / "encoder").exists():
            tracking.register_encoder(handle, folder.path / "encoder", name)
    return page
