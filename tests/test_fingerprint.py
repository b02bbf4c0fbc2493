# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import hashlib

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusers_tread.fingerprint import weights_fingerprint


def test_a_fingerprint_is_the_hash_of_sorted_names_shapes_and_values():
    def fingerprint(vae):
        state = {name: tensor.numpy().astype("<f4") for name, tensor in vae.float().state_dict().items()}
        parts = [f"{name} {state[name].shape} ".encode() + state[name].tobytes() for name in sorted(state)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    before = weights_fingerprint(vae)
    assert before == fingerprint(vae) and vae.dtype == torch.float32

    # The same for the same weights in another precision, another for another weight.
    vae.half()
    rounded = weights_fingerprint(vae)
    assert rounded == weights_fingerprint(vae.float()) == weights_fingerprint(vae.double()) != before
    with torch.no_grad():
        weight = vae.float().decoder.conv_out.bias
        weight[0] = float(np.nextafter(np.float32(weight[0]), np.float32(9)))
    assert weights_fingerprint(vae) != rounded
