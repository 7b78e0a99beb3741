"""`diccae predict`: what a trained model takes clips for, without a store and without Ray."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diccae.args import Options
from diccae.cli import OK, TOO_MANY_FAILURES
from diccae.errors import UsageError
from diccae.screen import say
from pipeline.cores import usable_cores
from pipeline.reasons import Rejected
from pipeline.storage import Location, place_of

if TYPE_CHECKING:
    from training.predict.clips import Decoded
    from training.predict.page import Shown
    from training.predict.predictor import Answer


@dataclass(frozen=True)
class PredictArgs:
    """Classify clips: files, folders, tar parts or URIs. Exit code 3 if any cannot be decoded."""

    clips: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (every video below), tar parts, or URIs of these."""
    model: str
    """Run folder, folder of a classifier or encoder, a URI of one, or models:/NAME@ALIAS."""
    top: int = 5
    """Classes named for each stream."""
    json: bool = False
    """Print one JSON line."""
    csv: bool = False
    """Print CSV, a row for each clip, stream and class."""
    html: str | None = None
    """File for a page with frames, spectrogram, sound and answers of each clip; a path or URI."""
    embeddings: str | None = None
    """Parquet file for the embeddings of the run's encoder, as `diccae embed` writes them; a path
    or URI."""
    tracking_uri: str | None = None
    """MLflow to ask for models:/...; None: MLFLOW_TRACKING_URI."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is applied."""


OPTIONS = Options("predict", PredictArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    _refuse(args)
    from pipeline.source.named import named_clips
    from training.predict.clips import ClipDecoder
    from training.predict.find import find_models

    saved = find_models(args.model, args.tracking_uri)
    if args.embeddings and not saved.encoder:
        raise UsageError(
            f"--embeddings are of an encoder, and {args.model} is a classifier alone: name its run "
            "folder, or OUT/encoder"
        )
    if not args.embeddings and not saved.classifier:
        raise UsageError(
            f"{args.model} is an encoder, which names no classes: fine-tune it (diccae finetune), "
            "or ask for --embeddings FILE.parquet"
        )
    clips = named_clips(args.clips)
    with ClipDecoder(saved.spec, min(usable_cores(), len(clips))) as decoder:
        # Imports torch, while the decoders' own processes start.
        from training.predict.predictor import Predictor

        _refuse_device(args.device)
        embeds = args.embeddings is not None
        predictor = Predictor(saved, top=args.top, embeddings=embeds, device=args.device)
        note = "How sure: the margin, first class minus second. Probabilities are not calibrated."
        if saved.classifier and predictor.measured is None:
            unknown = f"{args.model} was not evaluated: what it confuses is not known"
            say(f"{unknown} (diccae evaluate)")
            note += f" {unknown}."
        kept = _Kept(args, saved.spec.sample_rate_hz)
        for clip, (decoded, answer) in zip(
            clips, predictor.answers(decoder.decode(clips)), strict=True
        ):
            kept.take(clip.name, decoded, answer)
    kept.write(note)
    return TOO_MANY_FAILURES if kept.n_failed else OK


class _Kept:
    """Answers as they come: shown at once, or kept for what is written at the end."""

    def __init__(self, args: PredictArgs, sample_rate_hz: int) -> None:
        self.args, self.sample_rate_hz = args, sample_rate_hz
        self.n_failed = 0
        self._json: list[dict[str, Any]] = []
        self._shown: list[Shown] = []
        self._embedded: list[tuple[str, Answer]] = []
        self._csv = csv.writer(sys.stdout, lineterminator="\n") if args.csv else None
        if self._csv is not None:
            from training.predict.told import COLUMNS

            self._csv.writerow(COLUMNS)

    def take(self, name: str, decoded: "Decoded", answer: "Answer") -> None:
        """One clip."""
        from training.predict.told import as_json, as_lines, as_rows

        self.n_failed += answer.rejected is not None
        if self._csv is not None:
            self._csv.writerows(as_rows(name, answer))
        elif self.args.json:
            self._json.append(as_json(name, answer))
        else:
            print("\n".join(as_lines(name, answer)), flush=True)
        if answer.embeddings:
            self._embedded.append((name, answer))
        if self.args.html:
            from training.predict.page import Shown, looks

            seen = "" if isinstance(decoded, Rejected) else looks(decoded, self.sample_rate_hz)
            self._shown.append(Shown(name, answer, seen))

    def write(self, note: str) -> None:
        """What is written once all clips are there. Args: note: what the answers rest on."""
        args = self.args
        if args.json:
            about = {"model": args.model, "note": note, "n_failed": self.n_failed}
            print(json.dumps({**about, "clips": self._json}))
        if args.html:
            from training.predict.page import predictions_page

            page = predictions_page(args.model, self._shown, note)
            place, name = place_of(args.html)
            place.write_bytes(name, page.encode())
            say(f"page      {args.html}")
        if args.embeddings:
            if self._embedded:
                _write_vectors(self._embedded, args.embeddings)
            left = "" if self._embedded else ", so it was not written"
            say(f"vectors   {args.embeddings}: {len(self._embedded):,} clips{left}")


def _write_vectors(embedded: "list[tuple[str, Answer]]", uri: str) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    from training.predict.vectors import vectors_table

    streams = embedded[0][1].embeddings
    vectors = {s: np.stack([answer.embeddings[s] for _, answer in embedded]) for s in streams}
    names = [name for name, _ in embedded]
    place, file = place_of(uri)
    with place.written(file) as path:
        pq.write_table(vectors_table(names, [None] * len(names), vectors), path)


def _refuse_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; leave it out to compute on CPUs")


def _refuse(args: PredictArgs) -> None:
    if not args.clips:
        raise UsageError("no clips: name files, folders or URIs")
    if args.json and args.csv:
        raise UsageError("--json and --csv both print to stdout: choose one")
    if args.top < 1:
        raise UsageError(f"--top {args.top}: at least 1")
    for option, uri in (("--html", args.html), ("--embeddings", args.embeddings)):
        # Now, and not after an hour of clips whose answers would be lost with it.
        if uri is not None and (place := Location(uri)).fs.isdir(place.path):
            raise UsageError(f"{option} {uri}: a folder; name a file in it")
