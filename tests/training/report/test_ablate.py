"""What is shown of an ablation: tables, differences, a figure."""

from pathlib import Path

from training.evaluation.paired import contrasts
from training.evaluation.variants import VARIANTS, Variant
from training.report.ablate import (
    contrast_rows,
    draw,
    draw_response,
    markdown,
    note,
    variant_rows,
)

_SEEDS = {0: 0.61, 1: 0.48, 2: 0.72, 3: 0.55, 4: 0.66}
_VALUES = {
    "instance": _SEEDS,
    "full": {seed: x + 0.01 + 0.002 * seed for seed, x in _SEEDS.items()},
    "gamma0": {0: 0.7},
}
_METRICS = {v: {s: {"probe/audio_video": x} for s, x in by.items()} for v, by in _VALUES.items()}


def test_tables_and_figure_show_every_variant_and_difference(tmp_path: Path) -> None:
    differences = contrasts(_VALUES)
    header, rows = variant_rows(_METRICS, "probe/audio_video")
    assert header[:3] == ["variant", "seeds", "probe/audio_video"]
    assert [row[:2] for row in rows] == [["instance", "5"], ["full", "5"], ["gamma0", "1"]]
    _, told = contrast_rows(differences)
    assert told[0][0] == "full - instance"
    assert told[0][2] == "+1.4"
    assert told[-1][3:5] == ["-", "-"]
    pinned = {
        "store": {"uri": "s3://b/vgg", "version": 3, "digest": "ab" * 32},
        "config_hash": "c0ffee",
        "split": "validation",
    }
    chosen = {name: VARIANTS[name] for name in _VALUES}
    page = markdown(_METRICS, "probe/audio_video", differences, chosen, pinned, 1234)
    for said in ("version 3", "c0ffee", "1,234 validation clips", "| full - instance | 5 | +1.4"):
        assert said in page
    draw(_METRICS, "probe/audio_video", differences, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "not corrected for 3 comparisons" in note(differences, 1234, "test")


def test_a_sweep_of_numbers_is_a_curve_and_one_of_words_is_not(tmp_path: Path) -> None:
    path = tmp_path / "response.png"
    doses = {
        f"confusion.gamma={value}": Variant("", {}, ("full", "confusion.gamma", value))
        for value in ("0", "0.5", "2")
    }
    words = {"confusion.update=static": Variant("", {}, ("full", "confusion.update", "static"))}
    found = {name: _METRICS["full"] for name in (*doses, *words)}
    shown = {"instance": VARIANTS["instance"], **doses, **words}
    metrics = {"instance": _METRICS["instance"], **found}
    assert draw_response(metrics, "probe/audio_video", shown, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert not draw_response(found, "knn/fusion", shown, tmp_path / "none.png")
    only_words = {name: found[name] for name in words}
    assert not draw_response(only_words, "probe/audio_video", shown, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
