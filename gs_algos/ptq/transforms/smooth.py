"""Moves the outliers of activations into the weights that read them.

SmoothQuant: Xiao et al. 2022, arXiv:2211.10438. Thresholds: Wei et al. 2023 (Outlier Suppression+), arXiv:2304.09145.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.ptq.transforms.columns import StageColumns

SMALLEST = 1e-5
ALPHAS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
THRESHOLDS = 8  # each 0.7 of the one before, from the largest input down


def smooth(columns: StageColumns, alpha: float | None) -> dict[str, Tensor]:
    """Returns the scale of one alpha, or those of `ALPHAS` and of thresholds to choose from."""
    if alpha is not None:
        return {f"{alpha:g}": smooth_scale(columns.absmax, columns.weight_absmax, alpha)}
    found = {f"{a:g}": smooth_scale(columns.absmax, columns.weight_absmax, a) for a in ALPHAS}
    largest = float(columns.absmax.max())
    for threshold in [largest * 2 ** (-i / 2) for i in range(1, THRESHOLDS + 1)] if largest > 0 else []:
        found[f"above {threshold:.3g}"] = threshold_scale(columns.absmax, threshold)
    return found


def smooth_scale(absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Computes `max|x_j|^alpha / max|W_:j|^(1 - alpha)`, `[K]`, both at least 1e-5; 1 where one of them is 0."""
    x, w = absmax.clamp(min=SMALLEST), weight_absmax.clamp(min=SMALLEST)
    return torch.where((absmax > 0) & (weight_absmax > 0), x**alpha / w ** (1 - alpha), 1.0)


def threshold_scale(absmax: Tensor, threshold: float) -> Tensor:
    """Computes `max(1, max|x_j| / threshold)`, `[K]`: what is above the threshold comes down to it."""
    return (absmax / threshold).clamp(min=1.0)
