"""The report of a run of VGGSound's size: how large it is, what it costs, and that it opens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import CUT_OFF, Browser
from support.full_run import make_full_run

_WRITE = """
import json, sys
from training.report.page import write_report
page = write_report(sys.argv[1])
# Not ru_maxrss: a child inherits that of the process that started it.
kb = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))
print(json.dumps({"page": str(page), "gb": kb / 2**20, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = make_full_run(tmp_path_factory.mktemp("full"))
    command = [sys.executable, "-c", _WRITE, str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.soak
def test_a_page_of_309_classes_is_small_and_made_within_a_gigabyte(
    written: dict[str, str],
) -> None:
    assert Path(written["page"]).stat().st_size < 15e6
    assert float(written["gb"]) < 1.0
    assert not written["torch"]


@pytest.mark.soak
@pytest.mark.browser
def test_a_page_of_309_classes_opens_at_once_with_nothing_cut_off(written: dict[str, str]) -> None:
    page = Path(written["page"])
    with Browser() as browser:
        seconds = []
        for width in (1280, 390, 1920):
            seconds.append(browser.open(page, width))
            assert browser.problems == []
            assert browser.eval(CUT_OFF) == []
        # Two seconds are the aim (benchmarks/report.py); the machine of a test may be busy.
        assert min(seconds) < 5
        assert browser.eval("document.querySelectorAll('*').length") < 15_000
        map_ms = (
            "(() => { const t = performance.now(); drawAll(); return performance.now() - t; })()"
        )
        assert browser.eval(map_ms) < 1000
