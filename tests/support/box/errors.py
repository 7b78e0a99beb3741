"""BoxError: what stands between a manifest and a running job, with the pod that it stops.

Knows nothing of how it was found.
"""


class BoxError(Exception):
    """One line: which pod or object, what was found, what the manifest says."""
