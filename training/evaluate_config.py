"""EvaluateConfig: how models are applied to clips that are tested, and what is measured.

Knows nothing of how they were trained. Invariant: nothing here changes what a run learns.
"""

from typing import Literal

from pydantic import Field

from training.frozen import Frozen

Precision = Literal["fp32", "bf16"]


class EvaluateConfig(Frozen):
    """What evaluation measures."""

    split: Literal["test", "validation"] = "test"
    """Clips it is measured on; `validation`, to choose by, needs `data.validation_frac` > 0."""
    probe_epochs: int = Field(100, ge=1)
    """Most L-BFGS iterations of the linear probes, that of all labels and that of few."""
    few_labels: int = Field(10, ge=1)
    """Labels of each class that the probe from few labels sees."""
    knn_k: int = Field(20, ge=1)
    """Neighbours of the kNN probe."""
    confused_pairs: int = Field(10, ge=1)
    """Pairs of classes, those that training clips confuse most, whose accuracy is measured."""
    retrieval_per_class: int = Field(5, ge=1)
    """Test clips per class in the retrieval protocol."""
    frames: int | None = None
    """Frames averaged at test time; None uses every stored frame."""
    precision: Precision | None = None
    """Autocast type of the trunk; None: bf16 on a GPU, fp32 on a CPU."""
