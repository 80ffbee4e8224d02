"""Packs codes of 1, 2, 4 and 8 bits into bytes, and converts them from and to other libraries' formats."""
