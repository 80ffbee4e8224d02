"""Algorithms that compress PyTorch models, behind one interface: plan, apply, train, convert, save, load."""

from gs_algos.core.algorithm import Algorithm
from gs_algos.core.checkpoint import load, save
from gs_algos.core.plan import Plan
from gs_algos.pruning.prune import Prune, PruningConfig
from gs_algos.pruning.scop import SCOP, ScopConfig
from gs_algos.ptq.weights import quantize_weights
from gs_algos.qat.simqat import SimQAT, SimQATConfig
from gs_algos.qat.slb import SLB
from gs_algos.qat.slb_config import SLBConfig
from gs_algos.quant.packed_embedding import PackedEmbedding
from gs_algos.quant.packed_linear import PackedLinear

__all__ = [
    "SCOP",
    "SLB",
    "Algorithm",
    "PackedEmbedding",
    "PackedLinear",
    "Plan",
    "Prune",
    "PruningConfig",
    "SLBConfig",
    "ScopConfig",
    "SimQAT",
    "SimQATConfig",
    "load",
    "quantize_weights",
    "save",
]
