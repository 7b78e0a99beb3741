"""decoding_by: an ingest whose decode children run a function of the tests."""

from pipeline.config import IngestConfig


def decoding_by(config: IngestConfig, extractor: str) -> IngestConfig:
    """The config with another extractor (`module:function`), wherever it is sent.

    Set on the copy itself: it is no field, and a value of the class would stay in this process.
    """
    changed = config.model_copy()
    changed.__dict__["extractor"] = extractor
    return changed
