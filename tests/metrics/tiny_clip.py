# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A CLIP with random weights, saved with the tokenizer and the settings of images that a repository has."""

import json

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


def save_clip(folder):
    """Its tokens are the letters, 16 at most; its images have 28 pixels."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(97, 123)]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 54, "max_position_embeddings": 16}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 7}, projection_dim=8)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "resample": 3}
    settings |= {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
