"""The sections of a report that show clips: clusters, confusion, retrieval.

Knows nothing of how frames are read: it is given pictures by clip id.
Invariant: what is shown is chosen by `examples`, never by hand.
"""

from typing import Any, NamedTuple

from training.evaluation.results import ConfusionCounts
from training.report.confusions import (
    Pair,
    accuracy,
    group_classes,
    pair_of,
    worst_pairs,
)
from training.report.examples import (
    Cluster,
    Example,
    Query,
    cluster_examples,
    pair_examples,
    retrieval_examples,
)
from training.report.folder import ReportData
from training.report.markup import absent, number, percent, section, strip, table, text
from training.report.sections import charts, health_table


class Choice(NamedTuple):
    """Everything a report shows frames of."""

    pairs: list[tuple[Pair, list[Example], list[Example]]]
    clusters: list[Cluster]
    n_clusters: int
    queries: list[Query]

    def clip_ids(self) -> set[str]:
        """The clips whose frames are needed."""
        shown = [e for _, of_a, of_b in self.pairs for e in (*of_a, *of_b)]
        shown += [e for cluster in self.clusters for e in cluster.examples]
        shown += [e for query in self.queries for e in query.found]
        return {example.clip_id for example in shown}


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
    for pair in worst_pairs(run.confusion.main):
        shown: tuple[list[Example], list[Example]] = ([], [])
        if run.predictions is not None and "pred_fusion" in run.predictions.column_names:
            shown = pair_examples(run.predictions, run.confusion.classes, pair)
        found.append((pair, *shown))
    return found


def clusters(
    run: ReportData, choice: Choice, drawn: list[dict[str, Any]], uris: dict[str, str]
) -> str:
    """Health of the rounds and a contact sheet of the last one."""
    title = "Pseudo-labels"
    if not run.rounds:
        return absent("clusters", title, "No clustering: this run made no pseudo-labels.")
    body = [charts(drawn, "rounds"), "<h3>Rounds</h3>", health_table(run.rounds)]
    if choice.clusters:
        shown = len(choice.clusters)
        some = "All" if shown == choice.n_clusters else f"The {shown} largest of"
        body.append(
            f"<h3>What is in a cluster</h3><p class='note'>{some} {number(choice.n_clusters)} "
            "clusters of the last round, clips as good as at random. The label is that of most of "
            "its clips; a red frame is a clip with another label.</p>"
        )
        cards = "".join(_cluster_card(cluster, uris) for cluster in choice.clusters)
        body.append(f'<div class="clusters">{cards}</div>')
    lead = (
        "Clusters of the encoder's own features, made without looking at labels. Agreement with "
        "the true labels is measured for this page only; training never sees it."
    )
    return section("clusters", title, lead, *body)


def _cluster_card(cluster: Cluster, uris: dict[str, str]) -> str:
    name = cluster.majority or f"cluster {cluster.label}"
    share = f"{percent(cluster.purity, 0)} of " if cluster.majority else ""
    return (
        f'<div class="card cluster"><header><b>{text(name)}</b>'
        f"<span>{share}{number(cluster.size)}</span></header>"
        f"{strip(cluster.examples, uris, 3, caption=False)}</div>"
    )


def confusion_data(run: ReportData) -> dict[str, Any] | None:
    """What the script draws: the order of classes, and the counts that are not zero."""
    if run.confusion is None or not run.confusion.counts:
        return None
    order = group_classes(run.confusion.main)
    return {
        "classes": run.confusion.classes,
        "order": order.positions,
        "boundaries": order.boundaries,
        "counts": {
            stream: [[int(i), int(j), int(n[i, j])] for i, j in zip(*n.nonzero(), strict=True)]
            for stream, n in run.confusion.counts.items()
        },
    }


