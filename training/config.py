"""TrainingConfig: what a run is, from encoder and data order to losses, rounds and clustering.

Pure pydantic models: imports neither torch nor Ray, so that `--help` answers at once.
Invariant: no default of training stands anywhere else.
"""

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from clustering.config import KMeansConfig, PoolConfig
from training.cluster_config import ScaleConfig, TrackingConfig
from training.evaluate_config import EvaluateConfig, Precision
from training.frozen import Frozen
from training.presets import Preset, with_sizes

Stream = Literal["audio", "video", "fusion"]
STREAMS: tuple[Stream, Stream, Stream] = ("audio", "video", "fusion")
SIDES: tuple[Stream, Stream] = ("audio", "video")
"""The streams of one modality."""


class EncoderConfig(Frozen):
    """Shape of the encoder (docs/design.md, "The encoder"). Fields left out come from `preset`."""

    preset: Preset = "tiny"
    """Named size. Every other field given beside it, or on top of it, overrides it; named on top of
    another config it brings all its sizes with it: stem, dim, depth, joint_depth and n_heads."""
    stem: Literal["conv", "patch"] = "conv"
    """`patch`: CAV-MAE's 16x16 patches, to start from weights; `conv`: trains from nothing."""
    norm: Literal["group", "weights", "first"] = "group"
    """What keeps the scale of a `conv` stem: GroupNorm, standardised weights, or one of each."""
    dim: int = Field(128, ge=8)
    """Token width D."""
    depth: int = Field(1, ge=0)
    """Transformer blocks of each single-modality branch (CAV-MAE: 11)."""
    joint_depth: int = Field(1, ge=1)
    """Blocks shared by the audio, video and fusion passes."""
    n_heads: int = Field(4, ge=1)
    """Attention heads; divides `dim`."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of a block's MLP over D."""
    projection: int = Field(256, ge=8)
    """Width P of the class heads' output."""
    decoder_dim: int = Field(512, ge=8)
    """Token width of the reconstruction decoder, built only when `loss.reconstruction` > 0."""
    decoder_depth: int = Field(8, ge=1)
    """Blocks of the reconstruction decoder."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads of the reconstruction decoder."""
    init: str | None = None
    """URI of weights to start from: CAV-MAE, MAE ViT, or a diccae encoder; any fsspec scheme."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return with_sizes({"preset": "tiny", **values})
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> "EncoderConfig":
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide dim = {self.dim}")
        return self


class FbankStatistics(NamedTuple):
    """What fbanks are normalised with."""

    mean: float
    std: float

    def agrees(self, other: "FbankStatistics") -> bool:
        """Equal but for the digits that were not written down."""
        return abs(self.mean - other.mean) < 1e-3 and abs(self.std - other.std) < 1e-3


class DataConfig(Frozen):
    """What is read of a feature store, and in which order."""

    version: int | None = None
    """Version of the clips table to train on; None pins the newest at the start."""
    frames_per_clip: int = Field(1, ge=1)
    """Frames a training step sees of each clip (CAV-MAE: 1, drawn at random)."""
    lanes: int = Field(8, ge=1)
    """Fixed number of data lanes, shared out among the workers, so that the order of data never
    depends on how many there are. A multiple of their number keeps all of them equally busy.
    Fine-tuning has as many as divide its batch, too."""
    shuffle_window: int = Field(256, ge=1)
    """Clips of a lane that are permuted together, and held in memory encoded."""
    fbank_mean: float | None = None
    """Subtracted from the fbank. None: of the weights the run starts from, else of the train split,
    as `diccae store stats` finds it."""
    fbank_std: float | None = Field(None, gt=0)
    """Divides the fbank; None as above. CAV-MAE's VGGSound has -5.081 and 4.4849."""
    leave_out: tuple[str, ...] = ()
    """Rules of `diccae store quality` (such as still, duplicate): train clips that hit one are left
    out. Test clips stay, so that results can be compared."""
    validation_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the train split kept for validation, by whole recordings (`group`)."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "DataConfig":
        if (self.fbank_mean is None) != (self.fbank_std is None):
            raise ValueError("fbank_mean and fbank_std go together: give both, or neither")
        return self

    @property
    def given_statistics(self) -> "FbankStatistics | None":
        """Mean and standard deviation of the fbanks, if the config gives them."""
        if self.fbank_mean is None or self.fbank_std is None:
            return None
        return FbankStatistics(self.fbank_mean, self.fbank_std)

    @property
    def statistics(self) -> "FbankStatistics":
        """Those of a run that is under way: given, or filled in when it started.

        Raises: ValueError if they were not.
        """
        given = self.given_statistics
        if given is None:
            raise ValueError("data.fbank_mean and data.fbank_std are not known yet: give both")
        return given


