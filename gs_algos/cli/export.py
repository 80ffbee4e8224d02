"""What `golden-stick export` and `import` do."""

from __future__ import annotations

from pathlib import Path

from gs_algos.export.interchange import FORMATS, Exchanged, export_language_model, import_language_model

TARGETS = tuple(FORMATS)


def run_export(source: Path, target: Path, to: str) -> str:
    """Exports and says what came of it."""
    if to not in TARGETS:
        raise ValueError(f"export: --to must be one of {', '.join(TARGETS)}, got {to!r}")
    return _said(export_language_model(source, target, to))


def run_import(source: Path, target: Path) -> str:
    """Imports and says what came of it."""
    return _said(import_language_model(source, target))


def _said(done: Exchanged) -> str:
    floats = f", now float: {', '.join(done.floats)}" if done.floats else ""
    return f"{done.folder}: {done.layers} packed layers, {done.nbytes:,} bytes{floats}"
