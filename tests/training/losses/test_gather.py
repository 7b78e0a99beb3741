"""W ranks have the loss and the gradient of one process on the whole batch."""

from collections.abc import Callable

import pytest
import torch
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import training.losses.terms
from training.config import STREAMS, ConfusionConfig, EncoderConfig
from training.losses.confusion import ConfusionState
from training.losses.gather import RankShare, gather_with_grad, of_every_rank, of_this_rank, world
from training.losses.terms import (
    class_alignment,
    confusion_loss,
    info_nce,
    intra_modal,
    labelled_rows,
)
from training.model.encoder import Encoder, InputShape, MaskNoise

_CLIPS, _CLASSES = 8, 4
_CONFIG = EncoderConfig(preset="tiny", dim=16, projection=8, n_heads=2)
# rank 0 of 4 holds no labelled clip, the others 1, 2 and 1
_LABELS = torch.tensor([-100, -100, 3, -100, 1, 0, -100, 2])


def _step(rank: int, n_ranks: int) -> dict[str, torch.Tensor]:
    """One step of every loss on this rank's share: mean loss and DDP's gradients."""
    torch.manual_seed(0)
    encoder = Encoder(_CONFIG, InputShape(32, 16, 32)).double()
    fbank = torch.randn(_CLIPS, 32, 16).double()
    frames = torch.randn(_CLIPS, 1, 3, 32, 32).double()
    prototypes = {s: torch.randn(_CLASSES, 8).double() for s in STREAMS}
    confusion = torch.softmax(torch.randn(_CLASSES, _CLASSES), 1)
    state = ConfusionState(confusion, torch.ones(_CLASSES), ConfusionConfig())
    state.update(0.0, since_labels_epochs=9)
    rows = [slice(r * _CLIPS // n_ranks, (r + 1) * _CLIPS // n_ranks) for r in range(n_ranks)]
    share = RankShare(tuple(each.stop - each.start for each in rows), rank)
    labels = _LABELS[rows[rank]]
    model = DistributedDataParallel(encoder) if n_ranks > 1 else encoder
    z, h, _ = model(fbank[rows[rank]], frames[rows[rank]])
    labelled = labelled_rows(labels)
    weights_KK = state.weights_KK.double()
    conf = confusion_loss(h, prototypes, labels, 0.1, weights_KK, STREAMS, rows=labelled)
    loss = (
        info_nce(z["audio"], z["video"], 0.05, "both", "global", share=share).loss
        + intra_modal({"audio": h["audio"]}, {"audio": h["fusion"]}, 0.1, share=share)
        + class_alignment(h, prototypes, labels, 0.1, STREAMS, rows=labelled)
        + conf.loss
    )
    loss.backward()
    state.accumulate(conf.posteriors_BK, labels)
    state.update(1.0, since_labels_epochs=9)
    total = loss.detach().clone()
    if n_ranks > 1:
        torch.distributed.all_reduce(total)
    gradients = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.requires_grad])
    return {"loss": total / n_ranks, "gradients": gradients, "confusion": state.confusion_KK}


@pytest.fixture(scope="module")
def one_process():
    return _step(0, 1)


