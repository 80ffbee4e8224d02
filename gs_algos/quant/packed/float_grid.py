"""Rounds weights to 4-bit floats: e2m1 codes, and the 8-bit scale of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.formats import E2M1, E2M1_MAX, FloatFormat

SCALE_DTYPES = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}
NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in SCALE_DTYPES.items()}  # by the dtype of scales
E4M3_MAX, E4M3_LEAST = 448.0, 2.0**-9
E8M0_LEAST, E8M0_MOST = 2.0**-127, 2.0**127
RATIOS = {  # of the scale of `minmax`, that `mse` tries beside it
    "mxfp4": (0.5, 2.0),
    "nvfp4": (0.5, 0.6, 2 / 3, 0.75, 0.8, 0.875, 0.9375, 1.0625, 1.125, 1.25, 1.5),
}
# above which sizes begin: ties go to the even mantissa, so every second bound belongs to the larger size
_HALF = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_bounds = torch.tensor(_HALF, dtype=torch.float32, device="cpu")
_BELOW = torch.nextafter(_bounds, torch.zeros_like(_bounds)).tolist()
_BOUNDS = tuple(below if i % 2 else bound for i, (bound, below) in enumerate(zip(_HALF, _BELOW, strict=True)))


def levels(device: torch.device | str) -> Tensor:
    """Returns the values of the 16 codes, fp32."""
    return torch.tensor(E2M1, dtype=torch.float32, device=device)


def nearest_codes(u: Tensor) -> Tensor:
    """Rounds u, fp32 in units of the scale, to the codes of the nearest e2m1: half to even, beyond 6 to 6."""
    size = torch.bucketize(u.abs().contiguous(), torch.tensor(_BOUNDS, dtype=u.dtype, device=u.device), out_int32=True)
    return (size + 8 * (u < 0)).to(torch.uint8)


def nearest_values(u: Tensor) -> Tensor:
    """Rounds u, fp32 in units of the scale, to the nearest e2m1."""
    return levels(u.device)[nearest_codes(u).int()]


def divisor_of(weight: Tensor) -> Tensor:
    """Returns the number `[1]` fp32 that nvfp4 divides scales by: the largest weight then has the largest scale."""
    largest = weight.detach().abs().amax().float()
    divisor = E4M3_MAX * E2M1_MAX / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(divisor.isfinite(), divisor, 1.0).reshape(1)


def storable(scale: Tensor, format: FloatFormat, divisor: Tensor | None) -> Tensor:
    """Rounds scales > 0, fp32, to the nearest that the format can store, fp32."""
    return stored(scale, format, divisor).float() / (1.0 if divisor is None else divisor)


def stored(scale: Tensor, format: FloatFormat, divisor: Tensor | None) -> Tensor:
    """Returns scales > 0, fp32, as the format stores them, in 8 bits."""
    if divisor is None:
        return scale.clamp(E8M0_LEAST, E8M0_MOST).to(SCALE_DTYPES[format.name])
    return (scale * divisor).clamp(E4M3_LEAST, E4M3_MAX).to(SCALE_DTYPES[format.name])


def find_scales(
    groups: Tensor, format: FloatFormat, observer: str, divisor: Tensor | None, importance: Tensor | None
) -> Tensor:
    """Finds the scales `[C]` fp32 of `groups [C, size]` fp32, as they are stored; 1, or the nearest to it, for zeros.

    minmax of mxfp4: the power of two that brings the largest of a group to 4 up to 7, above 6 only if it rounds there.
    minmax of nvfp4: the one that brings it to 6. mse: that of `RATIOS` times it with the least squared error.

    Source: compressed-tensors 0.20, `generate_mx_scales` and `calculate_qparams`, whose scales those of minmax are.
    """
    largest = groups.abs().amax(1)
    if divisor is None:
        power = (largest.view(torch.int32) + (1 << 21)) & 0x7F800000  # up, if the first two bits behind the point are 1
        scale = power.view(torch.float32) / 4
    else:
        scale = largest / E2M1_MAX
    scale = torch.where(largest == 0, 1.0, scale)
    best = storable(scale, format, divisor)
    if observer == "mse":
        least = _squared_error(groups, best, importance)
        for ratio in RATIOS[format.name]:
            other = storable(scale * ratio, format, divisor)
            error = _squared_error(groups, other, importance)
            best = torch.where(error < least, other, best)
            least = torch.minimum(error, least)
    return best


def _squared_error(groups: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    error = (nearest_values(groups / scale.unsqueeze(1)) * scale.unsqueeze(1) - groups).square()
    return (error if importance is None else error * importance).sum(1)
