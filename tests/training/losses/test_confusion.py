"""The running confusion matrix: its average over epochs, its weights, and its hard cases."""

from typing import Any

import pytest
import torch
from support.ranks import run_ranks

from training.config import ConfusionConfig
from training.losses.confusion import (
    ConfusionState,
    confusion_weights,
    control_weights,
    mean_offdiagonal,
    relative_degrees,
)

_K = 5
_CLIPS = torch.full((_K,), 20)


def _matrix(seed: int = 0, n_classes: int = _K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(n_classes, n_classes, generator=generator).double(), 1)


def test_weights_equal_their_definition():
    confusion = _matrix()
    degree = [[(confusion[k, m] + confusion[m, k]) / 2 for m in range(_K)] for k in range(_K)]
    expected = torch.ones(_K, _K, dtype=torch.float64)
    for k in range(_K):
        mean = sum(degree[k][m] for m in range(_K) if m != k) / (_K - 1)
        for m in range(_K):
            if m != k:
                expected[k, m] = min(max((degree[k][m] / mean) ** 1.5, 1.0), 2.0)
    torch.testing.assert_close(confusion_weights(confusion, 1.5, 2.0), expected)


def test_each_row_of_degrees_has_mean_one():
    degrees = relative_degrees(_matrix())
    torch.testing.assert_close(degrees.sum(1) / (_K - 1), torch.ones(_K).double())


def test_gamma_zero_gives_exact_ones():
    assert torch.equal(confusion_weights(_matrix(), 0.0, 10.0), torch.ones(_K, _K).double())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(
    "confusion",
    [
        torch.eye(_K),
        torch.zeros(_K, _K),
        torch.full((_K, _K), 1 / _K),
        torch.eye(_K) * (1 - 1e-40) + 1e-40,
        torch.tensor([[1.0]]),
    ],
    ids=["none", "empty classes", "total", "denormal", "one class"],
)
def test_weights_are_finite_and_at_least_one(confusion, gamma):
    weights = confusion_weights(confusion, gamma, 10.0)
    assert torch.isfinite(weights).all()
    assert weights.min() >= 1
    assert weights.max() <= 10
    assert torch.equal(weights.diagonal(), torch.ones(len(weights)).double())


def test_gamma_and_w_max_out_of_range_are_refused():
    with pytest.raises(ValueError, match="gamma = -1"):
        confusion_weights(_matrix(), -1, 10)
    with pytest.raises(ValueError, match=r"w_max = 0\.5"):
        confusion_weights(_matrix(), 1, 0.5)


def test_one_epoch_leaves_the_configured_share_of_the_old_estimate():
    old, new = _matrix(1), _matrix(2)
    state = ConfusionState(old, _CLIPS, ConfusionConfig(ema_per_epoch=0.25))
    state.accumulate(new, torch.arange(_K))
    state.update(1.0, since_labels_epochs=1)
    torch.testing.assert_close(state.confusion_KK, 0.25 * old + 0.75 * new)


@pytest.mark.parametrize("updates", [2, 7, 50])
def test_an_epoch_counts_the_same_however_often_it_is_updated(updates):
    old, new = _matrix(1), _matrix(2)
    state = ConfusionState(old, _CLIPS, ConfusionConfig(ema_per_epoch=0.5))
    for _ in range(updates):
        state.accumulate(new, torch.arange(_K))
        state.update(1 / updates, since_labels_epochs=1)
    torch.testing.assert_close(state.confusion_KK, (old + new) / 2)


def test_a_class_seen_late_catches_up_on_the_epochs_it_missed():
    old, new = _matrix(1), _matrix(2)
    state = ConfusionState(old, _CLIPS, ConfusionConfig(ema_per_epoch=0.5))
    state.accumulate(new[:2], torch.tensor([0, 1]))
    state.update(1.0, since_labels_epochs=1)
    torch.testing.assert_close(state.confusion_KK[2:], old[2:])
    state.accumulate(new[2:], torch.tensor([2, 3, 4]))
    state.update(1.0, since_labels_epochs=2)
    torch.testing.assert_close(state.confusion_KK[2:], 0.25 * old[2:] + 0.75 * new[2:])
    torch.testing.assert_close(state.confusion_KK[:2], (old[:2] + new[:2]) / 2)


