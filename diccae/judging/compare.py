"""The comparison stage: predictions of two runs, or of a run and a file, side by side.

Knows nothing of statistics. Invariant: truth is what the first run was evaluated on; two runs that
disagree on it are not compared.
"""

from collections.abc import Sequence

from diccae.errors import UsageError
from diccae.judging.predicted import predictions_of
from diccae.run_folder import RunFolder
from diccae.screen import table
from pipeline.storage import place_of
from training.comparison.answers import Answers, of_run, read_answers
from training.comparison.compare import Comparison, Pairs, Truth, compare, confused_pairs
from training.comparison.differences import Difference
from training.evaluation.predictions import Predictions

_SHOWN = 10
"""Rows of a table on the screen."""


def run_compare(
    run_a: str,
    run_b: str | None,
    predictions: str | None,
    *,
    classes: str | None,
    n_pairs: int,
    resamples: int,
) -> Comparison:
    """Compare a run with another one, or with a file of predictions.

    Raises: UsageError for neither or both, or for runs whose clips have other labels.
    """
    if (run_b is None) == (predictions is None):
        raise UsageError("compare: name a second run, or a file with --predictions FILE")
    first = RunFolder(run_a)
    ours = predictions_of(first)
    a = of_run(first.place.name, ours)
    truth = _truth(ours)
    folders = [first]
    if run_b is None:
        assert predictions is not None
        b = read_answers(predictions, classes)
    else:
        second = RunFolder(run_b)
        theirs = predictions_of(second)
        _check_labels(truth, theirs, run_a, run_b)
        b = of_run(second.place.name, theirs)
        a, b = _told_apart((a, b), (run_a, run_b), (ours, theirs))
        folders.append(second)
    return compare(a, b, truth, _pairs(folders, [a, b], truth, n_pairs), resamples)


def _told_apart(
    models: Sequence[Answers], runs: Sequence[str], given: Sequence[Predictions]
) -> list[Answers]:
    """Runs of one name by their paths, and the probe of a run without a classifier as that: what it
    says is no answer of a fine-tuned model."""
    names = [model.name for model in models]
    if names[0] == names[1]:
        names = list(runs)
    scorers = [each.about.scorer for each in given]
    if scorers[0] != scorers[1]:
        names = [f"{name} ({scorer})" for name, scorer in zip(names, scorers, strict=True)]
    return [model._replace(name=name) for model, name in zip(models, names, strict=True)]


def _truth(given: Predictions) -> dict[str, Truth]:
    names = given.about.classes
    rows = zip(given.clip_ids, given.labels_M.tolist(), given.groups, strict=True)
    return {clip_id: Truth(names[label], group) for clip_id, label, group in rows}


def _check_labels(truth: dict[str, Truth], theirs: Predictions, run_a: str, run_b: str) -> None:
    other = _truth(theirs)
    wrong = [c for c, known in truth.items() if c in other and other[c].label != known.label]
    if wrong:
        clip = wrong[0]
        raise UsageError(
            f"{run_a} and {run_b}: {len(wrong)} clips have other labels, such as {clip}: "
            f"{truth[clip].label!r} and {other[clip].label!r}; evaluate both on one store version"
        )


def _pairs(
    folders: Sequence[RunFolder], models: Sequence[Answers], truth: dict[str, Truth], most: int
) -> Pairs:
    """The pairs that training clips confuse most in either run; without any, those that the clips
    compared confuse, which are then measured on what they were chosen by."""
    degrees: dict[tuple[str, str], float] = {}
    for folder in folders:
        confusion = folder.results.get("confusion") or {}
        for first, second, degree in confusion.get("training_pairs") or []:
            key = (min(first, second), max(first, second))
            degrees[key] = max(degree, degrees.get(key, 0.0))
    if degrees:
        ordered = sorted(degrees, key=lambda pair: (-degrees[pair], pair))
        return Pairs(ordered[:most], "training clips")
    return confused_pairs(models, truth, most)


def comparison_table(found: Comparison) -> str:
    """In per cent: all clips by stream, then the clearest classes and the pairs."""
    lines = [_table(f"b - a, top-1 of {found.n_clips:,} clips",
                    [(stream, one) for stream, one in found.whole.items()])]  # fmt: skip
    for title, by_stream in (("class", found.classes), ("taken for each other", found.pairs)):
        rows = [
            (f"{stream}: {' / '.join(one.name)}", one)
            for stream, answers in by_stream.items()
            for one in answers
        ]
        rows.sort(key=lambda row: (row[1].p, -abs(row[1].difference)))
        if rows:
            lines.append(_table(f"{title}, {min(_SHOWN, len(rows))} of {len(rows)}", rows[:_SHOWN]))
    lines.append(notes(found))
    return "\n".join(lines)


def _table(title: str, rows: Sequence[tuple[str, Difference]]) -> str:
    cells = [
        [name, f"{one.n_clips:,}", f"{100 * one.a:.1f}", f"{100 * one.b:.1f}",
         f"{100 * one.difference:+.1f}", interval(one), one.only_a, one.only_b, f"{one.p:.2g}",
         f"{one.p_holm:.2g}"]
        for name, one in rows
    ]  # fmt: skip
    head = ["clips", "a", "b", "b - a", "95 % interval", "only a", "only b", "p", "p (Holm)"]
    return table([title, *head], cells)


def interval(one: Difference) -> str:
    """In points of per cent; a dash for a single recording."""
    if one.low != one.low:
        return "-"
    return f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"


def notes(found: Comparison) -> str:
    """What a reader has to know to read the numbers right."""
    lines = [
        f"a {found.a}",
        f"b {found.b}",
        f"{found.n_clips:,} clips of {found.n_groups:,} recordings in both; left out: "
        f"{len(found.only_a):,} that only a has, {len(found.only_b):,} that only b has"
        + _some([*found.only_a, *found.only_b]),
        f"pairs chosen on {found.pairs_chosen_on}; intervals: bootstrap over recordings; "
        "p: McNemar, exact",
    ]
    if found.unknown:
        lines.append(f"{len(found.unknown)} names of b are no class here{_some(found.unknown)}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return f" (such as {', '.join(names[:3])})" if names else ""


def write_page(found: Comparison, uri: str) -> None:
    """Write the comparison as one page. Args: uri: of the file."""
    from training.comparison.page import comparison_page

    place, name = place_of(uri)
    place.write_bytes(name, comparison_page(found).encode())
