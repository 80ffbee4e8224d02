"""Holds trainable layers and quantizers that round in the forward, as quantization-aware training needs them."""
