"""`diccae synth`: labelled clips in confusable pairs, as real H.264 + AAC files."""

from collections.abc import Sequence
from dataclasses import dataclass

from diccae.args import Options, refuse_negative_seed
from diccae.config import DEMO_TEST, DEMO_TRAIN


@dataclass(frozen=True)
class SynthArgs:
    """Write clips in VGGSound's naming with its CSV, to try everything without a download."""

    out: str
    """Folder: `videos/` and `<folder name>.csv` are written into it."""
    train: int = DEMO_TRAIN
    """Clips of the train split."""
    test: int = DEMO_TEST
    """Clips of the test split."""
    seed: int = 0
    """Equal seeds give equal clips."""


OPTIONS = Options("synth", SynthArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    refuse_negative_seed(args.seed)
    from pipeline.synth import write_clips

    print(write_clips(args.out, args.train, args.test, args.seed))
    return 0
