"""choose_kept: which of several equal clips stays, and which are its duplicates.

Pure: knows nothing of how clips were found to be equal. Invariant: of equal clips of which any is
there, one that is there stays. So it is asked anew whenever clips may have come, gone or changed
their split: the choice made when the table was written may have kept one that is gone since.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.quality.rules import DUPLICATE, rules_named

TWIN_COLUMNS = ["twins", "twin_sameness", "sameness"]


def choose_kept(
    ids: Sequence[str],
    splits: Sequence[str | None],
    is_there: Sequence[bool],
    twins: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, str], dict[str, float]]:
    """For all but one of several equal clips: the one that is kept, and the best sameness.

    Kept is a clip of another split than train (a test set stays whole, what leaked into training
    goes), then the first by id; clips that are not there keep nothing from one that is.

    Args: twins: of each clip, by id, and how alike they are.
    """
    rank = {
        clip_id: (not there, split == "train", clip_id)
        for clip_id, split, there in zip(ids, splits, is_there, strict=True)
    }
    kept_of: dict[str, str] = {}
    sameness: dict[str, float] = {}
    seen: set[str] = set()
    for clip_id in ids:
        if clip_id in seen or not twins[clip_id]:
            continue
        group, open_ids = {clip_id}, [clip_id]
        while open_ids:
            for other in twins[open_ids.pop()]:
                if other not in group:
                    group.add(other)
                    open_ids.append(other)
        seen |= group
        kept = min(group, key=rank.__getitem__)
        for other in group - {kept}:
            kept_of[other], sameness[other] = kept, max(twins[other].values())
    return kept_of, sameness


def judged_anew(
    table: pa.Table, splits: Sequence[str | None], is_there: Sequence[bool]
) -> pa.Table:
    """The rows with the verdict `duplicate` that they have among the clips that are there.

    Args: table: clip_id, TWIN_COLUMNS and `duplicate`; splits, is_there: of each row, as of now.
    """
    ids = table["clip_id"].to_pylist()
    twins = {
        clip_id: dict(zip(alike, scores, strict=True))
        for clip_id, alike, scores in zip(
            ids, table["twins"].to_pylist(), table["twin_sameness"].to_pylist(), strict=True
        )
    }
    _, best = choose_kept(ids, splits, is_there, twins)
    sameness = pa.array([best.get(clip_id, 0.0) for clip_id in ids], pa.float32())
    judged = pc.if_else(pc.is_valid(table["sameness"]), sameness, pa.scalar(None, pa.float32()))
    table = table.set_column(table.column_names.index("sameness"), "sameness", judged)
    (rule,) = rules_named([DUPLICATE])
    return table.set_column(table.column_names.index(DUPLICATE), DUPLICATE, rule.verdicts(table))
