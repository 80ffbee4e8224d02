"""`python -m bench.gpu`: all that is to be measured on a machine with an NVIDIA GPU, in a number of seconds.

- `--seconds N` works through the plan (`plan.py`) in order of worth and ends in time, with a table of what it found.
- `--precompile FOLDER` compiles, without a GPU, every kernel that this will launch; `--cache FILE` takes them along.
- `--dry-run` walks the same plan on a CPU, with times that are made up.

A step's items are done by child processes (`worker.py`), so that one that crashes or hangs costs itself and no other.
Every item ends as done, failed or skipped, with the reason; each row is in `rows.jsonl` as soon as it is measured.
"""