class AugmentConfig(Frozen):
    """Random views of a clip; strengths of 0 turn a step off."""

    crop_scale_min: float = Field(1.0, gt=0, le=1)
    """Smallest area of a random resized crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Chance of a horizontal flip."""
    brightness: float = Field(0.0, ge=0)
    """Largest offset of brightness either way, in standard deviations of ImageNet colours."""
    contrast: float = Field(0.0, ge=0)
    """Largest relative change of contrast."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Largest rotation of the hue either way, as a share of the circle; 0.5: any hue."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Largest relative change of the saturation."""
    greyscale: float = Field(0.0, ge=0, le=1)
    """Chance that a view has no colour at all."""
    blur: float = Field(0.0, ge=0)
    """Largest standard deviation of a Gaussian blur, in pixels of the stored frame."""
    shift_frac: float = Field(0.0, ge=0, le=1)
    """Largest circular shift of the fbank in time, as a share of its length."""
    gain: float = Field(0.0, ge=0)
    """Largest change of the log-mel level, natural log units."""
    fbank_noise: float = Field(0.0, ge=0)
    """Largest amplitude of the noise added to the normalised fbank, uniform (CAV-MAE: 0.1)."""
    freq_mask: int = Field(0, ge=0)
    """Largest number of masked mel bins (SpecAugment)."""
    time_mask: int = Field(0, ge=0)
    """Largest number of masked fbank frames (SpecAugment)."""
    mask_with: Literal["mean", "zero"] = "mean"
    """What masked cells become: `fbank_mean`, or 0 before normalising as in CAV-MAE. Quiet data
    have a mean far below 0, where a zero is a loud stripe that hides the sound."""


class LossConfig(Frozen):
    """Weights and temperatures of the pretraining loss (docs/method.md)."""

    instance: float = Field(1.0, ge=0)
    """Weight of L_inst, InfoNCE between a clip's audio and video."""
    instance_on: Literal["z", "h", "both"] = "both"
    """Embeddings L_inst compares: the trunk's z, the class heads' h, or both."""
    instance_direction: Literal["both", "v2a"] = "both"
    """`v2a` is CAV-MAE's one direction."""
    negatives: Literal["global", "local"] = "global"
    """`local`: the other clips of a data lane, CAV-MAE's per-GPU negatives for any number of
    workers (batch_size / data.lanes clips)."""
    temperature: float = Field(0.05, gt=0)
    """tau of L_inst and L_intra."""
    intra: float = Field(0.0, ge=0)
    """Weight of L_intra, InfoNCE between two views of the same modality."""
    intra_epochs: int | None = None
    """Epochs with L_intra; None keeps it to the end."""
    class_alignment: float = Field(0.5, ge=0)
    """lambda_cls, weight of L_cls."""
    confusion: float = Field(0.5, ge=0)
    """lambda_conf, weight of L_conf; times the mean confusion degree with `share_by_degree`."""
    class_temperature: float = Field(0.1, gt=0)
    """tau_c of L_cls, L_conf and the confusion matrix."""
    fusion: bool = True
    """Whether the fusion stream takes part in L_cls and L_conf; without it audio and video alone
    learn from labels, and nothing but `reconstruction` trains the fusion pass."""
    reconstruction: float = Field(0.0, ge=0)
    """Weight of L_rec, CAV-MAE's masked reconstruction; 0 builds no decoder."""
    mask_ratio: float = Field(0.75, ge=0, lt=1)
    """Share of tokens masked when `reconstruction` > 0."""

    @property
    def label_streams(self) -> tuple[Stream, ...]:
        """Streams that learn from labels, and whose features make them."""
        return STREAMS if self.fusion else SIDES


