"""What tests of whole runs share: the smoke config and the lines a run leaves.

Knows nothing of how a run is started.
"""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMOKE = str(CONFIGS / "vggsound-smoke.yaml")
N_TRAIN, N_TEST = 96, 32
"""Clips of the store that such tests share."""


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none before it is there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
