"""Computes L1 products, sums of absolute differences: what adder networks have where others multiply."""
