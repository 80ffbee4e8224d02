"""Converts packed weights from and to other libraries' formats, one file each. None of those libraries is needed."""
