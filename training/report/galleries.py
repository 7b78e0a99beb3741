"""Choice of the clips that a report shows, and its sections of clusters and retrieval.

Knows nothing of how frames and sounds are read: it is given them by clip id.
Invariant: what is shown is chosen by `examples`, never by hand.
"""

from typing import NamedTuple

from training.report.clips.listening import SYNTHESISED_S
from training.report.clips.media import Media
from training.report.clips.sound import EXCERPT_S
from training.report.clips.spectrogram import axes_in_words, heights_of_hz
from training.report.confusions import Pair, worst_pairs
from training.report.examples import (
    Cluster,
    Example,
    Query,
    cluster_examples,
    pair_examples,
    retrieval_examples,
)
from training.report.folder import ReportData
from training.report.markup import absent, number, percent, section, sound, strip, text
from training.report.sections import Curves, charts, health_table

_PAIRS_SHOWN = 8


class Choice(NamedTuple):
    """Everything a report shows frames of."""

    pairs: list[tuple[Pair, list[Example], list[Example]]]
    clusters: list[Cluster]
    n_clusters: int
    queries: list[Query]

    def framed(self) -> set[str]:
        """The clips whose frames are needed."""
        shown = [e for _, of_a, of_b in self.pairs for e in (*of_a, *of_b)]
        shown += [e for cluster in self.clusters for e in cluster.examples]
        shown += [e for query in self.queries for e in query.found]
        return {example.clip_id for example in shown}

    def heard(self) -> set[str]:
        """The clips whose sounds are needed."""
        return self.framed() | {query.query.clip_id for query in self.queries}


def choose(
    run: ReportData, clip_of: dict[int, tuple[str, str]], label_of: dict[str, str]
) -> Choice:
    """Choose the clips of every gallery.

    Args: clip_of: clip id and label by clustering key. label_of: label by clip id. Both empty
        without a store: then labels come from the predictions.
    """
    labels = label_of or _labels_of_predictions(run)
    clusters: list[Cluster] = []
    n_clusters = 0
    published = [done for done in run.rounds if done.heads]
    if published:
        last = published[-1].heads[0]
        clusters, n_clusters = cluster_examples(last.keys_N, last.labels_N, clip_of)
    queries: list[Query] = []
    if run.embeddings is not None and {"audio", "video"} <= run.embeddings.vectors.keys():
        vectors = run.embeddings.vectors
        queries = retrieval_examples(
            run.embeddings.clip_ids, vectors["audio"], vectors["video"], labels
        )
    return Choice(_pairs(run), clusters, n_clusters, queries)


def _labels_of_predictions(run: ReportData) -> dict[str, str]:
    if run.predictions is None or run.confusion is None:
        return {}
    names = run.confusion.classes
    ids, labels = run.predictions["clip_id"].to_pylist(), run.predictions["label"].to_pylist()
    return {i: names[n] for i, n in zip(ids, labels, strict=True) if 0 <= n < len(names)}


def _pairs(run: ReportData) -> list[tuple[Pair, list[Example], list[Example]]]:
    if run.confusion is None:
        return []
    found = []
    for pair in worst_pairs(run.confusion.main, _PAIRS_SHOWN):
        shown: tuple[list[Example], list[Example]] = ([], [])
        if run.predictions is not None and "pred_fusion" in run.predictions.column_names:
            shown = pair_examples(run.predictions, run.confusion.classes, pair)
        found.append((pair, *shown))
    return found


