"""Works in processes: their order, and what a failure costs."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
from support.polling import wait_until

from diccae.ablation.processes import Work, run_all


def _touch(path: Path, needs: Path | None = None) -> None:
    assert needs is None or needs.exists(), f"{needs} is not there yet"
    path.touch()


def _fail() -> None:
    raise ValueError("no such luck")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _import_all_that_a_run_needs() -> None:
    import diccae.ablation.side_by_side
    import training.on_ray.evaluate

    assert diccae.ablation.side_by_side.run_side_by_side
    assert training.on_ray.evaluate.evaluate
    assert "ray" not in sys.modules


def test_a_run_side_by_side_needs_no_ray(tmp_path: Path) -> None:
    work = Work("imports", None, _import_all_that_a_run_needs, tmp_path)
    assert run_all([work], 1, [], lambda *_: None) == {}


def test_a_failure_costs_what_waits_for_it_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "first.done", tmp_path / "second.done"
    told: list[tuple[str, bool]] = []
    works = [
        Work("first", None, partial(_touch, first), tmp_path / "1"),
        Work("second", "first", partial(_touch, second, first), tmp_path / "2"),
        Work("bad", None, _fail, tmp_path / "3"),
        Work("after bad", "bad", partial(_touch, tmp_path / "never"), tmp_path / "4"),
        Work("dead", None, _die, tmp_path / "5"),
    ]
    failed = run_all(works, 2, [], lambda work, why: told.append((work.key, not why)))
    assert second.exists()
    assert not (tmp_path / "never").exists()
    assert failed["bad"].startswith("ValueError: no such luck")
    assert failed["after bad"] == "bad failed"
    assert failed["dead"].startswith("ended by signal 9")
    assert failed.keys() == {"bad", "after bad", "dead"}
    assert dict(told) == {w.key: w.key in ("first", "second") for w in works}


_COMMAND = """
import sys
from functools import partial
from pathlib import Path
from diccae.ablation.processes import Work, run_all
from test_processes import _say_and_wait
folder = Path(sys.argv[1])
run_all([Work("a", None, partial(_say_and_wait, folder / "pid"), folder)], 1, [], print)
"""


def _say_and_wait(path: Path) -> None:
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    signal.pause()


def test_a_killed_command_leaves_no_run_behind(tmp_path: Path) -> None:
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": folders}
    command = subprocess.Popen([sys.executable, "-c", _COMMAND, tmp_path], env=environment)
    wait_until((tmp_path / "pid").exists, 120, "the run's beginning")
    run = psutil.Process(int((tmp_path / "pid").read_text()))
    command.kill()
    command.wait()
    run.wait(60)