class ConfusionConfig(Frozen):
    """How the confusion matrix is estimated and turned into weights (docs/method.md)."""

    gamma: float = Field(1.0, ge=0)
    """Exponent on the relative confusion degree; 0 turns weighting off (plain cross-entropy)."""
    w_max: float = Field(10.0, ge=1)
    """Largest weight of a confused pair."""
    pseudo_counts: float = Field(0.0, ge=0)
    """Additive smoothing: confusions added to every pair; how many it takes to believe in any."""
    ramp_epochs: float = Field(2.0, ge=0)
    """Epochs after the first labels over which gamma grows to its value."""
    ema_per_epoch: float = Field(0.5, ge=0, lt=1)
    """What is left of the old estimate after one epoch."""
    update: Literal["dynamic", "static"] = "dynamic"
    """`static` keeps the estimate made when a round is published; fine-tuning, which has none, is
    `dynamic` always."""
    weights: Literal["degree", "shuffled", "constant"] = "degree"
    """Controls as large for each class: `shuffled` among its pairs, or `constant`, their mean."""
    update_steps: int = Field(10, ge=1)
    """Steps between updates of the estimate, one all-reduce each."""
    share_by_degree: bool = True
    """Multiply lambda_conf by the mean confusion degree, in [0, 1]: the share follows it."""


class RoundsConfig(Frozen):
    """When pseudo-labels are made and how they reach training (docs/design.md, "Pretraining")."""

    labels: Literal["clusters", "seeded", "none", "random", "true"] = "clusters"
    """`true`: the store's classes, of the clips that have one; the others learn by InfoNCE alone.
    `seeded`: clustering from those clips gives the others a label, too, one cluster a class.
    `none` never labels: InfoNCE (and what else is on) alone. `random`, a control in the same slots,
    with prototypes and confusion of its own: one of K, drawn once for each clip."""
    labels_per_class: int | None = Field(None, ge=1)
    """With `true` and `seeded`: how many clips of each class are known, those that the probe from
    few labels sees; None: all that have a label. With `random`: those clips get one by chance."""
    label_noise: float = Field(0.0, ge=0, le=1)
    """With `true`: share of the clips that are given another class instead, drawn once."""
    label_noise_from: str | None = None
    """`evaluation/confusion.npz` of a run: the classes it took theirs for; None: any, by chance."""
    warmup_epochs: int = Field(2, ge=0)
    """No round before this many epochs."""
    every_epochs: int = Field(1, ge=1)
    """Epochs between rounds."""
    margin_nats: float = 0.25
    """The first labels wait until InfoNCE < ln n - margin, n the clips it compares (the batch, or a
    lane with local negatives); negative: they never wait, as where `loss.instance` is 0."""
    features: Literal["pass", "train"] = "train"
    """`pass`: an evaluation pass before each round; `train`: what training just computed."""
    lead_steps: int = Field(20, ge=0)
    """Steps from the start of a round until its labels apply; at most those to the next start."""
    cold_every: int = Field(0, ge=0)
    """Every this many rounds the clustering starts anew; 0 never."""
    timeout_s: float = Field(1800.0, gt=0)
    """Longest wait for a round before the run stops with an error."""


class OptimConfig(Frozen):
    """AdamW and its schedule."""

    lr: float = Field(2e-4, gt=0)
    """Peak learning rate at the global batch size."""
    head_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of heads (CAV-MAE fine-tuning: 10)."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's beta."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs of linear warm-up."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Shape after the warm-up."""
    decay_epochs: tuple[int, ...] = (10, 15, 20)
    """Epochs at which `steps` multiplies the rate by `decay_rate`."""
    decay_rate: float = Field(0.5, gt=0, le=1)
    """Factor of one step of `steps`."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest gradient norm; None does not clip."""


class PretrainConfig(Frozen):
    """Length of pretraining; numerics of pretraining and fine-tuning."""

    epochs: int = Field(25, ge=1)
    """Passes over the train split."""
    batch_size: int = Field(256, ge=2)
    """Global batch B, the same whatever the number of workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Largest batch of a worker's pass; a larger share runs as cached-gradient chunks."""
    precision: Precision = "fp32"
    """Autocast type of the trunk; logits and softmax stay fp32."""
    compile: bool = False
    """torch.compile of the blocks."""
    sdpa: bool = True
    """Fused attention kernels; off: softmax(q k') v in steps, to see whether one is at fault."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; one more at the end of each epoch."""
    log_every: int = Field(10, ge=1)
    """Steps between logged metrics."""