def confusion(run: ReportData, choice: Choice, uris: dict[str, str]) -> str:
    """The heat map and the most confused pairs."""
    title = "Confusion"
    if run.confusion is None or not run.confusion.counts:
        why = "No confusion matrix: this run was not fine-tuned and evaluated."
        return absent("confusion", title, why)
    streams = list(run.confusion.counts)
    buttons = "".join(
        f'<button data-stream="{s}" aria-pressed="{str(s == streams[-1]).lower()}">{s} '
        f"{percent(accuracy(run.confusion.counts[s]))}</button>"
        for s in streams
    )
    heat = (
        f'<div class="card"><div class="switch" role="group">{buttons}</div><div id="heat">'
        '<canvas role="img" aria-label="Confusion matrix, rows are true classes"></canvas></div>'
        '<p class="key">Rows: the true class; columns: what the model says. Green is right, red '
        "is wrong, stronger is more often. A box holds classes taken for each other.</p></div>"
    )
    body = [heat]
    if choice.pairs:
        cards = "".join(_pair_card(run.confusion, *pair, uris) for pair in choice.pairs)
        body.append(
            "<h3>Most confused pairs</h3><p class='note'>Bars: the share of a class's clips that "
            "go to the other, mean of the two classes, by stream. Frames: test clips of each "
            "class, the confused ones first (red), with how sure the model was.</p>"
            f'<div class="cards">{cards}</div>'
        )
    body.append(_class_table(run.confusion))
    lead = (
        "Which classes are taken for which, by stream. A pair that only the sound, or only the "
        "picture, cannot tell apart shows what the other one adds."
    )
    return section("confusion", title, lead, *body)


def _class_table(confusion: ConfusionCounts) -> str:
    """Each class by itself, the hardest first; folded, since there may be hundreds."""
    streams = list(confusion.counts)
    main = "fusion" if "fusion" in streams else streams[0]
    hardest = sorted(confusion.accuracies(), key=lambda each: each.by_stream[main])
    rows = [
        [
            f'<th scope="row">{text(each.name)}</th>',
            number(each.n_clips),
            *(percent(each.by_stream[s]) for s in streams),
        ]
        for each in hardest
    ]
    inner = table(["class", "clips", *streams], rows)
    return f"<details><summary>Accuracy of each class, hardest first</summary>{inner}</details>"


def _pair_card(
    confusion: ConfusionCounts,
    pair: Pair,
    of_a: list[Example],
    of_b: list[Example],
    uris: dict[str, str],
) -> str:
    a, b = text(confusion.classes[pair.a]), text(confusion.classes[pair.b])
    strips = "".join(
        f'<div><p class="way">{name}: {taken} of {n} taken for {other}</p>'
        f"{strip(examples, uris, 4) if examples else ''}</div>"
        for name, other, taken, n, examples in (
            (a, b, pair.a_as_b, pair.n_a, of_a),
            (b, a, pair.b_as_a, pair.n_b, of_b),
        )
    )
    bars = "".join(_rate_bar(s, pair_of(n, pair.a, pair.b)) for s, n in confusion.counts.items())
    return (
        f'<div class="card pair"><header><b>{a} ↔ {b}</b><span>{percent(pair.rate)}</span></header>'
        f'<div class="bars">{bars}</div>{strips}</div>'
    )


def _rate_bar(stream: str, pair: Pair) -> str:
    return (
        f"<span>{stream}</span><i><i style='width:{100 * pair.rate:.1f}%;"
        f"background:var(--{stream})'></i></i><span>{percent(pair.rate)}</span>"
    )


def retrieval(run: ReportData, choice: Choice, uris: dict[str, str], sounds: dict[str, str]) -> str:
    """Sounds (as spectrograms), and the pictures the encoder finds for them."""
    title = "Sound finds picture"
    if not choice.queries:
        why = "No retrieval examples: no embeddings of the test clips were kept."
        return absent("retrieval", title, why)
    assert run.embeddings is not None
    rows = "".join(_query_row(query, uris, sounds) for query in choice.queries)
    lead = (
        f"For the sound of a test clip, the five nearest of {number(len(run.embeddings.clip_ids))} "
        "pictures. Green: the clip's own picture; blue: another clip of its class; red: neither."
    )
    return section("retrieval", title, lead, f'<div class="card">{rows}</div>')


def _query_row(query: Query, uris: dict[str, str], sounds: dict[str, str]) -> str:
    clip_id = query.query.clip_id
    name = text(query.label or clip_id)
    sound = sounds.get(clip_id)
    image = f'<img src="{sound}" alt="spectrogram of {name}">' if sound else ""
    return (
        f'<div class="query"><div class="sound">{image}<b>{name}</b>'
        f"<span>{text(clip_id)}</span><span>own picture at rank {number(query.rank)}</span></div>"
        f"{strip(query.found, uris, max(len(query.found), 1))}</div>"
    )
