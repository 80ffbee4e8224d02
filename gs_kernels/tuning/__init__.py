"""What a kernel may take on a GPU, and which tiles it runs with there: descriptions, cost model, tuner, tables."""
