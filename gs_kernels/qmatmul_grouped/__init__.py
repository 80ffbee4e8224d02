"""Products of rows with the weights of the experts that they go to, in one call."""
