"""Mixup: as if sounds were played together, each clip with another one, for any number of lanes."""

import numpy as np
import pytest
import torch

from pipeline.config import FeatureSpec
from pipeline.decode.payload import fbank_function, fbank_payload
from training.data.device import DeviceBatch, on_device
from training.data.reader import Batch
from training.loop.mixup import Meeting, meeting, mix, mix_fbanks
from training.losses.gather import RankShare

SPEC = FeatureSpec(n_mels=64, fbank_frames=120)


def _sound(seed: int, seconds: float) -> np.ndarray:
    """Coloured noise with a beat: energy in some mel bins, at some times."""
    rng = np.random.default_rng(seed)
    n = int(seconds * SPEC.sample_rate_hz)
    noise = np.convolve(rng.normal(size=n), rng.normal(size=32), mode="same")
    beat = 1 + np.sin(2 * np.pi * (seed + 1) * np.arange(n) / SPEC.sample_rate_hz)
    return (0.05 * noise * beat).astype(np.float32)


def _stored(waveform: np.ndarray) -> torch.Tensor:
    payload, _ = fbank_payload(fbank_function(SPEC)(waveform), SPEC)
    stored = np.frombuffer(payload, np.float16).reshape(SPEC.fbank_frames, SPEC.n_mels)
    return torch.from_numpy(stored.copy())


@pytest.mark.parametrize("own", [0.3, 0.5, 0.7])
def test_it_equals_the_fbank_of_mixed_waveforms(own: float) -> None:
    errors, wrong_powers = [], []
    for seed in range(6):
        a, b = _sound(seed, 1.3), _sound(seed + 20, 1.3)
        expected = _stored(own * a + (1 - own) * b).float()
        stored = (_stored(a)[None], _stored(b)[None])
        errors.append(mix_fbanks(*stored, torch.tensor([own]))[0] - expected)
        by_power = own * stored[0].float().exp() + (1 - own) * stored[1].float().exp()
        wrong_powers.append(by_power.log()[0] - expected)
    assert abs(float(torch.cat(errors).mean())) < 0.1
    assert abs(float(torch.cat(wrong_powers).mean())) > 0.3, "the check sees no wrong power"


def test_padding_stays_padding_and_adds_no_sound() -> None:
    short, long = _stored(_sound(0, 0.6))[None], _stored(_sound(1, 1.3))[None]
    own = torch.tensor([0.5])
    silent = (short == 0).all(2)[0]
    assert 20 < int(silent.sum()) < 100
    assert (mix_fbanks(short, long, own)[0][silent] == 0).all()
    heard_alone = mix_fbanks(long, short, own)[0][silent]
    torch.testing.assert_close(heard_alone, long[0][silent].float() + 2 * np.log(0.5))


def test_clips_that_are_left_alone_keep_every_bit() -> None:
    a, b = torch.randn(4, 6, 5).half(), torch.randn(4, 6, 5).half()
    assert torch.equal(mix_fbanks(a, b, torch.ones(4)), a.float())


@pytest.mark.parametrize("n_clips", [2, 3, 48, 120])
def test_nobody_meets_itself_and_everybody_is_met_once(n_clips: int) -> None:
    met = meeting(n_clips, 0.5, 0, 7)
    assert (met.partner_B != np.arange(n_clips)).all()
    assert sorted(met.partner_B.tolist()) == list(range(n_clips))
    assert not np.array_equal(met.own_B, meeting(n_clips, 0.5, 0, 8).own_B)
    mixed = np.mean([(meeting(n_clips, 0.5, 0, s).own_B < 1).mean() for s in range(200)])
    assert 0.4 < mixed < 0.6


def _batch() -> DeviceBatch:
    rng = np.random.default_rng(0)
    n = 8
    batch = Batch(
        np.arange(n),
        np.arange(n).astype(np.uint64),
        np.arange(n),
        rng.normal(size=(n, 6, 5)).astype(np.float16),
        rng.integers(0, 256, (n, 1, 4, 4, 3)).astype(np.uint8),
    )
    return next(on_device(iter([batch]), torch.device("cpu")))


def test_pictures_and_targets_are_mixed_by_the_same_share() -> None:
    batch = _batch()
    met = meeting(8, 1.0, 0, 0)
    mixed = mix(batch, torch.eye(8), met, RankShare((8,), 0))
    alone = mix(
        batch, torch.eye(8), Meeting(met.partner_B, np.ones(8, np.float32)), RankShare((8,), 0)
    )
    torch.testing.assert_close(mixed.targets_nC.sum(1), torch.ones(8))
    for i, (partner, own) in enumerate(
        zip(met.partner_B.tolist(), met.own_B.tolist(), strict=True)
    ):
        assert float(mixed.targets_nC[i, i]) == pytest.approx(own)
        assert float(mixed.targets_nC[i, partner]) == pytest.approx(1 - own)
        blend = own * alone.frames_nFCHW[i] + (1 - own) * alone.frames_nFCHW[partner]
        torch.testing.assert_close(mixed.frames_nFCHW[i], blend)
