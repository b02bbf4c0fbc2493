# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The support table of docs/routing-any-model.md, from the models that the tests route.

python tests/hooks/support_table.py  # writes it into the guide
"""

import inspect
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import diffusers  # noqa: E402
import tiny_transformers  # noqa: E402
from diffusers.models import transformers as diffusers_transformers  # noqa: E402

from diffusers_tread import TokenRoute, apply_token_routing  # noqa: E402
from diffusers_tread.hooks.specs import MODEL_SPECS, REFUSED_BLOCKS, REFUSED_MODELS, find_by_class  # noqa: E402


GUIDE = Path(__file__).parents[2] / "docs" / "routing-any-model.md"
START, END = "<!-- support table: python tests/hooks/support_table.py -->\n", "<!-- end of the support table -->\n"


def all_transformers() -> list[str]:
    """The model classes that `diffusers.models.transformers` exports."""
    members = {name: getattr(diffusers_transformers, name) for name in dir(diffusers_transformers)}
    return sorted(
        name
        for name, member in members.items()
        if inspect.isclass(member) and issubclass(member, diffusers.ModelMixin) and member is not diffusers.ModelMixin
    )


def reason_to_refuse(name: str) -> str | None:
    """Why a class is refused, from the list of models or from the blocks that its source builds."""
    if name in REFUSED_MODELS:
        return REFUSED_MODELS[name]
    source = inspect.getsource(getattr(diffusers_transformers, name))
    return next((f"`{block}` {reason}" for block, reason in REFUSED_BLOCKS.items() if f"{block}(" in source), None)


def support_table() -> str:
    lines = ["| model | blocks that can be routed | units |", "|---|---|---|"]
    for name in sorted(tiny_transformers.classes()):
        case = tiny_transformers.build(name)
        apply_token_routing(case.model, TokenRoute(start=0, end=-4, unit=case.unit))
        blocks = [block.module for block in case.model._token_routing.blocks]
        spec = find_by_class(MODEL_SPECS, case.model)
        units = dict.fromkeys([case.unit, *(["row"] if spec is not None and spec.grid is not None else [])])
        names = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks))
        lines.append(f"| {name} | {names} | {', '.join(units)} |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name in all_transformers() if (reason := reason_to_refuse(name))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = GUIDE.read_text().split(START)
    GUIDE.write_text(before + START + "\n" + support_table() + "\n" + END + rest.split(END)[1])
