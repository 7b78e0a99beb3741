"""What pretraining says before it computes."""

from pathlib import Path

import pytest
from support.idle import CONFIG, SPEC, Began, Idle
from support.stores import noise_store

from diccae.run_folder import RunFolder
from diccae.stages.pretrain import run_pretrain


@pytest.mark.parametrize("together", [True, False])
def test_a_store_whose_classes_lie_together_is_told(tmp_path: Path, together: bool) -> None:
    store = noise_store(tmp_path / "store", SPEC, 2 * 256, together=together)
    said: list[str] = []
    folder = RunFolder(str(tmp_path / "run"))
    folder.open(CONFIG, fresh=False)
    with folder.held("pretrain", 60.0), pytest.raises(Began):
        run_pretrain(folder, CONFIG, store.uri, said.append, backend=Idle())
    told = [line for line in said if line.startswith("warning")]
    assert len(told) == together
    if together:
        # A shard has 256 clips of four classes, and a row group 64 of them.
        assert "1.0 classes in a row group, by chance it would be 4.0." in told[0]
        assert "data.shuffle_window = 256" in told[0]