def clusters(run: ReportData, choice: Choice, drawn: Curves, media: Media) -> str:
    """Health of the rounds and a contact sheet of the last one."""
    title = "Pseudo-labels"
    if not run.rounds:
        return absent("clusters", title, "No clustering: this run made no pseudo-labels.")
    body = ["<h3>Rounds</h3>", charts(drawn, "rounds"), health_table(run.rounds)]
    if choice.clusters:
        shown = len(choice.clusters)
        some = "All" if shown == choice.n_clusters else f"The {shown} largest of"
        body.append(
            f"<h3>What is in a cluster</h3><p class='note'>{some} {number(choice.n_clusters)} "
            "clusters of the last round, clips as good as at random. The label is that of most of "
            "its clips; a red, crossed frame is a clip with another label. "
            f"{below_frames(media)}</p>"
        )
        cards = "".join(_cluster_card(cluster, media) for cluster in choice.clusters)
        body.append(f'<div class="clusters">{cards}</div>')
    lead = (
        "Clusters of the encoder's own features, made without looking at labels. Agreement with "
        "the true labels is measured for this page only; training never sees it."
    )
    return section("clusters", title, lead, *body)


def _cluster_card(cluster: Cluster, media: Media) -> str:
    name = cluster.majority or f"cluster {cluster.label}"
    share = f"{percent(cluster.purity, 0)} of " if cluster.majority else ""
    return (
        f'<div class="card cluster"><header><b title="{text(name)}">{text(name)}</b>'
        f"<span>{share}{number(cluster.size)}</span></header>"
        f"{strip(cluster.examples, media, 3, caption=False)}</div>"
    )


def below_frames(media: Media) -> str:
    """What stands below the frames of a gallery."""
    if media.spec is None or not media.spectrograms:
        return ""
    said = f"Below a frame is its spectrogram: {axes_in_words(media.spec)}"
    if not media.sounds:
        return text(f"{said}.")
    return text(f"{said}; press it to hear {_origin(media)}.")


def _origin(media: Media) -> str:
    made = sum(media.why_synthesised.values())
    length = f"the first seconds (at most {EXCERPT_S:g})"
    if not made:
        return f"{length} of the source clip"
    why = ", ".join(f"{reason}: {n}" for reason, n in media.why_synthesised.most_common())
    if made == len(media.sounds):
        return f"{SYNTHESISED_S:g} s synthesised from the stored features ({why})"
    return (
        f"{length} of the source clip, or, where that says synthesised, {SYNTHESISED_S:g} s made "
        f"from the stored features ({why})"
    )


def retrieval(run: ReportData, choice: Choice, media: Media) -> str:
    """Sounds (as spectrograms), and the pictures the encoder finds for them."""
    title = "Sound finds picture"
    if not choice.queries:
        why = "No retrieval examples: no embeddings of the test clips were kept."
        return absent("retrieval", title, why)
    assert run.embeddings is not None
    rows = "".join(_query_row(query, media) for query in choice.queries)
    lead = (
        f"For the sound of a test clip, the five nearest of {number(len(run.embeddings.clip_ids))} "
        "pictures. Green: the clip's own picture; blue: another clip of its class; red and "
        "crossed: neither."
    )
    return section("retrieval", title, lead, f'<div class="card">{rows}</div>')


_MARKS_HZ = (500.0, 2000.0, 8000.0, 24000.0)


def _query_row(query: Query, media: Media) -> str:
    clip_id = query.query.clip_id
    name = text(query.label or clip_id)
    return (
        f'<div class="query"><div class="asked">{_large(clip_id, media)}<h3>{name}</h3>'
        f"<p>{text(clip_id)}</p><p>own picture at rank {number(query.rank)}</p></div>"
        f"{strip(query.found, media, max(len(query.found), 1))}</div>"
    )


def _large(clip_id: str, media: Media) -> str:
    """A spectrogram with marks at its axes."""
    spectrogram = media.spectrograms.get(clip_id)
    if spectrogram is None or media.spec is None:
        return ""
    heights = heights_of_hz(media.spec, _MARKS_HZ)
    marks = [
        f'<span class="hz" style="bottom:{100 * height:.1f}%">{hz / 1000:g} kHz</span>'
        for hz, height in heights
    ]
    marks += [
        f'<span class="s" style="left:{50 * k}%">{spectrogram.seconds * k / 2:.3g} s</span>'
        for k in range(3)
    ]
    axes = f'<div aria-hidden="true">{"".join(marks)}</div>'
    return f'<div class="axes">{sound(clip_id, media)}{axes}</div>'
