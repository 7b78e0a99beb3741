"""Quotes and control characters in lists of clips: a clip is one line, and so is its label."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import SourceError
from pipeline.ingest.run import plan_ingest


def refused(clips: object, source) -> list[str]:
    """The lines that say why an ingest of this list is refused."""
    with pytest.raises(SourceError) as caught:
        plan_ingest(str(clips), str(source.videos), source.store, None, IngestConfig())
    return str(caught.value).splitlines()


def test_a_stray_quote_is_told_by_its_line_and_costs_no_clip(source):
    """Two quotes: the second closes what the first opened, and the line has four cells again."""
    lines = source.csv.read_text().splitlines()
    for at in (1, 2):
        head, label, split = lines[at].rsplit(",", 2)
        lines[at] = f'{head},"{label},{split}' if at == 1 else f'{head},{label}",{split}'
    source.csv.write_text("\n".join(lines))
    before = source.snapshot().version
    with pytest.raises(SourceError) as caught:
        source.ingest()
    (message,) = str(caught.value).splitlines()
    assert message.startswith(f"{source.csv} line 2: a quote opened there reaches to line 3")
    assert source.snapshot().version == before


def test_a_quoted_label_with_commas_is_a_label(source):
    first, second, *rest = source.csv.read_text().splitlines()
    ytid, start, _, split = second.split(",")
    second = f'{ytid},{start},"playing guitar, electric",{split}'
    source.csv.write_text("\n".join([first, second, *rest]))
    plan = plan_ingest(str(source.csv), str(source.videos), source.store, None, IngestConfig())
    assert plan.restated["label"].to_pylist() == ["playing guitar, electric"]


def test_lines_after_one_with_a_stray_quote_are_told_too(source):
    good, *lines = "f,1,dog,train", 'a,1,"dog,train', 'b,2,cat",train', "", "c/d,1,dog,train"
    source.csv.write_text("\n".join([good, *lines, 'e,1,"dog,train', "", ""]))
    first, second, third = refused(source.csv, source)
    assert "line 2: a quote opened there reaches to line 3" in first
    assert "line 5: 'c/d' is not a video id" in second
    assert "line 6: a quote opened there reaches to line 7" in third


@pytest.mark.parametrize("header", ["uri,label\n", 'uri,"label\n'])
def test_a_quote_that_is_never_closed_is_one_line_in_a_manifest(header, source):
    path = source.csv.with_name("m.csv")
    path.write_text(f'{header}a.mp4,dog\nb.mp4,"dog\nc.mp4,cat\n')
    (message,) = refused(path, source)
    assert "a quote opened there reaches to line" in message


def test_a_cell_too_large_for_a_csv_is_told_by_its_line(source):
    many = "b.mp4,cat\n" * 20_000
    path = source.csv.with_name("m.csv")
    path.write_text(f'uri,label\na.mp4,dog\nb.mp4,"dog\n{many}')
    (message,) = refused(path, source)
    assert message.startswith(f"{path} line 3: field larger than field limit (131072); is a quote")


@pytest.mark.parametrize("kind", ["vggsound", "csv", "parquet", "list in parquet"])
def test_a_label_with_a_control_character_is_refused(kind, source):
    label = "dog\x07" if kind in ("vggsound", "csv") else "dog\ncat"
    path = source.csv.with_name("m.parquet" if "parquet" in kind else "m.csv")
    if kind == "vggsound":
        path.write_text(f"abc,1,{label}s,train\n")
    elif kind == "csv":
        path.write_text(f"uri,label\na.mp4,{label}s\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"uri": ["a.mp4"], "label": [label]}), path)
    else:
        pq.write_table(pa.table({"uri": ["a.mp4"], "labels": [["pig", label]]}), path)
    (message,) = refused(path, source)
    assert f"{path} line {1 + (kind == 'csv')}: label 'dog" in message
    assert "holds a control character; take it out" in message
