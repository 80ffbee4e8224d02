"""Puts pages that live outside docs/ into the site, and turns links between repository files into links of the site."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[1]
# file of the repository -> its place in the site
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/results/static/README.md": "static-figures.md",
    "gs_kernels/pack/README.md": "packed-weights.md",
}
PICTURES = {
    path.relative_to(ROOT).as_posix(): f"pictures/{path.name}" for path in ROOT.glob("bench/results/*/pictures/*.png")
}
OUTSIDE = {**PAGES, **PICTURES}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files of `OUTSIDE`."""
    from mkdocs.structure.files import File

    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites links to files of the repository; one that the site does not have is a warning."""
    place = page.file.src_uri
    source = next((name for name, at in PAGES.items() if at == place), f"docs/{place}")

    def rewritten(link: re.Match[str]) -> str:
        target = link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = OUTSIDE.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if found is None:
            logger.warning(
                "%s links to %s, which the site does not have; add it to %s", source, name, Path(__file__).name
            )
            return link[0]
        return f"{link[1]}{os.path.relpath(found, posixpath.dirname(place) or '.').replace(os.sep, '/')}{link[3]}"

    return LINK.sub(rewritten, markdown)
