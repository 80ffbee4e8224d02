"""Defines what every algorithm shares: its life cycle, plans, the history of a model, checkpoints and the registry."""
