"""What every op is made of, and knows of PyTorch."""
