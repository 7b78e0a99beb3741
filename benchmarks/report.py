"""What does the report of a run of VGGSound's size cost, and how soon can it be read?

Makes a run folder of 309 classes, 15,446 predictions, 600 clusters, 30 rounds and 100,000 lines of
metrics, writes its report in a fresh process, once as it is and once with its sources gone, and
opens it in a headless Chromium. Prints a table; writes only to a temporary folder.

    python benchmarks/report.py [--folder keep/the/run/here]

Targets: written in seconds and 1 GB; 15 MB; drawn and answering in 2 s at 390, 1,280 and 1,920 px.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# The tests behind the packages, whose names their folders share.
sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests")]
from support.browser import Browser
from support.full_run import make_full_run

_WRITE = """
import json, resource, sys, time
began = time.monotonic()
from training.report.page import write_report
page = write_report(sys.argv[1])
own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
# Not ru_maxrss: a child inherits that of the process that started it.
kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "page": str(page), "wall_s": time.monotonic() - began,
    "cpu_s": sum(x.ru_utime + x.ru_stime for x in (own, children)), "gb": kb / 2**20,
}))
"""


def written(run: Path, what: str) -> Path:
    """Write the report in a fresh process and print what it cost."""
    command = [sys.executable, "-c", _WRITE, str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cost = json.loads(done.stdout.splitlines()[-1])
    page = Path(cost["page"])
    megabytes = page.stat().st_size / 1e6
    print(f"{what}: {cost['cpu_s']:.1f} s of CPU ({cost['wall_s']:.1f} s wall), "
          f"{cost['gb']:.2f} GB, page of {megabytes:.1f} MB")  # fmt: skip
    return page


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        run = folder / "run" if (folder / "run").exists() else make_full_run(folder)
        page = written(run, "with its sources")
        with Browser() as browser:
            for width in (1280, 390, 1920):
                opened = [browser.open(page, width) for _ in range(3)]
                heard = browser.eval("performance.getEntriesByType('navigation')[0].domInteractive")
                print(f"{width} px: {min(opened):.2f} to {max(opened):.2f} s until drawn and "
                      f"answering, parsed after {heard / 1000:.2f} s; "
                      f"problems: {browser.problems}")  # fmt: skip
        sources, away = folder / "clips", folder / "clips-away"
        shutil.move(sources, away)
        try:
            written(run, "with sounds synthesised")
        finally:
            shutil.move(away, sources)


if __name__ == "__main__":
    main()
