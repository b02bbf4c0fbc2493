# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json
from functools import partial

import pytest
import torch
import train_tread
from runs import assert_bitwise_equal, call, interrupting, launch, weights_of
from tiny_models import SIZE


pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")

train = partial(call, train_tread)
MODEL = SIZE | {"patch_size": 2, "routes": [{"start": 1, "end": 2, "selection_ratio": 0.5}]}
TINY = {
    "model_config_name_or_path": MODEL, "train_batch_size": 3, "max_train_steps": 4, "checkpointing_steps": 2,
    "learning_rate": 0.01, "lr_scheduler": "cosine", "use_ema": True, "ema_decay": 0.9, "adam_weight_decay": 0.01,
    "optimizer": "muon", "muon_learning_rate": 0.02, "muon_weight_decay": 0.01, "max_grad_norm": 0.0,
}  # fmt: skip


@pytest.fixture
def argv(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return ["--config", path, "--output_dir"]


def test_a_stopped_run_of_muon_goes_on_exactly_and_not_with_another_optimiser(argv, tmp_path, fresh_accelerate):
    train(*argv, tmp_path / "whole")
    with interrupting(train_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 3):
        train(*argv, tmp_path / "stopped")
    with pytest.raises(ValueError, match="Expected the optimizer settings of .*muon, got adamw"):
        adamw = ["--optimizer", "adamw", "--muon_learning_rate", 1e-3, "--muon_weight_decay", 0]
        train(*argv, tmp_path / "stopped", *adamw, "--resume_from_checkpoint", "latest")
    train(*argv, tmp_path / "stopped")
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")

    # A checkpoint's rates and decays give way to those of the run that goes on with it.
    seen, step = [], train_tread.Trainer.train_step

    def watch(trainer):
        seen.append([(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups])
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tread.Trainer, "train_step", watch)
        rates = ["--muon_learning_rate", 0.03, "--muon_weight_decay", 0, "--adam_weight_decay", 0.02]
        rates += ["--learning_rate", 0.005, "--lr_scheduler", "constant"]
        train(*argv, tmp_path / "stopped", *rates, "--resume_from_checkpoint", "checkpoint-2")
    assert seen == [[(0.005, 0.02), (0.005, 0.0), (0.03, 0.0), (0.03, 0.0)]] * 2


@pytest.mark.long
def test_two_processes_and_shards_of_fsdp2_go_on_exactly_and_agree(argv, tmp_path):
    plan, kinds = [], {"ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
    for name, options in kinds.items():
        whole = [*argv, tmp_path / f"whole-{name}"]
        resumed = [*argv, tmp_path / f"resumed-{name}", "--resume_from_checkpoint", whole[-1] / "checkpoint-2"]
        plan += [{"argv": whole} | options, {"argv": resumed} | options]
    launch(plan)
    for name in kinds:
        assert_bitwise_equal(tmp_path / f"whole-{name}", tmp_path / f"resumed-{name}")

    # A step on gathered matrices is the whole step: what may differ is the order of sums in the gradients.
    ddp, fsdp = (weights_of(tmp_path / f"whole-{name}")[-1] for name in kinds)
    torch.testing.assert_close(ddp, fsdp, atol=1e-3, rtol=0)
