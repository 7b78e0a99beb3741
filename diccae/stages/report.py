"""The report stage: everything a run folder holds, as one page, here and in MLflow.

Knows nothing of the page. Invariant: it reads the folder and changes no result.
"""

from diccae.run_folder import RunFolder
from diccae.stages.run_record import Say, known_run, say_if_untracked, tracking_handle
from training.predict.registry import registered
from training.report.page import write_report
from training.tracking import mlflow_run as tracking


def run_report(folder: RunFolder, store: str | None, say: Say, *, with_sound: bool = True) -> str:
    """Write the page and hand it, the results and the models to MLflow. Returns: its URI."""
    place = folder.place
    page = write_report(folder.uri, store, with_sound=with_sound, may_write=folder.check)
    handle = tracking_handle(folder)
    if handle.uri:
        handle = known_run(folder, folder.config(), say)
    say_if_untracked(handle, "the report is", say)
    if handle.run_id:
        names = ("report.html", "results.json", "config.yaml", "encoder", "classifier")
        present = [place.uri_of(name) for name in names if place.exists(name)]
        tracking.log_artifacts(handle, present)
        name = folder.config().tracking.register_as
        if name:
            registered(handle, folder.uri, name)
    return page
