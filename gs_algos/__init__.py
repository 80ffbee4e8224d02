"""Algorithms that compress PyTorch models, behind one interface: plan, apply, train, convert, save, load."""

from gs_algos.core.algorithm import Algorithm
from gs_algos.core.checkpoint import load, save
from gs_algos.core.plan import Plan
from gs_algos.qat.simqat import SimQAT, SimQATConfig

__all__ = ["Algorithm", "Plan", "SimQAT", "SimQATConfig", "load", "save"]
