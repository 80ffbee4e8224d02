"""Holds keys and values of attention as 8- or 4-bit codes: writes new tokens into a cache, and reads them."""
