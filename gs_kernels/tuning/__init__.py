"""Chooses the tiles of kernels on a GPU, and predicts their times: descriptions, cost model, tuner, tables."""
