"""Target: one clustering of a round, the space it is made in and the streams it teaches.

Pure; knows streams only as named slices of a bank row. Invariant: a stream that is not clustered
(the fusion of the others) is taught by every clustering.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from clustering.config import KMeansConfig
from clustering.errors import ClusteringError
from clustering.kmeans.space import PointSpace


@dataclass(frozen=True)
class Target:
    """One clustering of a round: a space, its seed and the streams that learn from its labels."""

    name: str
    space: PointSpace
    head: int
    teaches: tuple[str, ...]


def stream_slices(streams: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Start and stop of each named slice of a bank row."""
    slices, start = {}, 0
    for name, width in streams.items():
        slices[name] = (start, start + width)
        start += width
    return slices


def targets_of(config: KMeansConfig, streams: Mapping[str, int]) -> list[Target]:
    """The clusterings a round makes.

    Raises: ClusteringError if the config names a slice that rows do not have, or the mean of
        slices of different widths.
    """
    missing = [name for name in config.streams if name not in streams]
    if missing:
        raise ClusteringError(
            f"clustering.streams names {missing}, but bank rows hold {list(streams)}. "
            "Name slices that rows have."
        )
    slices = stream_slices(streams)
    others = tuple(name for name in streams if name not in config.streams)
    taught: list[tuple[PointSpace, tuple[str, ...]]] = []
    if config.targets in ("mean", "concat"):
        taught.append((_joint_space(config, slices), tuple(streams)))
    else:
        for name in config.streams:
            space = PointSpace(name, (slices[name],), "concat", config.spherical)
            peers = tuple(stream for stream in config.streams if stream != name)
            learners = peers if config.targets == "swapped" else (name,)
            taught.append((space, learners + others))
    return [
        Target(space.name if config.heads == 1 else f"{space.name}-{head}", space, head, teaches)
        for space, teaches in taught
        for head in range(config.heads)
    ]


def _joint_space(config: KMeansConfig, slices: Mapping[str, tuple[int, int]]) -> PointSpace:
    chosen = tuple(slices[name] for name in config.streams)
    widths = {name: slices[name][1] - slices[name][0] for name in config.streams}
    if config.targets == "concat":
        return PointSpace("concat", chosen, "concat", config.spherical)
    if len(set(widths.values())) > 1:
        raise ClusteringError(
            f"clustering.targets = mean needs slices of one width, found {widths}. "
            'Use "concat", or project the streams to one width.'
        )
    return PointSpace("mean", chosen, "mean", config.spherical)


def each_stream(streams: Mapping[str, int]) -> PointSpace:
    """The space whose sums are the prototypes: all slices side by side, each of unit length."""
    return PointSpace("each", tuple(stream_slices(streams).values()), "each", True)