def _masked_step(rank: int, n_ranks: int) -> dict[str, torch.Tensor]:
    """CAV-MAE's step: masked reconstruction and contrast of all three streams on patch stems."""
    torch.manual_seed(0)
    config = EncoderConfig(
        preset="base", dim=16, depth=1, n_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
    )
    encoder = Encoder(config, InputShape(64, 32, 32), decoder=True).double()
    encoder.train_only(STREAMS, class_heads=False)
    fbank, frames = torch.randn(4, 64, 32).double(), torch.randn(4, 1, 3, 32, 32).double()
    noise = [torch.rand(4, n) for n in encoder.token_counts()]
    share = slice(rank * 4 // n_ranks, (rank + 1) * 4 // n_ranks)
    model = DistributedDataParallel(encoder) if n_ranks > 1 else encoder
    masks = MaskNoise(noise[0][share], noise[1][share], 0.5)
    z, _, errors = model(fbank[share], frames[share], STREAMS, masks, reconstruct=True)
    loss = (
        errors["audio"]
        + errors["video"]
        + 0.1 * info_nce(z["audio"], z["video"], 0.05, "both", "global").loss
    )
    loss = loss + 0.1 * info_nce(z["fusion"], z["audio"], 0.05, "both", "global").loss
    loss.backward()
    return {
        "gradients": torch.cat([p.grad.flatten() for p in encoder.parameters() if p.requires_grad])
    }


def test_masked_reconstruction_on_two_ranks_has_the_gradient_of_one_process():
    expected = _masked_step(0, 1)["gradients"]
    for result in run_ranks(2, _masked_step):
        assert _error(result["gradients"], expected) < 1e-10


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("n_ranks", [1, 3, 4])
def test_ranks_have_loss_gradient_and_confusion_of_one_process(one_process, n_ranks):
    results = run_ranks(n_ranks, _step)
    for result in results:
        for name, expected in one_process.items():
            assert _error(result[name], expected) < 1e-10, name
    for result in results[1:]:
        assert torch.equal(result["confusion"], results[0]["confusion"])


def _without_gradient(x: torch.Tensor, share: RankShare) -> torch.Tensor:
    rank, n_ranks = world()
    parts = [torch.empty_like(x) for _ in range(n_ranks)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat([x if r == rank else part for r, part in enumerate(parts)])


def _step_with(name: str, wrong: Callable) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """The step of a rank whose losses use something wrong."""
    holder, _, attribute = name.rpartition(".")
    owner = getattr(training.losses.terms, holder) if holder else training.losses.terms
    assert hasattr(owner, attribute)

    def step(rank: int, n_ranks: int) -> dict[str, torch.Tensor]:
        owner = getattr(training.losses.terms, holder) if holder else training.losses.terms
        setattr(owner, attribute, wrong)
        return _step(rank, n_ranks)

    return step


def test_a_gather_without_gradient_would_be_noticed(one_process):
    result = run_ranks(2, _step_with("gather_with_grad", _without_gradient))[0]
    assert _error(result["loss"], one_process["loss"]) < 1e-10
    assert _error(result["gradients"], one_process["gradients"]) > 1e-2


def test_weighing_unequal_shares_alike_would_be_noticed(one_process):
    result = run_ranks(3, _step_with("RankShare.weight", property(lambda share: 1.0)))[0]
    assert _error(result["loss"], one_process["loss"]) > 1e-3


def test_counting_labels_per_rank_would_be_noticed(one_process):
    result = run_ranks(2, _step_with("mean_over_ranks", lambda x: x.detach()))[0]
    assert _error(result["loss"], one_process["loss"]) > 1e-3


def test_rows_come_in_rank_order():
    def gather(rank: int, n_ranks: int) -> torch.Tensor:
        equal = gather_with_grad(torch.full((2, 3), float(rank)))
        unequal = gather_with_grad(torch.full((rank, 3), float(rank)), RankShare((0, 1, 2), rank))
        return torch.cat([equal, unequal])

    for gathered in run_ranks(3, gather):
        assert gathered[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 1, 2, 2]


def test_what_ranks_hold_comes_back_to_them():
    def there_and_back(rank: int, n_ranks: int) -> list[torch.Tensor]:
        held_W = of_every_rank(torch.full((2,), float(rank)))
        return [held_W, of_this_rank(held_W), of_this_rank(held_W[:2])]

    for rank, (held_W, own, of_others) in enumerate(run_ranks(3, there_and_back)):
        assert held_W[:, 0].tolist() == [0, 1, 2]
        assert own.tolist() == [rank, rank]
        assert of_others.tolist() == [0.5, 0.5]


def test_one_process_needs_no_group():
    x = torch.randn(3, 2)
    assert gather_with_grad(x) is x
