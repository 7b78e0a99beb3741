"""settle: what a run normalises its fbanks with, and whether its weights and features agree.

Composes the store's statistics, the weights' card and the config; knows nothing of training.
Invariant: a run has one mean and one standard deviation from its start on, those its weights were
trained with, written in run.json and in every model it saves.
"""

from typing import Any

from diccae.config import RunConfig, load_config
from diccae.errors import UsageError
from diccae.run_folder import RunFolder, config_in
from diccae.stages.quality import run_fbank_stats
from diccae.stages.run_record import Say
from pipeline.config import FeatureSpec
from pipeline.storage import place_of, storage_failures_ignored
from pipeline.store.store import FeatureStore, Snapshot
from training.config import FbankStatistics
from training.model.make import input_shape
from training.run.pinned import Pinned
from training.weights.card import MadeWith
from training.weights.files import made_with, read_card

_HEARD_AND_SEEN = ("audio_channel", "resize", "sample_rate_hz", "n_mels")
"""Fields of a feature spec that no weights can be carried across. Sizes are not among them: of what
a run starts from, positions are fitted to others."""


def settle(
    folder: RunFolder,
    config: RunConfig,
    data: Pinned,
    say: Say,
    weights: str | None = None,
    made: MadeWith | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """The config with the statistics of the run filled in, and what run.json keeps of them.

    Those of the config; else those the run began with; else those of the weights it starts from;
    else those of the train split, made now if the store does not have them.
    Args: weights: URI of what the run starts from; made: what that says, if it was read already.
    Raises: UsageError if the weights were trained with others, or on other features.
    """
    theirs = made if made is not None else made_with(weights) if weights else MadeWith()
    if weights:
        theirs = theirs._replace(statistics=theirs.statistics or _of_old_run(weights))
        _refuse_other_features(weights, theirs, data.snapshot.spec)
    known = folder.record.get("statistics")
    given = _given_or_begun_with(folder, config)
    if given is not None:
        chosen, origin = given
    elif theirs.statistics is not None:
        chosen, origin = theirs.statistics, f"weights {weights}"
    else:
        chosen, origin = _of_store(data.snapshot)
    if theirs.statistics is not None and not chosen.agrees(theirs.statistics):
        raise UsageError(
            f"{weights} was trained on fbanks of {_told(theirs.statistics)}; this run has "
            f"{_told(chosen)} (of {origin}). Leave data.fbank_mean and data.fbank_std out to go on "
            f"with those of the weights, or give them: --data.fbank-mean {theirs.statistics.mean} "
            f"--data.fbank-std {theirs.statistics.std}"
        )
    if weights and theirs.statistics is None:
        say(f"weights   {weights} does not say its fbank statistics: taken for {_told(chosen)}")
    if known is None:
        say(f"fbanks    {_told(chosen)}, of {origin}")
    return with_statistics(config, chosen), {**chosen._asdict(), "from": origin}


def _given_or_begun_with(
    folder: RunFolder, config: RunConfig
) -> tuple[FbankStatistics, str] | None:
    """What the config says, else what the run in the folder began with, and where it is from."""
    given, known = config.data.given_statistics, folder.record.get("statistics")
    if given is None and folder.record:  # Of a run that began before run.json said them.
        given = folder.config().data.given_statistics
    if given is not None:
        return given, known["from"] if known else "the config"
    if known is not None:
        return FbankStatistics(known["mean"], known["std"]), known["from"]
    return None


def with_statistics(config: RunConfig, statistics: FbankStatistics) -> RunConfig:
    """The config with these in its data section."""
    filled = {"fbank_mean": statistics.mean, "fbank_std": statistics.std}
    return config.model_copy(update={"data": config.data.model_copy(update=filled)})


def for_embedding(config: RunConfig, encoder: str, spec: FeatureSpec) -> RunConfig:
    """The config with the statistics of a saved encoder, for clips of a store of this spec.

    Raises: UsageError if the config gives others, the features are others, or nobody knows any.
    """
    refuse_other_sizes(encoder, spec, "ingest the clips with the sizes of the encoder")
    theirs = made_with(encoder)
    statistics = theirs.statistics or _of_old_run(encoder)
    _refuse_other_features(encoder, theirs, spec)
    given = config.data.given_statistics
    if given is None and statistics is None:
        raise UsageError(
            f"{encoder} does not say which fbank statistics it was trained with: give those of its "
            "run with --data.fbank-mean and --data.fbank-std"
        )
    if given is not None and statistics is not None and not given.agrees(statistics):
        raise UsageError(
            f"{encoder} was trained on fbanks of {_told(statistics)}, data.fbank_mean and "
            f"data.fbank_std say {_told(given)}; leave them out"
        )
    chosen = given or statistics
    assert chosen is not None
    return with_statistics(config, chosen)


def with_store_features(
    folder: RunFolder, config: RunConfig, file: str | None, store: str, fresh: bool = False
) -> RunConfig:
    """The config with the feature spec of the store, so that run and digest say what was read.

    Args: file: the config file, whose `features` are what the user asks for; fresh: a run in the
        folder is not gone on with.
    Raises: UsageError naming the keys of the file's `features` that the store has otherwise.
    """
    if folder.record and not fresh:  # Its store, and so its features, are pinned.
        return config.model_copy(update={"features": folder.config().features})
    spec = spec_as_asked(file, config.data.version, store)
    return config.model_copy(update={"features": spec})


def spec_as_asked(file: str | None, version: int | None, store: str) -> FeatureSpec:
    """The feature spec of a store, which is what the config file asks for.

    Raises: UsageError naming the keys of the file's `features` that the store has otherwise.
    """
    asked = load_config(file).features
    spec = FeatureStore.open(store).snapshot(version).spec
    wrong = [
        f"features.{name} = {getattr(asked, name)} in {file}, {getattr(spec, name)} in the store"
        for name in sorted(asked.model_fields_set)
        if getattr(asked, name) != getattr(spec, name)
    ]
    if wrong:
        raise UsageError(
            f"{store} holds other features than the config asks for: {'; '.join(wrong)}. Ingest "
            f"with --config {file}, or change the config"
        )
    return spec


def _of_store(snapshot: Snapshot) -> tuple[FbankStatistics, str]:
    stats = run_fbank_stats(snapshot, "train")
    origin = f"{snapshot.uri} version {stats.version}, split train"
    return FbankStatistics(stats.fbank_mean, stats.fbank_std), origin


def _of_old_run(weights: str) -> FbankStatistics | None:
    """Of a model saved before cards said so, by the config of the run folder it lies in."""
    place, _ = place_of(weights)
    # Published weights lie beside no config, and where there is nothing to look for.
    with storage_failures_ignored():
        config = config_in(place)
        return None if config is None else config.data.given_statistics
    return None


def _refuse_other_features(weights: str, theirs: MadeWith, spec: FeatureSpec) -> None:
    wrong = [
        f"{name} = {theirs.feature_spec[name]}, in the store {getattr(spec, name)}"
        for name in _HEARD_AND_SEEN
        if theirs.feature_spec.get(name, getattr(spec, name)) != getattr(spec, name)
    ]
    if wrong:
        raise UsageError(
            f"{weights} was trained on other features: {'; '.join(wrong)}. Ingest the clips with "
            "those of the weights (a new store, or the features section of the config)"
        )


def refuse_other_sizes(encoder: str, spec: FeatureSpec, instead: str) -> None:
    """Raises: UsageError if a saved encoder has positions for clips of other sizes than these.

    Args: instead: what to do, for the message.
    """
    theirs, ours = read_card(encoder, "encoder")[0].shape._asdict(), input_shape(spec)._asdict()
    wrong = [f"{name} = {theirs[name]}, in the store {ours[name]}" for name in ours
             if theirs[name] != ours[name]]  # fmt: skip
    if wrong:
        raise UsageError(f"{encoder} sees clips of other sizes: {'; '.join(wrong)}; {instead}")


def _told(statistics: FbankStatistics) -> str:
    return f"mean {statistics.mean:.4f} and std {statistics.std:.4f}"
