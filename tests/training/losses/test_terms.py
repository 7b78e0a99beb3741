"""Each loss against loops over its formula, its invariances, and the labels it must ignore."""

import math

import pytest
import torch
from torch.nn import functional as F

from training.config import STREAMS, ConfusionConfig
from training.losses.confusion import ConfusionState
from training.losses.terms import (
    class_alignment,
    confusion_loss,
    info_nce,
    intra_modal,
    labelled_rows,
    soft_targets,
    supervised_loss,
)

_B, _K, _P = 7, 5, 6
_TAU = 0.1


def _unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture
def h():
    return {s: _unit(_B, _P, seed=i).requires_grad_() for i, s in enumerate(STREAMS)}


@pytest.fixture
def prototypes():
    return {s: _unit(_K, _P, seed=10 + i) for i, s in enumerate(STREAMS)}


@pytest.fixture
def labels():
    return torch.tensor([0, 3, -100, 1, 3, -100, 4])


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(5)
    w = 1 + 3 * torch.rand(_K, _K, generator=generator, dtype=torch.float64)
    return w.fill_diagonal_(1.0)


def _dot(x, y) -> float:
    return sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _literal_info_nce(queries, keys, tau):
    losses = []
    for i in range(len(queries)):
        scores = [math.exp(_dot(queries[i], keys[j]) / tau) for j in range(len(keys))]
        losses.append(-math.log(scores[i] / sum(scores)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("direction", ["both", "v2a"])
def test_info_nce_equals_its_definition(direction):
    audio, video = 3 * _unit(_B, 4, seed=1), 2 * _unit(_B, 4, seed=2)
    found = info_nce(audio, video, _TAU, direction, "global")
    a, v = F.normalize(audio, dim=1), F.normalize(video, dim=1)
    v2a, a2v = _literal_info_nce(v, a, _TAU), _literal_info_nce(a, v, _TAU)
    expected = v2a if direction == "v2a" else (a2v + v2a) / 2
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_accuracy_counts_clips_that_find_their_own():
    eye = torch.eye(4, dtype=torch.float64)
    swapped = eye[[1, 0, 2, 3]]
    assert info_nce(eye, swapped, _TAU, "both", "global").accuracy.item() == pytest.approx(0.5)
    assert info_nce(eye, eye, _TAU, "both", "global").accuracy.item() == 1.0


def test_intra_modal_is_the_mean_over_streams(h):
    second = {s: _unit(_B, _P, seed=20 + i) for i, s in enumerate(STREAMS)}
    first = {s: h[s] for s in ("audio", "video")}
    expected = [
        (_literal_info_nce(h[s], second[s], _TAU) + _literal_info_nce(second[s], h[s], _TAU)) / 2
        for s in first
    ]
    found = intra_modal(first, second, _TAU).item()
    assert found == pytest.approx(sum(expected) / 2, rel=1e-12)


def _literal_confusion(h_s, prototypes_s, labels, weights):
    total, rows = 0.0, 0
    for i, y in enumerate(labels.tolist()):
        if y == -100:
            continue
        q = [_dot(h_s[i], prototypes_s[k]) / _TAU for k in range(len(prototypes_s))]
        others = sum(weights[y][k] * math.exp(q[k]) for k in range(len(q)) if k != y)
        total += -math.log(math.exp(q[y]) / (math.exp(q[y]) + others))
        rows += 1
    return total / rows


@pytest.mark.parametrize("teaches", [STREAMS, ("video", "fusion"), ("audio",)])
def test_class_alignment_equals_its_definition(h, prototypes, labels, teaches):
    ones = torch.ones(_K, _K).tolist()
    pairs = [
        _literal_confusion(h[s], prototypes[t], labels, ones)
        for s in teaches
        for t in STREAMS
        if t != s
    ]
    found = class_alignment(h, prototypes, labels, _TAU, teaches).item()
    assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


@pytest.mark.parametrize("teaches", [STREAMS, ("video", "fusion"), ("audio",)])
def test_confusion_loss_equals_its_definition(h, prototypes, labels, weights, teaches):
    expected = [_literal_confusion(h[s], prototypes[s], labels, weights.tolist()) for s in teaches]
    found = confusion_loss(h, prototypes, labels, _TAU, weights, teaches)
    assert found.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    posteriors = [torch.softmax(h[s].detach() @ prototypes[s].T / _TAU, 1) for s in teaches]
    torch.testing.assert_close(found.posteriors_BK, sum(posteriors) / len(teaches))
    assert not found.posteriors_BK.requires_grad


def test_gamma_zero_is_exactly_cross_entropy(h, prototypes, labels):
    confusion = torch.softmax(_unit(_K, _K, seed=3), 1)
    state = ConfusionState(confusion, torch.ones(_K), ConfusionConfig(gamma=0))
    state.update(0.1, since_labels_epochs=9)
    found = confusion_loss(h, prototypes, labels, _TAU, state.weights_KK, ("audio",)).loss
    logits = h["audio"] @ prototypes["audio"].T / _TAU
    assert found.item() == (F.cross_entropy(logits, labels, reduction="sum") / 5).item()


def test_permuting_cluster_ids_changes_nothing(h, prototypes, labels):
    confusion = torch.softmax(4 * _unit(_K, _K, seed=4), 1)
    posteriors = torch.softmax(5 * _unit(_B, _K, seed=6), 1)
    new_of_old = torch.tensor([3, 0, 4, 1, 2])
    old_of_new = new_of_old.argsort()

    def gradients(confusion, posteriors, prototypes, labels):
        state = ConfusionState(confusion, torch.ones(_K), ConfusionConfig(ramp_epochs=0))
        state.accumulate(posteriors, labels)
        state.update(0.5, since_labels_epochs=1)
        conf = confusion_loss(h, prototypes, labels, _TAU, state.weights_KK, STREAMS).loss
        total = conf + class_alignment(h, prototypes, labels, _TAU, STREAMS)
        return [total.detach(), *torch.autograd.grad(total, list(h.values()))]

    before = gradients(confusion, posteriors, prototypes, labels)
    after = gradients(
        confusion[old_of_new][:, old_of_new],
        posteriors[:, old_of_new],
        {s: m[old_of_new] for s, m in prototypes.items()},
        torch.where(labels >= 0, new_of_old[labels.clamp_min(0)], labels),
    )
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_unlabelled_batch_gives_finite_zero_with_a_gradient_path(h, prototypes, weights):
    labels = torch.full((_B,), -100)
    total = class_alignment(h, prototypes, labels, _TAU, STREAMS)
    total = total + confusion_loss(h, prototypes, labels, _TAU, weights, STREAMS).loss
    total.backward()
    assert total.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in h.values())


def test_unlabelled_clips_change_neither_loss_nor_gradient(h, prototypes, labels, weights):
    kept = labels >= 0
    fewer = {s: x[kept] for s, x in h.items()}
    whole = confusion_loss(h, prototypes, labels, _TAU, weights, STREAMS).loss
    part = confusion_loss(fewer, prototypes, labels[kept], _TAU, weights, STREAMS).loss
    assert whole.item() == pytest.approx(part.item(), rel=1e-12)
    gradient = torch.autograd.grad(whole, h["audio"])[0]
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))
    assert labelled_rows(labels).item() == 5


