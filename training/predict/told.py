"""as_json, as_rows and as_lines: one answer for a program, for a table, for a person.

Pure: knows nothing of models or clips. Invariant: the three say the same.
"""

from collections.abc import Iterator
from typing import Any

from training.predict.predictor import Answer
from training.weights.measured import ClassConfusion

COLUMNS = (
    *("clip", "reason", "detail", "stream", "rank", "class", "p", "margin"),
    *("confused_with", "confused_degree", "decided_by", "used_s", "clip_s"),
)
"""Of `as_rows`."""

_LEAST_UNUSED_S = 0.1
"""Sound ends a codec's frame or so after the picture: nobody misses that."""

NOT_COUNTED = (
    "which modality tells them apart is not known of an evaluation by an older diccae: "
    "run diccae evaluate again"
)


def as_json(name: str, answer: Answer) -> dict[str, Any]:
    """One clip; a broken one has `reason` and `detail` and nothing else."""
    if answer.rejected is not None:
        return {
            "clip": name,
            "reason": str(answer.rejected.reason),
            "detail": answer.rejected.detail,
        }
    lengths = {"used_s": round(answer.used_s, 3), "clip_s": round(answer.clip_s, 3)}
    found: dict[str, Any] = {"clip": name, **lengths}
    main = answer.main
    if main is not None:
        found |= {"class": main.guesses[0].name, "p": main.guesses[0].p, "margin": main.margin}
        found["streams"] = {
            stream: {"margin": each.margin, "classes": [guess._asdict() for guess in each.guesses]}
            for stream, each in answer.streams.items()
        }
        found["confused_with"] = _confused(answer.confused) if answer.confused else None
    return found


def _confused(confused: ClassConfusion) -> dict[str, Any]:
    return {
        "class": confused.other,
        "degree": confused.degree,
        "n_clips": confused.n_clips,
        "told_apart": {stream: told.share for stream, told in confused.told_apart.items()},
        "decided_by": confused.decided_by,
    }


def as_rows(name: str, answer: Answer) -> Iterator[list[Any]]:
    """A row for each stream and class, in `COLUMNS`; one row for a broken clip."""
    empty = [""] * (len(COLUMNS) - 3)
    if answer.rejected is not None:
        yield [name, str(answer.rejected.reason), answer.rejected.detail, *empty]
        return
    lengths = [round(answer.used_s, 3), round(answer.clip_s, 3)]
    if not answer.streams:
        yield [name, "", "", *empty[: -len(lengths)], *lengths]
    confused = answer.confused
    beside = [confused.other, confused.degree, confused.decided_by or ""] if confused else [""] * 3
    for stream, each in answer.streams.items():
        for rank, guess in enumerate(each.guesses, 1):
            yield [name, "", "", stream, rank, guess.name, guess.p, each.margin, *beside, *lengths]


def as_lines(name: str, answer: Answer) -> Iterator[str]:
    """A few lines to read."""
    if answer.rejected is not None:
        # A decoder's last words may be several lines.
        yield f"{name}  {answer.rejected.reason}: {' '.join(answer.rejected.detail.split())}"
        return
    yield name
    for stream, each in answer.streams.items():
        guesses = ", ".join(f"{guess.name} {_percent(guess.p)}" for guess in each.guesses)
        yield f"  {stream:<7} {guesses}; margin {_percent(each.margin)}"
    if answer.confused is not None:
        yield f"  {confusion_sentence(answer.confused)}"
    if rest := unused_sentence(answer):
        yield f"  {rest}"


def unused_sentence(answer: Answer) -> str:
    """How much of a clip its answer rests on; "" if on all of it."""
    if answer.clip_s - answer.used_s < _LEAST_UNUSED_S:
        return ""
    return f"{answer.used_s:.1f} of {answer.clip_s:.1f} s used, from the beginning"


def confusion_sentence(confused: ClassConfusion) -> str:
    """What evaluation found of the class and the one it is confused with most."""
    # Counts, not percentages: of a rare pair they are a handful of clips.
    told = ", ".join(
        f"{stream} {each.n_right} of {each.n_clips}" for stream, each in confused.told_apart.items()
    )
    deciding = f": {confused.decided_by} decides" if confused.decided_by else ""
    apart = f"told apart by {told}{deciding}" if told else NOT_COUNTED
    return (
        f"{confused.name} is most often confused with {confused.other} "
        f"({_percent(confused.degree)} of {confused.n_clips} clips); {apart}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
