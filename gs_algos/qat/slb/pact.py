"""Clips an activation to a learned bound and rounds it to a uniform grid below: PACT (arXiv:1805.06085)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gs_algos.quant.fake_quant.quantizers import SMALLEST_SCALE, ActivationQuantizer
from gs_algos.quant.scheme import Scheme
from gs_kernels import fake_quant

WORD = ":pact"


class PactQuantizer(ActivationQuantizer):
    """`y = FQ(clamp(x, -alpha or 0, alpha))` with `scale = alpha / qmax`; alpha `[1]` fp32 is a parameter.

    Its gradient is dy where x is clipped: Choi et al. 2018, arXiv:1805.06085, eq. (1) and (3). An unsigned grid clips
    to [0, alpha], as the paper does; a signed one to [-alpha, alpha].
    Differs from the paper: alpha starts at the largest value that the example inputs or the calibration data show, and
    no penalty on it is added; give its parameter group a weight decay for that.
    """

    alpha: nn.Parameter

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        super().__init__(scheme, device)
        self.alpha = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))

    @property
    def updates_range(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        s = self.scheme
        alpha = self.alpha.clamp(min=SMALLEST_SCALE).to(x.dtype)
        clipped = torch.where(x < alpha, x, alpha)
        clipped = torch.where(clipped > -alpha, clipped, -alpha) if s.format.signed else clipped.relu()
        if x.numel() == 0:
            return clipped
        scale, zero = self.grid()
        return fake_quant(clipped, scale, zero, qmin=s.qmin, qmax=s.qmax)

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.alpha.detach().clamp(min=SMALLEST_SCALE) / self.scheme.qmax, self.zero

    def extra_repr(self) -> str:
        return f"{'' if self.scheme.format.signed else 'u'}int{self.scheme.bits}@tensor{WORD}"

    def set_range(self, x_min: Tensor, x_max: Tensor) -> None:
        """Starts alpha at the largest magnitude of a range, `[1]` each."""
        with torch.no_grad():
            self.alpha.copy_(torch.maximum(-x_min, x_max).clamp(min=SMALLEST_SCALE))
            self.scale.copy_(self.grid()[0])


def parse_act(text: str | Scheme | None) -> tuple[Scheme, bool] | None:
    """Parses (scheme, whether it is PACT) of `uint4@tensor:pact` and of all that `Scheme` reads; None stays None.

    Raises:
        ValueError: as `Scheme.parse`; if PACT is combined with another way to find the range.
    """
    if text is None:
        return None
    if not isinstance(text, str) or not text.endswith(WORD):
        return Scheme.parse(text, "act"), False
    if text.count(":") > 1:
        raise ValueError(f"SLB: :pact finds the range by itself and takes no other word, got {text!r}")
    scheme = Scheme.parse(f"{text.removesuffix(WORD)}:minmax", "act")
    if scheme.bits == 1 and scheme.format.signed:
        raise ValueError(
            f"SLB: 1-bit PACT has the levels 0 and alpha, so its grid is unsigned, got {text!r}; use uint1"
        )
    return scheme, True


def act_quantizer(text: str | Scheme | None, device: torch.device) -> ActivationQuantizer | None:
    """Makes the quantizer of an activation option."""
    parsed = parse_act(text)
    if parsed is None:
        return None
    scheme, pact = parsed
    return PactQuantizer(scheme, device) if pact else ActivationQuantizer(scheme, device)
