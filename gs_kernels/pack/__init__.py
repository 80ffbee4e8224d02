"""Codes of 1, 2, 4 and 8 bits packed into bytes: the format, and its way in and out of other libraries' formats."""