def test_rows_are_means_over_clips_and_ignore_unlabelled_ones():
    posteriors = torch.softmax(torch.randn(6, _K).double(), 1)
    state = ConfusionState(_matrix(), _CLIPS, ConfusionConfig(ema_per_epoch=0))
    state.accumulate(posteriors[:4], torch.tensor([3, -100, 3, 0]))
    state.accumulate(posteriors[4:], torch.tensor([3, -100]))
    state.update(1.0, since_labels_epochs=1)
    torch.testing.assert_close(state.confusion_KK[3], posteriors[[0, 2, 4]].mean(0))
    torch.testing.assert_close(state.confusion_KK[0], posteriors[3])
    torch.testing.assert_close(state.confusion_KK[1:3], _matrix()[1:3])
    torch.testing.assert_close(state.confusion_KK.sum(1), torch.ones(_K).double())


def test_static_keeps_the_published_matrix():
    state = ConfusionState(_matrix(1), _CLIPS, ConfusionConfig(update="static", ramp_epochs=0))
    state.accumulate(_matrix(2), torch.arange(_K))
    state.update(1.0, since_labels_epochs=1)
    assert torch.equal(state.confusion_KK, _matrix(1))
    torch.testing.assert_close(state.weights_KK, confusion_weights(_matrix(1), 1.0, 10.0).float())


@pytest.mark.parametrize(("since", "gamma"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (9.0, 2.0)])
def test_gamma_ramps_in_after_the_first_labels(since, gamma):
    state = ConfusionState(
        _matrix(), _CLIPS, ConfusionConfig(gamma=2, ramp_epochs=2, update="static")
    )
    state.update(0.1, since_labels_epochs=since)
    expected = confusion_weights(_matrix(), gamma, 10.0).float()
    torch.testing.assert_close(state.weights_KK, expected)


def test_pseudo_counts_need_as_many_confusions_before_a_weight_leaves_one() -> None:
    """Of 10 clips of class 0, four are taken for class 1; twice as many clips are twice the
    evidence."""
    confused = torch.eye(3).double()
    confused[0] = torch.tensor([0.6, 0.4, 0.0])
    found = {}
    for n in (10, 20, 10**9):
        config = ConfusionConfig(pseudo_counts=2, ramp_epochs=0, update="static")
        state = ConfusionState(confused, torch.full((3,), n), config)
        state.update(0.1, since_labels_epochs=1)
        found[n] = float(state.weights_KK[0, 1])
    # D_01 = 0.4 / 2 + 2 / n, D_02 = 2 / n; the weight is D_01 over their mean
    assert found[10] == pytest.approx(0.4 / 0.3)
    assert found[20] == pytest.approx(0.3 / 0.2)
    assert found[10**9] == pytest.approx(2.0)


def test_mean_confusion_degree_is_the_mass_on_wrong_classes():
    assert mean_offdiagonal(torch.eye(3)) == 0
    assert float(mean_offdiagonal(torch.full((4, 4), 0.25))) == pytest.approx(0.75)


def test_a_restored_state_goes_on_exactly():
    config = ConfusionConfig()
    state = ConfusionState(_matrix(1), _CLIPS, config)
    state.accumulate(_matrix(2)[:2], torch.tensor([0, 1]))
    state.update(0.3, since_labels_epochs=0.3)
    state.accumulate(_matrix(3), torch.arange(_K))
    restored = ConfusionState(_matrix(9), _CLIPS, config)
    restored.load_state_dict(state.state_dict())
    for each in (state, restored):
        each.accumulate(_matrix(4), torch.arange(_K))
        each.update(0.3, since_labels_epochs=0.6)
    assert torch.equal(restored.confusion_KK, state.confusion_KK)
    assert torch.equal(restored.weights_KK, state.weights_KK)
    assert restored.mean_offdiagonal == state.mean_offdiagonal


