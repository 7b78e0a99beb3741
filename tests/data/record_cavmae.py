"""Recorder of the parity data: runs the reference CAV-MAE, in a checkout, on a tiny random model.

Knows nothing of diccae and is run by hand, not by a test: the reference needs timm 0.4.5, in an
environment of its own. Invariant: every array comes out of the reference's own classes; only
sizes, weights and inputs are chosen here, from one seed.

    python tests/data/record_cavmae.py path/to/cav-mae tests/data/cavmae_parity
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

DEPTH, DIM, HEADS = 4, 16, 2
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
AUDIO_FRAMES, MELS, IMAGE, CLIPS, CLASSES = 64, 128, 32, 3, 309
MASK_RATIO, RATE_HZ = 0.75, 16_000
MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")


def main(checkout: Path, out: Path) -> None:
    """Record weights, inputs, outputs and fbanks into `out`."""
    sys.path.insert(0, str(checkout / "src"))
    np.float = float  # type: ignore[attr-defined]  # The reference was written for NumPy < 1.24.
    from models import CAVMAE, CAVMAEFT

    torch.manual_seed(0)
    sizes = {"img_size": IMAGE, "audio_length": AUDIO_FRAMES, "embed_dim": DIM, "num_heads": HEADS}
    pretrained = _perturbed(CAVMAE(**sizes, **DECODER, norm_pix_loss=True))
    finetuned = _perturbed(CAVMAEFT(CLASSES, **sizes))
    # As the published checkpoints are: saved from inside a torch.nn.DataParallel.
    for name, model in (("pretrained", pretrained), ("finetuned", finetuned)):
        torch.save(torch.nn.DataParallel(model).state_dict(), out / f"{name}.pth")
    audio = torch.randn(CLIPS, AUDIO_FRAMES, MELS).half().double()
    images = torch.randn(CLIPS, 3, IMAGE, IMAGE).half().double()
    with torch.no_grad():
        recorded = _features(pretrained.double(), audio, images)
        recorded |= {f"logits/{m}": finetuned.double()(audio, images, m) for m in MODES}
    arrays = {name: value.numpy() for name, value in recorded.items()}
    half = {"audio": audio.half().numpy(), "images": images.half().numpy()}
    np.savez_compressed(out / "expected.npz", **half, **arrays)
    np.savez_compressed(out / "fbank.npz", **_fbanks())
    (out / "sizes.json").write_text(json.dumps(_sizes(), indent=1) + "\n")


def _perturbed(model: Any) -> Any:
    """Fewer blocks, and no two parameters alike: a mix-up of norms or biases shows."""
    model.blocks_a, model.blocks_v = model.blocks_a[:DEPTH], model.blocks_v[:DEPTH]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _features(model: Any, audio: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What pretraining computes: streams, the masked pass, the contrastive loss; float64."""
    tokens_a, tokens_v = model.forward_feat(audio, images)
    means = tokens_a.mean(1), tokens_v.mean(1)
    recorded = {"tokens_audio": tokens_a, "tokens_video": tokens_v}
    for name, both in (("v2a", False), ("both", True)):
        recorded[f"info_nce/{name}"] = model.forward_contrastive(*means, bidirect_contrast=both)[0]
    # The same draw twice: `forward` returns the losses, `forward_encoder` what they come from.
    torch.manual_seed(1)
    encoded = model.forward_encoder(audio, images, MASK_RATIO, MASK_RATIO)
    fusion, _, restore_a, _, restore_v, masked_a, masked_v = encoded
    torch.manual_seed(1)
    loss, _, loss_a, loss_v, contrast, *_ = model(audio, images, MASK_RATIO, MASK_RATIO)
    return recorded | {
        "masked/ids_restore_audio": restore_a,
        "masked/ids_restore_video": restore_v,
        "masked/fusion": fusion.mean(1),
        "masked/audio": masked_a.mean(1),
        "masked/video": masked_v.mean(1),
        "masked/loss_audio": loss_a,
        "masked/loss_video": loss_v,
        "masked/contrast": contrast,
        "masked/loss": loss,
    }


def _fbanks() -> dict[str, np.ndarray]:
    """Waveforms and their fbanks: shorter and longer than AUDIO_FRAMES, off centre, and silent."""
    import dataloader

    generator = np.random.default_rng(2)
    waveforms = {
        "padded": generator.normal(0, 0.1, RATE_HZ // 2),
        "cut": 0.3 * np.sin(np.arange(12_000) * 0.17) + generator.normal(0, 0.05, 12_000),
        "off_centre": generator.normal(0.2, 0.05, RATE_HZ // 4),
        "silent": np.zeros(RATE_HZ // 4),
    }
    source = object.__new__(dataloader.AudiosetDataset)
    source.melbins, source.target_length = MELS, AUDIO_FRAMES
    arrays = {}
    for case, waveform in waveforms.items():
        samples = torch.from_numpy(waveform.astype(np.float32))[None]
        # Its loader reads a file, by a library that newer torchaudio leaves to others.
        torchaudio.load = lambda _, samples=samples: (samples, RATE_HZ)
        arrays[f"{case}/waveform"] = samples[0].numpy()
        arrays[f"{case}/fbank"] = source._wav2fbank("").numpy()
    return arrays


def _sizes() -> dict[str, Any]:
    return {
        "encoder": {
            "preset": "base",
            "dim": DIM,
            "depth": DEPTH,
            "n_heads": HEADS,
            "decoder_dim": DECODER["decoder_embed_dim"],
            "decoder_depth": DECODER["decoder_depth"],
            "decoder_heads": DECODER["decoder_num_heads"],
        },
        "shape": {"fbank_frames": AUDIO_FRAMES, "n_mels": MELS, "frame_size": IMAGE},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
