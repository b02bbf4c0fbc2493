# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs benchmarks one after the other in one process, small and without compiling: do they start with their flags?

    echo 'first train_step.py --presets S/8 --tokens 16 --repeats 2' | python benchmarks/smoke.py

Each line has a name, a script of this folder and its flags; on_gpu.sh writes such lines if SMOKE is set. If a script
fails, the others still run and the exit status is 1.
"""

import importlib
import shlex
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

from diffusers_tread import TREADTransformer2DModel


def main(lines: Iterable[str]) -> int:
    """Gives the exit status."""
    torch.compiler.set_stance("force_eager")
    TREADTransformer2DModel._presets["S/8"] |= {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 6}
    failed = []
    for line in lines:
        name, script, *flags = shlex.split(line)
        print(f"== {name}", flush=True)
        try:
            importlib.import_module(Path(script).stem).main(flags)
        except (Exception, SystemExit):  # argparse exits
            traceback.print_exc()
            failed.append(name)
    print(f"== failed: {', '.join(failed) or 'none'}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.stdin))
