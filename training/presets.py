"""with_sizes: the encoder's named sizes, and what naming one brings with it.

Knows nothing of where a config is read. Invariant: a size that is given wins over its preset's.
"""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["tiny", "small", "base", "large"]
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"stem": "conv", "dim": 128, "depth": 1, "joint_depth": 1, "n_heads": 4},
    "small": {"stem": "conv", "dim": 256, "depth": 3, "joint_depth": 1, "n_heads": 4},
    "base": {"stem": "patch", "dim": 768, "depth": 11, "joint_depth": 1, "n_heads": 12},
    "large": {"stem": "patch", "dim": 1024, "depth": 23, "joint_depth": 1, "n_heads": 16},
}


def with_sizes(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `encoder`, and those sizes of the preset among them that are not given."""
    return {**_PRESETS.get(str(encoder.get("preset")), {}), **encoder}