def _confusion_of_ranks(rank: int, size: int) -> dict[str, torch.Tensor]:
    """A matrix updated after a checkpoint, by the ranks that made it or by one alone."""
    config = ConfusionConfig(ramp_epochs=0)
    posteriors_BK = torch.rand(48, 4, generator=torch.Generator().manual_seed(5)).softmax(1)
    labels_B = torch.arange(48) % 4
    mine = slice(rank * 48 // size, (rank + 1) * 48 // size)
    state = ConfusionState(torch.eye(4), torch.full((4,), 12), config)
    state.accumulate(posteriors_BK[mine], labels_B[mine])
    saved = state.state_dict()
    resumed = ConfusionState(torch.eye(4), torch.full((4,), 12), config)
    resumed.load_state_dict(saved)
    for each in (state, resumed):
        each.accumulate(posteriors_BK[mine].flip(1), labels_B[mine])
        each.update(0.5, since_labels_epochs=1.0)
    return {
        "sums": saved["sums_KK1"],
        "whole": state.confusion_KK,
        "resumed": resumed.confusion_KK,
    }


def test_what_ranks_have_seen_is_one_sum_and_exact_for_any_number_of_them() -> None:
    alone = _confusion_of_ranks(0, 1)
    for size in (2, 3):
        for outcome in run_ranks(size, _confusion_of_ranks):
            assert outcome["sums"].shape == (4, 5)
            for name in ("sums", "whole", "resumed"):
                assert torch.equal(outcome[name], alone[name])
            assert torch.equal(outcome["whole"], outcome["resumed"])


def test_controls_keep_the_weights_of_a_class_and_forget_their_pairs() -> None:
    weights = confusion_weights(_matrix(n_classes=20), 1.0, 10.0)
    shuffled, constant = (control_weights(weights, name, 3) for name in ("shuffled", "constant"))
    for found in (shuffled, constant):
        torch.testing.assert_close(found.sum(1), weights.sum(1))
        assert torch.equal(found.diagonal(), torch.ones(20).double())
    assert torch.equal(shuffled.sort(1).values, weights.sort(1).values)
    assert (shuffled != weights).any(1).all()
    assert torch.equal(shuffled, control_weights(weights, "shuffled", 3))
    assert not torch.equal(shuffled, control_weights(weights, "shuffled", 4))
    others = constant[~torch.eye(20, dtype=torch.bool)].view(20, 19)
    assert (others == others[:, :1]).all()


def test_a_deal_is_drawn_once_for_all_updates_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 3,000 classes a draw is 9 million numbers, sorted: 6 s of each update."""
    config = ConfusionConfig.model_validate({"weights": "shuffled", "ramp_epochs": 0})
    n_classes, seed = 23, 77  # Of no other test: nothing is drawn yet.
    drawn: list[tuple[int, ...]] = []
    rand = torch.rand

    def counted(size: tuple[int, ...], **options: Any) -> torch.Tensor:
        drawn.append(tuple(size))
        return rand(size, **options)

    monkeypatch.setattr(torch, "rand", counted)
    clips_K = torch.full((n_classes,), 20)
    for round_seed in (1, 2):
        state = ConfusionState(_matrix(round_seed, n_classes), clips_K, config, seed)
        for _ in range(2):
            state.update(1.0, since_labels_epochs=1)
    assert drawn == [(n_classes, n_classes - 1)]
    weights = confusion_weights(_matrix(2, n_classes) + state.prior_K1, config.gamma, config.w_max)
    others = ~torch.eye(n_classes, dtype=torch.bool)
    rows, generator = weights[others].view(drawn[0]), torch.Generator().manual_seed(seed)
    deal = rand(drawn[0], generator=generator).argsort(dim=1)
    assert torch.equal(state.weights_KK[others].view(drawn[0]), rows.gather(1, deal).float())


def test_a_control_is_what_the_state_weighs_with() -> None:
    found = {}
    for name in ("degree", "shuffled"):
        config = ConfusionConfig.model_validate({"weights": name, "ramp_epochs": 0})
        state = ConfusionState(_matrix(), _CLIPS, config, seed=1)
        state.update(1.0, since_labels_epochs=1)
        found[name] = state.weights_KK
    assert not torch.equal(found["degree"], found["shuffled"])
    assert torch.equal(found["shuffled"], control_weights(found["degree"], "shuffled", 1))
