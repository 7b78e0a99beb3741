"""`--dry-run` counts what will run: chunks of a share, labels, fusion and second views."""

from typing import Any

import pytest
from support.memory import SPEC
from support.trainers import finetune_config, pretrain_config

from training.data.views import Chunk
from training.loop.gradients import Gradients
from training.losses.objective import Labels
from training.run.dry_run import dry_run, dry_run_finetuning


def test_what_is_at_once_on_a_device_is_a_chunk_of_its_share() -> None:
    shown = {}
    for micro_batch in (None, 8):
        config = pretrain_config(pretrain={"micro_batch": micro_batch}, clustering={"k": 4})
        shown[micro_batch] = dict(dry_run(config, SPEC, 48))
    whole, chunks = shown[None], shown[8]
    assert (whole["clips per device"], whole["clips at once"]) == ("16", "16")
    assert (chunks["clips per device"], chunks["clips at once"]) == ("16", "8")
    assert "estimated time" in chunks


def test_memory_is_that_of_the_fewest_workers() -> None:
    """A run with scale.min_workers goes on with these, and each then has more clips."""
    shown = {}
    for scale in ({"num_workers": 4}, {"num_workers": 1}, {"num_workers": 4, "min_workers": 1}):
        config = pretrain_config(scale=scale)
        tables = (dict(dry_run(config, SPEC, 48)), dict(dry_run_finetuning(config, SPEC, 48, 4)))
        shown[len(scale), scale["num_workers"]] = tables
    for elastic, one, four in zip(shown[2, 4], shown[1, 1], shown[1, 4], strict=True):
        assert elastic["memory per device"] == one["memory per device"]
        assert elastic["clips per device"] == four["clips per device"]
        assert elastic["memory"] == "while the workers are 1, the fewest"


@pytest.mark.parametrize(
    ("changes", "n_views", "streams"),
    [
        ({}, 2, {"audio", "video", "fusion"}),
        ({"loss": {"fusion": False, "intra": 0.0}}, 1, {"audio", "video"}),
        ({"rounds": {"labels": "none"}}, 2, set()),
    ],
)
def test_the_measured_step_is_the_dearest_of_the_run(
    changes: dict[str, Any], n_views: int, streams: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[Chunk], list[Labels]]] = []
    gradients = Gradients.of

    def watched(self: Gradients, chunks: list[Chunk], labels: list[Labels]) -> Any:
        seen.append((chunks, labels))
        found = gradients(self, chunks, labels)
        assert set(found.embeddings.h) >= streams
        assert ("loss_confusion" in found.total.parts) == bool(streams)
        return found

    monkeypatch.setattr(Gradients, "of", watched)
    dry_run(pretrain_config(clustering={"k": 4}, **changes), SPEC, 48)
    for chunks, labels in seen:
        assert [len(chunk.views) for chunk in chunks] == [n_views]
        assert [set(head.prototypes) for head in labels] == ([streams] if streams else [])


def test_fine_tuning_has_a_budget_too() -> None:
    shown = dict(dry_run_finetuning(finetune_config(), SPEC, 48, 4))
    assert (shown["clips per device"], shown["steps"]) == ("16", "9")
    assert shown["memory per device"].endswith("GiB")
