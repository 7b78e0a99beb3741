"""A few processes per node that make the fbanks of all decode actors there.

Importing torch takes 0.6 GB and seconds of a process: one in eight pays for it, not each.
Knows nothing of clips or shards. Invariant: a service that dies is started again and asked again;
decode actors notice nothing but the time.
"""

import math
import random
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import FeatureSpec
from pipeline.features import fbanks_function

_CPUS_PER_SERVICE = 8
"""An fbank of a 10 s clip takes 20 ms; decoding one of 256x144 takes 70 ms elsewhere."""
_THREADS = 4
_ENVIRONMENT = {
    # torch and MKL read these when they are loaded.
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    # Keep freed memory instead of faulting it in again for the next operation: 4.2 ms of CPU for
    # the fbank of 2 s instead of 5.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
_GIVE_UP_S = 120.0


class FbankService:
    """The actor."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._fbanks = fbanks_function(spec)

    def fbanks(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """See `features.Fbanks`."""
        return self._fbanks(waveforms)


class NodeFbanks:
    """Fbanks made by a service of the caller's node (features.Fbanks).

    A call costs 8 ms of CPU beside its work, most of it Ray's: ask for several clips at a time.
    """

    def __init__(self, spec: FeatureSpec, run_id: str) -> None:
        """Args: run_id: decode actors of one run share the services."""
        self._spec = spec
        self._node = ray.get_runtime_context().get_node_id()
        n_services = math.ceil(_cpus_of(self._node) / _CPUS_PER_SERVICE)
        self._name = f"fbank-{run_id}-{self._node}-{random.randrange(max(1, n_services))}"
        self._service = self._find_or_start()

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Raises: RayActorError if no service stays alive."""
        deadline = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                made: list[np.ndarray] = ray.get(self._service.fbanks.remote(waveforms))
                return made
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
                self._service = self._find_or_start()

    def _find_or_start(self) -> Any:
        """The actor is named, and ends with the decode actor that started it."""
        return (
            ray.remote(FbankService)
            .options(
                name=self._name,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=_THREADS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
                runtime_env={"env_vars": _ENVIRONMENT},
            )
            .remote(self._spec)
        )


def _cpus_of(node: str) -> float:
    """Logical CPUs of a node; 0 if it is gone."""
    resources = {one["NodeID"]: one["Resources"] for one in ray.nodes()}
    return float(resources.get(node, {}).get("CPU", 0))
