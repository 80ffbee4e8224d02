"""Algorithms that compress PyTorch models, behind one interface: plan, apply, train, convert, save, load."""

from gs_algos.core.algorithm import Algorithm, history
from gs_algos.core.checkpoint import load, save
from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.plan import Plan, PlanRow, Totals
from gs_algos.core.registry import register_algorithm
from gs_algos.core.settings import RowSettings
from gs_algos.export.checkpoint import quantize_checkpoint
from gs_algos.export.interchange import export_language_model, import_language_model
from gs_algos.export.language import load_language_model
from gs_algos.export.onnx_graph import export_onnx
from gs_algos.export.package import export_package
from gs_algos.export.registration import install as _register_with_transformers
from gs_algos.pipeline.pipeline import Pipeline, Stage
from gs_algos.pruning.prune import Prune, PruningConfig
from gs_algos.pruning.scop import SCOP, ScopConfig
from gs_algos.ptq.weights import plan_weights, quantize_weights
from gs_algos.qat.simqat import SimQAT, SimQATConfig
from gs_algos.qat.slb import SLB
from gs_algos.qat.slb_config import SLBConfig
from gs_algos.qat.slb_optim import SlbAdamW, SlbSGD
from gs_algos.quant.packed_conv import PackedConv
from gs_algos.quant.packed_embedding import PackedEmbedding
from gs_algos.quant.packed_linear import PackedLinear
from gs_algos.quant.scheme import Scheme
from gs_algos.quant.slb_grid import LevelGrid

__version__ = "0.1.0"

_register_with_transformers()

__all__ = [
    "SCOP",
    "SLB",
    "Algorithm",
    "AlgorithmConfig",
    "LevelGrid",
    "PackedConv",
    "PackedEmbedding",
    "PackedLinear",
    "Pipeline",
    "Plan",
    "PlanRow",
    "Prune",
    "PruningConfig",
    "RowSettings",
    "SLBConfig",
    "Scheme",
    "ScopConfig",
    "SimQAT",
    "SimQATConfig",
    "SlbAdamW",
    "SlbSGD",
    "Stage",
    "Totals",
    "__version__",
    "export_language_model",
    "export_onnx",
    "export_package",
    "history",
    "import_language_model",
    "load",
    "load_language_model",
    "plan_weights",
    "quantize_checkpoint",
    "quantize_weights",
    "register_algorithm",
    "save",
]
