"""PROBES, the classifiers fitted on frozen features: a linear one and nearest neighbours.

Pure functions on arrays: knows nothing of encoders, streams or splits. A new probe is a function
and one entry in PROBES. Invariant: deterministic, no seed and no schedule; test labels are never
seen.

Shapes: N training and M test clips, D feature width, C classes.
"""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.data.rows import few_of_each_class

if TYPE_CHECKING:
    from torch import Tensor

Features = NDArray[np.floating]

_log = logging.getLogger(__name__)

_STEEP = 0.01
"""Share of its first gradient above which a probe is said to have been stopped. At 0.001 to 0.004,
where 100 iterations end on the demo's features, 1 of 120 test clips has another class than after
5,000."""

_ROWS = 4096
"""Training clips in work at a time: copies, logits and gradients of 200,000 clips are gigabytes."""


def linear_probe(
    train_ND: Features,
    labels_N: NDArray[np.integer],
    test_MD: Features,
    n_classes: int,
    *,
    iterations: int = 100,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Class probabilities [M, C] of multinomial logistic regression on standardised features.

    Minimises mean cross-entropy + |W|^2 / (2 N), which is scikit-learn's C = 1, by L-BFGS; warns,
    with numbers, if `iterations` end far from the minimum.

    Raises: ValueError for features that are not finite or labels out of range.
    """
    # Here, since whoever only reads results has no use for its 0.7 GB.
    import torch
    from torch.nn import functional as F

    _check(train_ND, labels_N, test_MD, n_classes)
    x = torch.as_tensor(train_ND, dtype=torch.float32, device=device)
    y = torch.as_tensor(labels_N, dtype=torch.int64, device=device)
    mean_D, scale_D = _standard(x)
    weight, bias = _regression(x, y, (mean_D, scale_D), n_classes, iterations)
    test = torch.as_tensor(test_MD, dtype=torch.float32, device=device)
    return F.linear((test - mean_D) * scale_D, weight, bias).softmax(1).detach().cpu().numpy()


def _regression(
    x: "Tensor", y: "Tensor", standard: tuple["Tensor", "Tensor"], n_classes: int, iterations: int
) -> tuple["Tensor", "Tensor"]:
    """Weight [C, D] and bias [C] of the regression of y [N] on x [N, D], which is standardised."""
    import torch
    from torch.nn import functional as F

    mean_D, scale_D = standard
    weight = torch.zeros(n_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )
    steepness: list[float] = []

    def objective() -> "Tensor":
        optimiser.zero_grad()
        loss = weight.square().sum() / (2 * len(x))
        loss.backward()
        total = loss.detach()
        for x_rD, y_r in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            scores_rC = F.linear((x_rD - mean_D) * scale_D, weight, bias)
            loss = F.cross_entropy(scores_rC, y_r, reduction="sum") / len(x)
            loss.backward()
            total += loss.detach()
        if not steepness:
            steepness.append(_steepness(weight, bias))
        return total

    optimiser.step(objective)
    done = optimiser.state[weight]  # torch also stops after 1.25 evaluations an iteration
    if done["n_iter"] >= iterations or done["func_evals"] >= iterations * 5 // 4:
        objective()
        _warn_if_steep(_steepness(weight, bias) / steepness[0], weight, len(x), done)
    return weight, bias


def _warn_if_steep(left: float, weight: "Tensor", n_clips: int, done: dict[str, int]) -> None:
    """Args: left: share of the first gradient; done: what the optimiser says of its steps."""
    if left > _STEEP:
        n_classes, width = weight.shape
        _log.warning(
            f"linear probe of {n_clips} x {width} features and {n_classes} classes: stopped after "
            f"{done['n_iter']} iterations and {done['func_evals']} evaluations; its gradient is "
            f"{left:.1e} of that at the start. A larger evaluate.probe_epochs goes on."
        )


def _steepness(*parameters: "Tensor") -> float:
    """Length of the gradient."""
    squares = [p.grad.square().sum().item() for p in parameters if p.grad is not None]
    return math.sqrt(sum(squares))


def _standard(x_ND: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Mean and 1 / standard deviation of each feature, 0 for a constant one; float64 sums."""
    import torch

    sums = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    squares = torch.zeros_like(sums)
    for part in x_ND.split(_ROWS):
        sums += part.double().sum(0)
    mean = sums / len(x_ND)
    for part in x_ND.split(_ROWS):
        squares += part.double().sub_(mean).square_().sum(0)
    std = (squares / len(x_ND)).sqrt().float()
    return mean.float(), torch.where(std > 1e-6, 1 / std.clamp_min(1e-6), 0.0)


def knn_probe(
    train_ND: Features,
    labels_N: NDArray[np.integer],
    test_MD: Features,
    n_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: str = "cpu",
    rows: int = 256,
    own_M: NDArray[np.integer] | None = None,
) -> NDArray[np.float32]:
    """Class shares [M, C] of the k nearest training clips by cosine, each weighing e^(cos / tau).

    Args: rows: test clips compared at a time; bounds memory at rows * N. own_M: the training row
        that each test clip is itself, which then has no vote.
    Raises: as `linear_probe`.
    Source: Wu et al. 2018 (arXiv 1805.01978).
    """
    import torch
    from torch.nn import functional as F

    _check(train_ND, labels_N, test_MD, n_classes)
    train = torch.as_tensor(train_ND, dtype=torch.float32, device=device)
    lengths_N = torch.cat([part.norm(dim=1) for part in train.split(_ROWS)]).clamp_min(1e-12)
    test = F.normalize(torch.as_tensor(test_MD, dtype=torch.float32, device=device), dim=1)
    labels = torch.as_tensor(labels_N, dtype=torch.int64, device=device)
    own = None if own_M is None else torch.as_tensor(own_M, dtype=torch.int64, device=device)
    k = min(k, len(train) - (own is not None))
    scores = []
    for start, part in zip(range(0, len(test), rows), test.split(rows), strict=True):
        similar = (part @ train.T).div_(lengths_N)
        if own is not None:
            similar.scatter_(1, own[start : start + rows, None], -torch.inf)
        cosines, nearest = similar.topk(k, dim=1)
        votes = torch.zeros(len(part), n_classes, device=device)
        votes.scatter_add_(1, labels[nearest], ((cosines - 1) / temperature).exp())
        scores.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(scores).cpu().numpy()


def _check(
    train_ND: Features, labels_N: NDArray[np.integer], test_MD: Features, n_classes: int
) -> None:
    if train_ND.ndim != 2 or len(train_ND) != len(labels_N) or not len(labels_N):
        raise ValueError(f"features {train_ND.shape} for labels {labels_N.shape}")
    if test_MD.ndim != 2 or test_MD.shape[1] != train_ND.shape[1] or not len(test_MD):
        raise ValueError(f"test features {test_MD.shape} for training features {train_ND.shape}")
    for name, features in (("training", train_ND), ("test", test_MD)):
        starts = range(0, len(features), _ROWS)
        if not all(np.isfinite(features[at : at + _ROWS]).all() for at in starts):
            raise ValueError(f"{name} features are not finite")
    if not 0 <= labels_N.min() <= labels_N.max() < n_classes:
        raise ValueError(f"labels {labels_N.min()}..{labels_N.max()} for {n_classes} classes")


def few_label_probe(
    train_ND: Features,
    labels_N: NDArray[np.integer],
    test_MD: Features,
    n_classes: int,
    *,
    per_class: int = 10,
    iterations: int = 100,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """`linear_probe` on the training clips that `few_of_each_class` draws."""
    rows = few_of_each_class(labels_N, per_class)
    return linear_probe(
        train_ND[rows], labels_N[rows], test_MD, n_classes, iterations=iterations, device=device
    )


class Probe(NamedTuple):
    """A way to read classes from frozen features."""

    name: str
    """Key in results.json."""
    title: str
    scores: Callable[..., Features]
    """(train_ND, labels_N, test_MD, n_classes, config=, device=) to scores [M, C]."""


PROBES: tuple[Probe, ...] = (
    Probe(
        "probe",
        "linear probe",
        lambda *given, config, device: linear_probe(
            *given, iterations=config.probe_epochs, device=device
        ),
    ),
    Probe(
        "probe_few",
        "linear probe, few labels",
        lambda *given, config, device: few_label_probe(
            *given, per_class=config.few_labels, iterations=config.probe_epochs, device=device
        ),
    ),
    Probe(
        "knn",
        "kNN probe",
        lambda *given, config, device: knn_probe(*given, k=config.knn_k, device=device),
    ),
)
"""The first one's scores stand in for those of a classifier where there is none."""
