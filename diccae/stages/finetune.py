"""The fine-tuning stage: `encoder/` of a run folder to its `classifier/`.

Knows nothing of pretraining. Invariant: the same call goes on from the newest checkpoint.
"""

import time

from diccae.config import RunConfig
from diccae.resources import check_fits, start_ray, training_demands
from diccae.run_folder import RunFolder, watched
from diccae.stages.run_record import Say, pin_for, provenance, tracking_handle, with_status
from diccae.stages.statistics import settle
from training.data.batches import BatchPlan
from training.on_ray.finetune import finetune


def run_finetune(folder: RunFolder, config: RunConfig, encoder: str | None, say: Say) -> None:
    """Fine-tune the folder's encoder (or another one) into `classifier/`."""
    data = pin_for(folder, config)
    own = folder.path / "encoder"
    uri = encoder or (str(own) if (own / "encoder.json").exists() else None)
    config, statistics = settle(folder, config, data, say, uri or config.encoder.init)
    if "statistics" not in folder.record:
        folder.write_record(statistics=statistics)
    steps = BatchPlan.of(len(data.train), config.finetune.batch_size, config.data).steps(
        len(data.train)
    )
    start_ray()
    check_fits(training_demands(config, None))
    say(f"finetune  {len(data.train.classes)} classes, from {uri or 'nothing'}")
    started = time.monotonic()
    handle = tracking_handle(folder)
    with watched(folder.path / "finetune.jsonl", steps * config.finetune.epochs, "finetune"):
        with_status(
            folder,
            handle,
            lambda: finetune(
                config, data.train, uri, folder.path, handle, provenance(folder, config)
            ),
        )
    folder.write_results(seconds={"finetune": round(time.monotonic() - started, 2)})
