"""Progress lines and tables on the terminal.

Knows nothing of what runs. Invariant: results go to stdout, everything else to stderr, so that
`--json` output can be piped.
"""

import sys
import time
from collections.abc import Sequence


def say(line: str) -> None:
    """One line for the person watching."""
    print(line, file=sys.stderr, flush=True)


def clock(seconds: float | None) -> str:
    """Seconds as 1:02:03 or 2:03; `--` when unknown."""
    if seconds is None:
        return "--"
    hours, rest = divmod(int(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class ProgressLine:
    """One line that is rewritten on a terminal, and repeated now and then in a log."""

    def __init__(self, every_s: float | None = None) -> None:
        self.tty = sys.stderr.isatty()
        self.every_s = every_s if every_s is not None else (0.5 if self.tty else 30.0)
        self.shown = -1e9
        self.dirty = False
        self.last = ""

    def show(self, line: str, now: bool = False) -> None:
        """Show the line if it is time, or `now`."""
        self.last = line
        if not now and time.monotonic() - self.shown < self.every_s:
            return
        self.shown = time.monotonic()
        if self.tty:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            self.dirty = True
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self.dirty:
            print(f"\r\033[K{self.last}", file=sys.stderr, flush=True)
            self.dirty = False


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned, first one left."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
