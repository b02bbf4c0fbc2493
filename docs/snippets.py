# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes the Python blocks of README and guides into build/snippets, for type checkers: `make types`.

A file per document, with each block at its line, so that a message names the line of the document. Its last line turns
on all rules of pyright's level "basic", of which the package does without some, but for one that imports of diffusers
cannot satisfy.
"""

import re
import shutil
from pathlib import Path


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "snippets"
RULES = "# pyright: basic, reportPrivateImportUsage=false\n"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_snippets() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        code = ""
        for match in BLOCK.finditer(text):
            code += "\n" * (text.count("\n", 0, match.start(1)) - code.count("\n")) + match[1]
        if code:
            name = document.relative_to(ROOT).with_suffix("").as_posix().replace("/", "_").replace("-", "_")
            (FOLDER / f"{name}.py").write_text(code + RULES, encoding="utf-8")


if __name__ == "__main__":
    write_snippets()
