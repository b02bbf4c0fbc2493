#!/usr/bin/env bash
# What a stranger does who has the wheel and no clone: trains on digits, samples, evaluates, exports, loads without the
# package, edits an example. `bash tests/wheel_journey.sh PYTHON` with a Python that has the wheel with [train,fid] and
# clean-fid works in a new folder, downloads nothing, and fails at the first command that fails.
set -euo pipefail
python=$(realpath -s "$1")
command=$(dirname "$python")/diffusers-tread
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH
export HF_HOME=$folder/hub HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1

"$command" --help | tee help
for task in train precompute evaluate sample convert app make-avatars examples; do grep -q "^  $task " help; done

# Train by the launcher, sample by a copy of the example.
"$python" -m accelerate.commands.launch --cpu --num_processes 1 -m diffusers_tread train --output_dir run \
    --max_train_steps 20 --lr_warmup_steps 5
"$command" examples mine
"$python" mine/sample.py --pretrained_pipeline run/pipeline --num_samples 20 --num_inference_steps 2 --output_dir samples

# Export; and a network in place of the file that clean-fid downloads.
cat >export.py <<'END'
import sys

import torch

import diffusers_tread
from diffusers_tread.hub import export_for_hub


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d((1, 32, 64)), torch.nn.Flatten())  # 2,048 values

    def forward(self, images, return_features: bool = False):
        return self.layers(images)


assert diffusers_tread.__file__.startswith(sys.prefix), diffusers_tread  # the wheel's, no clone's
export_for_hub(diffusers_tread.TREADPipeline.from_pretrained("run/pipeline"), "exported", repo_id="ant/digits")
torch.jit.script(Network()).save("inception-2015-12-05.pt")
END
"$python" export.py
grep -q "pip install" exported/README.md

# Evaluate by the command.
"$command" evaluate --pretrained_pipeline run/pipeline --num_samples 20 --num_inference_steps 2 \
    --reference samples/images --metrics precision,recall --feature_extractor clean-fid:clean \
    --feature_extractor_weights inception-2015-12-05.pt --output_dir evaluation
grep -q '"recall"' evaluation/results/*.json

# Load where there is no such package.
"$python" - <<'END'
import sys

import torch

sys.modules["diffusers_tread"] = None
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
images = pipe(class_labels=[3], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
assert images[0].size == (8, 8) and sys.modules["diffusers_tread"] is None
END
echo "All of it works."