class FinetuneConfig(Frozen):
    """Supervised fine-tuning (docs/design.md, "Fine-tuning")."""

    mode: Literal["multimodal", "audio", "video"] = "multimodal"
    """Streams that are trained; multimodal models are tested in all modes."""
    loss: Literal["ce", "bce"] = "ce"
    """`ce`: one class a clip, cross-entropy and softmax; `bce`: a clip may have several, binary
    cross-entropy and sigmoid of each class (CAV-MAE on AudioSet); needs `confusion` 0."""
    epochs: int = Field(10, ge=1)
    """Passes over the train split."""
    batch_size: int = Field(48, ge=2)
    """Global batch."""
    auxiliary: float = Field(0.3, ge=0)
    """Weight of the loss of the audio and video streams (0: CAV-MAE's recipe)."""
    confusion: float = Field(0.0, ge=0)
    """gamma of the confusion-aware cross-entropy over true classes; 0: plain cross-entropy
    (docs/experiments.md, 13)."""
    confusion_pseudo_counts: float = Field(1.0, ge=0)
    """`confusion.pseudo_counts` of fine-tuning: with few clips a class, or once they are no longer
    confused, weights go to 1."""
    confusion_after_epochs: int = Field(1, ge=0)
    """Epochs before the confusion weights apply; gamma grows over `confusion.ramp_epochs` then."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Mass taken from a clip's classes and spread over all."""
    mixup: float = Field(0.0, ge=0, le=1)
    """Chance that a clip is mixed with another, lambda ~ Beta(10, 10)."""
    balanced: bool = False
    """Draw clips inversely to the size of their class."""
    average_from_epoch: int | None = Field(None, ge=1)
    """Average the weights of this and later epochs (CAV-MAE: 3)."""
    augment: AugmentConfig = AugmentConfig()
    """Random views during fine-tuning."""
    optim: OptimConfig = OptimConfig(lr=1e-4, head_lr_scale=10.0, weight_decay=5e-7)
    """Optimiser of fine-tuning."""

    @model_validator(mode="before")
    @classmethod
    def _fill_its_own_optimiser(cls, values: Any) -> Any:
        """A file that names some keys of `optim` says nothing of the others; those of OptimConfig
        are of pretraining."""
        own = values.get("optim") if isinstance(values, dict) else None
        if isinstance(own, dict):
            default = cls.model_fields["optim"].default.model_dump()
            return {**values, "optim": {**default, **own}}
        return values

    @model_validator(mode="after")
    def _weights_need_clips_of_one_class(self) -> "FinetuneConfig":
        if self.loss == "bce" and self.confusion > 0:
            raise ValueError(
                f"loss = bce with confusion = {self.confusion:g}: confusion weights stand between "
                "the one class of a clip and all others; set finetune.confusion to 0"
            )
        if self.mixup == 1 and self.confusion > 0:
            raise ValueError(
                f"mixup = 1 with confusion = {self.confusion:g}: confusion is counted over clips "
                "that are not mixed; set finetune.mixup below 1 (CAV-MAE: 0.5) or confusion to 0"
            )
        return self


class TrainingConfig(Frozen):
    """All of the above, and how clusters are made: what a run is from store to results."""

    seed: int = Field(0, ge=0)
    """Seeds weights, data order, augmentation and clustering."""
    encoder: EncoderConfig = EncoderConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    confusion: ConfusionConfig = ConfusionConfig()
    rounds: RoundsConfig = RoundsConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    scale: ScaleConfig = ScaleConfig()
    tracking: TrackingConfig = TrackingConfig()
    clustering: KMeansConfig = KMeansConfig()
    pool: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _rows_for_every_actor(self) -> "TrainingConfig":
        if self.pool.n_actors > self.clustering.vshards:
            raise ValueError(
                f"pool.n_actors = {self.pool.n_actors} > clustering.vshards = "
                f"{self.clustering.vshards}: some would have no rows"
            )
        return self
