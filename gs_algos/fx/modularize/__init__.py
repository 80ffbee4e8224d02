"""Turns functional convolutions and matrix products into modules, so that algorithms can replace them."""

from gs_algos.fx.modularize.functional_calls import modularize

__all__ = ["modularize"]
