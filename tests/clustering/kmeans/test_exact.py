"""Sums on the grid do not depend on order; float32 sums do."""

import numpy as np
import pytest

from clustering.kmeans.exact import add_by_label, fixed_point_sum, grid_exponent, snap


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _grouped_sum(x: np.ndarray, groups: int, dtype: type) -> np.ndarray:
    order = np.random.default_rng(groups).permutation(len(x))
    total = np.zeros(x.shape[1], dtype=dtype)
    for part in np.array_split(order, groups):
        total += x[part].astype(dtype).sum(axis=0)
    return total


def test_sums_of_snapped_rows_are_the_same_bits_in_any_grouping(rows: np.ndarray) -> None:
    x = snap(rows, grid_exponent(1.0, len(rows)))
    sums = {_grouped_sum(x, groups, np.float64).tobytes() for groups in (1, 2, 3, 5, 17)}
    assert len(sums) == 1


def test_control_float32_sums_depend_on_the_grouping(rows: np.ndarray) -> None:
    x = snap(rows, grid_exponent(1.0, len(rows)))
    sums = {_grouped_sum(x, groups, np.float32).tobytes() for groups in (1, 2, 3, 5, 17)}
    assert len(sums) > 1


@pytest.mark.parametrize(
    ("max_abs", "n_rows", "exponent"),
    [(1.0, 10, -30), (1.0, 2**23, -30), (1.0, 2**23 + 1, -29), (1.5, 10, -29), (3e5, 10, -11)],
)
def test_grid_follows_magnitude_and_number_of_rows(
    max_abs: float, n_rows: int, exponent: int
) -> None:
    assert grid_exponent(max_abs, n_rows) == exponent


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 7.3e4, 1e30])
@pytest.mark.parametrize("n_rows", [1, 1000, 2**23, 10**9])
def test_the_largest_possible_sum_stays_below_the_limit_of_float64(
    magnitude: float, n_rows: int
) -> None:
    units = n_rows * np.rint(magnitude * 2.0 ** -grid_exponent(magnitude, n_rows))
    assert units <= 2**53


def test_snapping_changes_values_by_at_most_half_a_grid_step(rows: np.ndarray) -> None:
    snapped = snap(rows, -30)
    assert np.abs(snapped.astype(np.float64) - rows).max() <= 2.0**-31
    assert np.array_equal(snap(snapped, -30), snapped)


def test_rows_are_added_to_the_sum_of_their_label() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1300, 5)).astype(np.float32)
    labels = rng.integers(7, size=1300)
    sums = rng.normal(size=(7, 5))
    expected = sums.copy()
    np.add.at(expected, labels, x.astype(np.float64))
    add_by_label(x, labels, sums)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-12)


def test_fixed_point_sums_are_whole_numbers_of_grid_steps() -> None:
    assert fixed_point_sum(np.array([0.5, 0.25, 0.26]), -2) == 4
