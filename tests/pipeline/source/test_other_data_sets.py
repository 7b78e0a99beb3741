"""The manifests of docs/datasets.md: its Python runs on files of the data sets' own form."""

import re
from pathlib import Path

import pytest

from pipeline.source.listing import list_sources

_PAGE = Path(__file__).resolve().parents[3] / "docs" / "datasets.md"
_FILES = {
    "audioset": {
        "class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
        '1,/m/05zppz,"Male speech, man speaking"\n',
        "balanced_train_segments.csv": "# Segments csv created\n# num_ytids=1\n"
        '-0abcdefghi, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n',
        "unbalanced_train_segments.csv": '# x\nzzzzzzzzzzz, 0.000, 10.000, "/m/05zppz"\n',
        "eval_segments.csv": '# x\n--4gqARaEJE, 0.000, 10.000, "/m/09x0r"\n',
    },
    "kinetics-sounds": {
        "classes.txt": "tap dancing\nplaying organ\n",
        "train.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
        "tap dancing,-0abcdefghi,5,15,train,0\nyoga,zzzzzzzzzzz,5,15,train,0\n",
        "val.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
        "playing organ,aaaaaaaaaaa,105,115,val,0\n",
    },
    "ucf101": {
        "trainlist01.txt": "Bowling/v_Bowling_g08_c1.avi 1\n",
        "testlist01.txt": "Bowling/v_Bowling_g01_c2.avi\n",
    },
}
_EXPECTED = {
    "audioset": [
        ("-0abcdefghi", "Speech", "Male speech, man speaking", "train", "-0abcdefghi"),
        ("zzzzzzzzzzz", "Male speech, man speaking", None, "train", "zzzzzzzzzzz"),
        ("--4gqARaEJE", "Speech", None, "test", "--4gqARaEJE"),
    ],
    "kinetics-sounds": [
        ("train__-0abcdefghi_000005_000015", "tap dancing", None, "train", "-0abcdefghi"),
        ("val__aaaaaaaaaaa_000105_000115", "playing organ", None, "test", "aaaaaaaaaaa"),
    ],
    "ucf101": [
        ("Bowling__v_Bowling_g08_c1", "Bowling", None, "train", "v_Bowling_g08"),
        ("Bowling__v_Bowling_g01_c2", "Bowling", None, "test", "v_Bowling_g01"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", _FILES)
def test_the_pages_code_makes_a_manifest_that_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = _PAGE.read_text()
    section = page[page.index(f"(`configs/{name}.yaml`)") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code
    for file, content in _FILES[name].items():
        (tmp_path / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    lines = (tmp_path / f"{name}.csv").read_text().splitlines()[1:]
    for line in lines:
        clip = tmp_path / "videos" / line.split(",")[0]
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.touch()
    rows = list_sources(str(tmp_path / f"{name}.csv"), str(tmp_path / "videos")).clips.to_pylist()
    columns = ("clip_id", "label", "more_labels", "split", "group")
    assert [tuple(row[column] for column in columns) for row in rows] == _EXPECTED[name]
