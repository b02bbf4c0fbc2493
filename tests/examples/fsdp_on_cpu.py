# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs the training example under FSDP2 on CPU processes, for `torchrun`.

Accelerate turns FSDP on for accelerators only. Torch's `fully_shard` works on CPU processes, so this switches
Accelerate's state over before the example makes its `Accelerator`; everything after that is the real thing.
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


if __name__ == "__main__":
    import train_tread

    state = Accelerator(cpu=True).state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    train_tread.main()
