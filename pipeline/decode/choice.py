"""What `decoder = auto` may take on this machine.

Knows nothing of clips. Invariant: equal specs give equal bytes, whichever machines of a cluster
decode: where decord is lacking (it has no wheel for aarch64), a spec that takes it elsewhere is
replaced before a store is made, and refused for a store that is made with it.
"""

import importlib.util
import logging
import platform

from pipeline.config import FeatureSpec
from pipeline.errors import StoreError

_LOG = logging.getLogger(__name__)
_ANOTHER = "give --features.decoder pyav (every clip is decoded again)"


def has_decord() -> bool:
    """Whether decord is installed here."""
    return importlib.util.find_spec("decord") is not None


def spec_for_this_machine(
    asked: FeatureSpec | None, in_force: FeatureSpec | None
) -> FeatureSpec | None:
    """The spec to ingest with: `asked` itself, or with PyAV in place of what is not here.

    The decoder is a part of the spec and of its hash: decord and PyAV show the same frames and
    round their pixels otherwise.
    Args: asked: None: the one in force. in_force: of the store; None for one that is yet to be
        made.
    Raises: StoreError where only another spec would do.
    """
    spec = asked or in_force or FeatureSpec()
    if spec.decoder == "pyav" or has_decord():
        return asked
    if spec.decoder == "decord":
        raise StoreError(f"features.decoder = decord, and {_lacking()}; {_ANOTHER}")
    if in_force is not None and in_force.spec_hash() == spec.spec_hash():
        raise StoreError(
            f"the store's features are made with features.decoder = auto, which takes decord for "
            f"some clips, and {_lacking()}: ingest on a machine that has it, or {_ANOTHER}"
        )
    _LOG.info("%s: features.decoder = pyav", _lacking())
    return spec.model_copy(update={"decoder": "pyav"})


def refuse_without_decoder(spec: FeatureSpec, where: str) -> None:
    """Raises: StoreError on a node `where` that would make other bytes than its driver."""
    if spec.decoder == "pyav" or has_decord():
        return
    raise StoreError(
        f"features.decoder = {spec.decoder}, and on {where}, where clips are decoded, "
        f"{_lacking()}: its features would differ from those of the other nodes. Decode on nodes "
        f"that have it, or {_ANOTHER}"
    )


def _lacking() -> str:
    return f"decord is not installed here ({platform.machine()})"
