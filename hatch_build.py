# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What pyproject.toml cannot say: addresses, and the README with links that work outside the repository.

The repository's address is `repository-code` of CITATION.cff, or DIFFUSERS_TREAD_REPOSITORY of the environment, which
the workflow that publishes sets. Without one the README keeps its relative links.
"""

import os
import re
import runpy
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


PAPERS = {
    "Paper (TREAD)": "https://arxiv.org/abs/2501.04765",
    "Paper (Sparse Guidance)": "https://arxiv.org/abs/2601.01608",
}
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)")


class AddressesAndReadme(MetadataHookInterface):
    """Sets `urls` and `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        text, address = (root / "README.md").read_text(encoding="utf-8"), repository(root)
        metadata["urls"] = dict(PAPERS)
        if address is not None:
            version = runpy.run_path(str(root / "src" / "diffusers_tread" / "version.py"))["__version__"]
            metadata["urls"] |= {
                "Repository": address,
                "Documentation": f"{address}/tree/v{version}/docs",
                "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
            text = with_absolute_links(text, address, f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def repository(root: Path) -> str | None:
    """The address of the repository, without a slash at its end; None if it is not known."""
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if found := re.search(r"^repository-code: *[\"']?([^\s\"']+)", citation, re.MULTILINE):
        return found[1].rstrip("/")
    return os.environ.get("DIFFUSERS_TREAD_REPOSITORY") or None


def with_absolute_links(text: str, address: str, revision: str) -> str:
    """Markdown whose relative links lead to a revision of the repository; pictures to the files themselves."""

    def absolute(match: re.Match) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{match['text']}]({address}/{kind}/{revision}/{match['path']})"

    return LINK.sub(absolute, text)
