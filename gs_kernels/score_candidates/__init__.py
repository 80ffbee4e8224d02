"""Scores grids of a layer's input by what they change of its output."""
