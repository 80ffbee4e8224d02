"""int8 codes added, activated and put on another grid in one pass."""
