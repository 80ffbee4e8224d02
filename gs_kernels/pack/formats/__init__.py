"""Packed weights to and from the formats of other libraries, one file each. None of those libraries is needed here."""
