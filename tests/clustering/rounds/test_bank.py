"""The bank holds the newest row of each clip, whatever the order of pushes, and across deaths."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.hashing import vshard_of
from clustering.pool.bank_actor import BankActor
from clustering.rounds.bank import Bank, BankRows, check_push
from clustering.rounds.frozen import Owner, read_rows
from clustering.rounds.saved import forget_saved, kept_files, together, write_saved

STREAMS = {"audio": 2, "video": 3}


def _rows(keys: list[int], steps: list[int], seed: int = 0) -> BankRows:
    values = np.random.default_rng(seed).normal(size=(len(keys), 5)).astype(np.float16)
    return BankRows(np.array(keys, dtype=np.uint64), np.array(steps, dtype=np.int64), values)


def _same(a: BankRows, b: BankRows) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_newest_row_of_a_clip_wins_in_any_order() -> None:
    pushes = [
        _rows([k, k + 1, 7], [step, step, step], seed=step) for step in range(6) for k in [1, 5]
    ]
    frozen = []
    for seed in range(5):
        bank = Bank(5)
        for i in np.random.default_rng(seed).permutation(len(pushes)):
            bank.push(*pushes[i])
            if seed == 3:
                bank.freeze(3)
        frozen.append(bank.freeze(5))
    assert frozen[0].keys.tolist() == [1, 2, 5, 6, 7]
    assert frozen[0].steps.tolist() == [5, 5, 5, 5, 5]
    assert all(_same(frozen[0], other) for other in frozen[1:])


def test_equal_steps_are_decided_by_content_not_by_order() -> None:
    a, b = _rows([9], [4], seed=1), _rows([9], [4], seed=2)
    results = []
    for first, second in [(a, b), (b, a)]:
        bank = Bank(5)
        bank.push(*first)
        bank.freeze(4)
        bank.push(*second)
        results.append(bank.freeze(4))
    assert _same(*results)


def test_rows_of_later_steps_wait_for_the_next_round() -> None:
    early, late = _rows([1, 2], [10, 10], seed=1), _rows([2, 3], [11, 11], seed=2)
    bank = Bank(5)
    bank.push(*late)
    bank.push(*early)
    assert _same(bank.freeze(10), early)
    assert bank.freeze(11).keys.tolist() == [1, 2, 3]


def test_looking_at_the_bank_does_not_change_the_next_freeze() -> None:
    bank = Bank(5)
    bank.push(*_rows([1, 2], [10, 12]))
    assert bank.ages() == (2, 22, 10, 12, bank.n_bytes)
    assert bank.everything().keys.tolist() == [1, 2]
    assert bank.freeze(10).keys.tolist() == [1]


def test_old_versions_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clustering.rounds.bank._FOLD_ROWS", 100)
    bank = Bank(5)
    for step in range(500):
        bank.push(*_rows(list(range(20)), [step] * 20))
    assert bank.n_bytes <= 26 * (16 + 20) * 20
    assert bank.freeze(498).steps.tolist() == [498] * 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((2, 5), np.nan), "2 of 2 rows hold NaN, infinity or only zeros in stream audio"),
        (np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]), "stream video: keys 12"),
        (np.array([[1, 1, 1, 1, 1], [1e6, 1, 0, 0, 1]]), "stream audio: keys 12"),
        (np.ones((2, 4)), r"shape \(2, 4\) for 2 keys; the bank holds rows of 5"),
        (np.ones((3, 5)), r"shape \(3, 5\) for 2 keys"),
    ],
)
def test_rows_that_cannot_be_clustered_are_refused_by_key(rows: np.ndarray, message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(BadVectors, match=message):
        check_push(np.array([11, 12]), rows, STREAMS)


def test_a_push_is_copied() -> None:
    rows = np.ones((1, 5), dtype=np.float16)
    _, kept = check_push(np.array([1]), rows, STREAMS)
    rows[:] = 7
    assert (kept == 1).all()


def _actor(folder: Path, index: int = 0, count: int = 1) -> BankActor:
    return BankActor(Owner(index, count, 8), str(folder / str(index)), str(folder), STREAMS)


def _frozen(actor: BankActor, folder: Path, step: int) -> BankRows:
    part = actor.freeze(str(folder / f"part-{step}.parquet"), step)
    groups = list(read_rows(part.uri, 5))
    rows = BankRows.concat(groups)
    assert (np.diff([*vshard_of(rows.keys, 8)]) >= 0).all()
    return rows.take(np.argsort(rows.keys))


def test_acknowledged_rows_survive_the_death_of_their_bank(tmp_path: Path) -> None:
    first, second = _rows([1, 2, 3], [5, 5, 5], seed=1), _rows([2, 4], [6, 6], seed=2)
    undisturbed = Bank(5)
    undisturbed.push(*first)
    undisturbed.push(*second)
    actor = _actor(tmp_path)
    actor.push(*first)
    actor.sync()
    actor = _actor(tmp_path)
    actor.push(*second)
    actor.sync()
    actor = _actor(tmp_path)
    assert _same(_frozen(actor, tmp_path, 6), undisturbed.freeze(6))
    third = _rows([4, 5], [7, 7], seed=3)
    undisturbed.push(*third)
    actor = _actor(tmp_path)
    actor.push(*third)
    actor.sync()
    assert _same(_frozen(_actor(tmp_path), tmp_path, 7), undisturbed.freeze(7))


def test_rows_that_were_not_acknowledged_are_lost_with_their_bank(tmp_path: Path) -> None:
    actor = _actor(tmp_path)
    incarnation = actor.push(*_rows([1], [1]))
    assert actor.sync() == incarnation
    actor.push(*_rows([2], [1]))
    restarted = _actor(tmp_path)
    assert restarted.sync() != incarnation
    assert restarted.ages()[0] == 1


def test_a_freeze_that_died_halfway_is_repeated_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = _actor(tmp_path)
    actor.push(*_rows([1, 2, 3], [1, 1, 1]))
    actor.sync()
    expected = _frozen(_actor(tmp_path), tmp_path / "expected", 1)
    for moment in ("write", "rebase"):
        actor = _actor(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(actor._log, moment, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                _frozen(actor, tmp_path, 1)
        actor = _actor(tmp_path)
        actor.push(*_rows([2, 9], [2, 2], seed=5))
        assert _same(_frozen(actor, tmp_path / moment, 1), expected)


def test_saved_rows_are_restored_into_any_number_of_banks(tmp_path: Path) -> None:
    rows = _rows(list(range(100)), [3] * 100)
    two = [_actor(tmp_path / "two", i, 2) for i in range(2)]
    for i, actor in enumerate(two):
        actor.push(*rows.take(vshard_of(rows.keys, 8) % 2 == i))
    saved = str(tmp_path / "two" / "bank-1")
    write_saved(saved, together([actor.saved() for actor in two]))
    three = [_actor(tmp_path / "three", i, 3) for i in range(3)]
    for actor in three:
        actor.push(*_rows([500], [9]))
        actor.sync()
        actor.restore(saved)
    restarted = [_actor(tmp_path / "three", i, 3) for i in range(3)]
    assert sum(actor.ages()[0] for actor in restarted) == 100
    with pytest.raises(ClusteringError, match="no saved bank"):
        three[0].restore(str(tmp_path / "elsewhere"))


def test_banks_read_each_saved_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = _actor(tmp_path / "one")
    actor.push(*_rows(list(range(100)), [3] * 100))
    saved = str(tmp_path / "one" / "bank-1")
    write_saved(saved, actor.saved())
    read = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group: (read.append(group), whole(self, group))[1],
    )
    four = [_actor(tmp_path / "four", i, 4) for i in range(4)]
    for actor in four:
        actor.restore(saved)
    assert sorted(read) == list(range(8))
    assert sum(actor.ages().n_rows for actor in four) == 100


def _as_saved(folder: Path, actor: BankActor, name: str = "bank-1") -> BankRows:
    """What another bank finds in a saved state."""
    write_saved(str(folder / name), actor.saved())
    other = _actor(folder / "other")
    other.restore(str(folder / name))
    return other._bank.everything()


def test_segments_are_merged_into_a_base_and_into_levels_without_losing_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustering.rounds.log._BASE_ROWS", 100)
    monkeypatch.setattr("clustering.rounds.log._LEVEL_SEGMENTS", 4)
    undisturbed, actor = Bank(5), _actor(tmp_path)
    pushed = written = 0
    sizes: dict[str, int] = {}
    for step in range(400):
        rows = _rows([(7 * step + i) % 60 for i in range(3)], [step] * 3, seed=step)
        undisturbed.push(*rows)
        actor.push(*rows)
        actor.sync()
        actor.forget(set())
        for path in (tmp_path / "0").glob("*.parquet"):
            if path.name not in sizes:
                sizes[path.name] = len(pq.read_table(path))
                written += sizes[path.name]
        pushed += 3
        if step % 57 == 0:
            actor = _actor(tmp_path)
    assert written <= 4 * pushed  # as they are, in a base, in two levels
    left = list((tmp_path / "0").glob("*.parquet"))
    assert sum(sizes[path.name] for path in left) <= 60 + 100 + 3 * 16
    assert len(left) <= 1 + 3 * 4 + 16
    assert _same(_as_saved(tmp_path, actor), undisturbed.everything())
    assert _same(_frozen(actor, tmp_path, 399), undisturbed.freeze(399))


def test_merging_leaves_the_rows_of_a_freeze_that_is_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustering.rounds.log._BASE_ROWS", 10)
    monkeypatch.setattr("clustering.rounds.log._LEVEL_SEGMENTS", 2)
    actor = _actor(tmp_path)
    early = _rows([1, 2], [10, 10], seed=1)
    actor.push(*early)
    actor.sync()
    actor.hold(10)
    for step in range(40, 60):
        actor.push(*_rows([1, 2, 3], [step] * 3, seed=step))
        actor.sync()
    write_saved(str(tmp_path / "bank-1"), actor.saved())
    for folder in (tmp_path, tmp_path / "other"):
        resumed = _actor(folder)
        resumed.restore(str(tmp_path / "bank-1"))
        # After its death, too.
        assert _same(_frozen(_actor(folder), folder / "frozen", 10), early)
        assert _actor(folder).ages()[:4] == (3, 177, 59, 59)


def test_a_saved_state_stays_what_it_was_until_it_is_forgotten(tmp_path: Path) -> None:
    actor, home = _actor(tmp_path), str(tmp_path)
    first, second = _rows([1, 2, 3], [5, 5, 5], seed=1), _rows([2, 4], [6, 6], seed=2)
    actor.push(*first)
    write_saved(str(tmp_path / "bank-1"), actor.saved())
    actor.push(*second)
    actor.sync()
    frozen = _frozen(actor, tmp_path, 6)
    actor.forget(kept_files(home))
    write_saved(str(tmp_path / "bank-2"), actor.saved())
    elsewhere = _actor(tmp_path / "elsewhere")
    elsewhere.restore(str(tmp_path / "bank-1"))
    assert _same(elsewhere._bank.everything(), first)
    elsewhere.restore(str(tmp_path / "bank-2"))
    assert _same(elsewhere._bank.everything(), frozen)
    actor.forget(kept_files(home))
    assert len(list((tmp_path / "0").glob("segment-*"))) == 1
    forget_saved(home, 1)
    actor.forget(kept_files(home))
    assert not list((tmp_path / "0").glob("segment-*"))
    elsewhere.restore(str(tmp_path / "bank-2"))
    assert _same(elsewhere._bank.everything(), frozen)
    with pytest.raises(ClusteringError, match="no saved bank"):
        elsewhere.restore(str(tmp_path / "bank-1"))
    with pytest.raises(ClusteringError, match=r"is a folder bank-\*"):
        write_saved(str(tmp_path / "elsewhere" / "checkpoint"), actor.saved())
