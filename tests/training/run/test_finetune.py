"""The encoder that fine-tuning starts from says which of its embeddings were trained."""

from pathlib import Path

import pytest
from support.memory import memory_index
from support.trainers import finetune_config

from pipeline.storage import Location
from training.model.make import make_encoder
from training.run.finetune import starting_encoder
from training.weights.files import read_card, save_encoder


@pytest.mark.parametrize(("init", "space"), [(False, "z"), (True, "h")])
def test_heads_of_an_older_encoder_count_as_its_config_trains_them(
    init: bool, space: str, tmp_path: Path
) -> None:
    """Its card does not say; of an encoder that begins at random no heads are trained."""
    config, index = finetune_config(), memory_index()
    save_encoder(make_encoder(config, index.spec), str(tmp_path / "older"))
    if init:
        changes = {"init": str(tmp_path / "older")}
        config = config.model_copy(update={"encoder": config.encoder.model_copy(update=changes)})
    own = starting_encoder(config, index, None, Location(tmp_path / "run"), {})
    assert read_card(own, "encoder")[0].space == space