def test_more_confused_classes_are_pushed_apart_harder(h, prototypes, labels, weights):
    def push(w):
        loss = confusion_loss(h, prototypes, labels, _TAU, w, ("audio",)).loss
        return torch.autograd.grad(loss, h["audio"])[0][0] @ prototypes["audio"][2]

    harder = torch.ones(_K, _K, dtype=torch.float64)
    plain = push(harder)
    harder[0, 2] = 10
    assert push(harder) > plain


@pytest.mark.parametrize("weighted", [False, True])
def test_supervised_loss_equals_its_definition(weights, weighted):
    logits = 3 * _unit(_B, _K, seed=8)
    targets = torch.softmax(4 * _unit(_B, _K, seed=9), 1)
    w = weights if weighted else torch.ones(_K, _K, dtype=torch.float64)
    total = 0.0
    for i in range(_B):
        for k in range(_K):
            others = sum(w[k, m] * math.exp(logits[i, m]) for m in range(_K) if m != k)
            own = math.exp(logits[i, k])
            total -= targets[i, k] * math.log(own / (own + others))
    found = supervised_loss(logits, targets, weights if weighted else None)
    assert found.item() == pytest.approx(float(total) / _B, rel=1e-12)


def test_supervised_loss_survives_extreme_logits(weights):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0, -3.0]])
    loss = supervised_loss(logits, soft_targets(torch.tensor([[1]]), _K), weights)
    assert loss.item() == pytest.approx(2e4 + math.log(weights[1, 0].item()), rel=1e-6)


def test_smoothed_targets_keep_their_mass():
    targets = soft_targets(torch.tensor([[2], [0]]), 4, smoothing=0.2)
    torch.testing.assert_close(
        targets, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    )


def test_losses_are_computed_in_fp32_under_autocast(h, prototypes, labels, weights):
    fp32 = {s: x.detach().float() for s, x in h.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            info_nce(fp32["audio"], fp32["video"], 0.05, "both", "global").loss,
            class_alignment(fp32, prototypes, labels, _TAU, STREAMS),
            confusion_loss(fp32, prototypes, labels, _TAU, weights, STREAMS).loss,
        ]
    expected = [
        info_nce(h["audio"], h["video"], 0.05, "both", "global").loss,
        class_alignment(h, prototypes, labels, _TAU, STREAMS),
        confusion_loss(h, prototypes, labels, _TAU, weights, STREAMS).loss,
    ]
    for got, exact in zip(found, expected, strict=True):
        assert got.item() == pytest.approx(exact.item(), rel=1e-5)
