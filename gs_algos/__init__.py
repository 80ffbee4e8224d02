"""Algorithms that compress PyTorch models, behind one interface: plan, apply, train, convert, save, load.

What reads or writes files of other formats is imported when its name is first used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from gs_algos.adder.adder import Adder
from gs_algos.adder.config import AdderConfig
from gs_algos.core.algorithm import Algorithm, Calibrates, history
from gs_algos.core.checkpoint import load, save
from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.plan import Plan, PlanRow, Totals
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.registry import register_algorithm
from gs_algos.distill.config import DistillConfig
from gs_algos.distill.distill import Distill
from gs_algos.distill.distilled_images import distilled_images
from gs_algos.distill.synthesis import Synthesis
from gs_algos.ghost.config import GhostConfig
from gs_algos.ghost.ghost import Ghost
from gs_algos.llm.registration import install as _register_with_transformers
from gs_algos.pruning.heads import Heads, HeadsConfig
from gs_algos.pruning.prune import Prune, PruneConfig
from gs_algos.pruning.scop import SCOP, SCOPConfig
from gs_algos.pruning.uniprune import UniPrune, UniPruneConfig
from gs_algos.ptq.config import PTQConfig
from gs_algos.ptq.ptq import PTQ
from gs_algos.ptq.weights import plan_weights, quantize_weights
from gs_algos.qat.simqat import SimQAT, SimQATConfig
from gs_algos.qat.slb.algorithm import SLB
from gs_algos.qat.slb.config import SLBConfig
from gs_algos.qat.slb.optim import SlbAdamW, SlbSGD
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.embedding import PackedEmbedding
from gs_algos.quant.packed.linear import PackedLinear
from gs_algos.quant.scheme import Scheme

if TYPE_CHECKING:
    from gs_algos.analysis.analyze import analyze, report
    from gs_algos.analysis.compare import compare
    from gs_algos.analysis.effect import effect
    from gs_algos.analysis.latency import layer_times
    from gs_algos.analysis.latency_table import latency_table
    from gs_algos.analysis.report.page import Report
    from gs_algos.analysis.sensitivity import sensitivity
    from gs_algos.export.onnx import export_onnx
    from gs_algos.export.torch_package import export_package
    from gs_algos.llm.interchange import export_language_model, import_language_model
    from gs_algos.llm.load import load_language_model
    from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
    from gs_algos.pipeline.pipeline import Pipeline, Stage
    from gs_algos.search.config import SearchConfig
    from gs_algos.search.mixed_bits import mixed_bits
    from gs_algos.search.policy import Policy
    from gs_algos.search.presets import AMC, HAQ, NAS
    from gs_algos.search.search import search_rules
    from gs_algos.search.stage import Search

__version__ = "0.1.0"

_register_with_transformers()

_LAZY = {
    "AMC": "gs_algos.search.presets",
    "HAQ": "gs_algos.search.presets",
    "NAS": "gs_algos.search.presets",
    "Pipeline": "gs_algos.pipeline.pipeline",
    "Policy": "gs_algos.search.policy",
    "Report": "gs_algos.analysis.report.page",
    "Search": "gs_algos.search.stage",
    "SearchConfig": "gs_algos.search.config",
    "Stage": "gs_algos.pipeline.pipeline",
    "analyze": "gs_algos.analysis.analyze",
    "compare": "gs_algos.analysis.compare",
    "effect": "gs_algos.analysis.effect",
    "export_language_model": "gs_algos.llm.interchange",
    "export_onnx": "gs_algos.export.onnx",
    "export_package": "gs_algos.export.torch_package",
    "import_language_model": "gs_algos.llm.interchange",
    "latency_table": "gs_algos.analysis.latency_table",
    "layer_times": "gs_algos.analysis.latency",
    "load_language_model": "gs_algos.llm.load",
    "mixed_bits": "gs_algos.search.mixed_bits",
    "quantize_checkpoint": "gs_algos.llm.quantize_checkpoint",
    "report": "gs_algos.analysis.analyze",
    "search_rules": "gs_algos.search.search",
    "sensitivity": "gs_algos.analysis.sensitivity",
}

__all__ = [
    "AMC",
    "HAQ",
    "NAS",
    "PTQ",
    "SCOP",
    "SLB",
    "Adder",
    "AdderConfig",
    "Algorithm",
    "AlgorithmConfig",
    "Calibrates",
    "Distill",
    "DistillConfig",
    "Ghost",
    "GhostConfig",
    "Heads",
    "HeadsConfig",
    "LevelGrid",
    "PTQConfig",
    "PackedConv",
    "PackedEmbedding",
    "PackedLinear",
    "Pipeline",
    "Plan",
    "PlanRow",
    "Policy",
    "Prune",
    "PruneConfig",
    "Report",
    "RowSettings",
    "SCOPConfig",
    "SLBConfig",
    "Scheme",
    "Search",
    "SearchConfig",
    "SimQAT",
    "SimQATConfig",
    "SlbAdamW",
    "SlbSGD",
    "Stage",
    "Synthesis",
    "Totals",
    "UniPrune",
    "UniPruneConfig",
    "__version__",
    "analyze",
    "compare",
    "distilled_images",
    "effect",
    "export_language_model",
    "export_onnx",
    "export_package",
    "history",
    "import_language_model",
    "latency_table",
    "layer_times",
    "load",
    "load_language_model",
    "mixed_bits",
    "plan_weights",
    "quantize_checkpoint",
    "quantize_weights",
    "register_algorithm",
    "report",
    "save",
    "search_rules",
    "sensitivity",
]

_RENAMED = {"PruningConfig": "PruneConfig", "ScopConfig": "SCOPConfig"}

if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        """Imports what is imported when it is first used."""
        if name in _RENAMED:
            warnings.warn(
                f"gs_algos.{name} is now {_RENAMED[name]}; the old name goes with the next minor version",
                DeprecationWarning,
                stacklevel=2,
            )
            return globals()[_RENAMED[name]]
        if name not in _LAZY:
            words = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(words, name=name, obj=sys.modules[__name__])
        value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
