"""Captures a model as a graph of its modules' calls, by the first of several tracers that can."""
