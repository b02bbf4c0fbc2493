# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The card of a folder of latents, whatever its parts are called."""

import ast
import json
import re
import shlex

import pytest

from diffusers_tread.data import LatentsInfo
from diffusers_tread.data.latents.card import latents_card


STRANGE = "a|b <img src=x> `c` [d](e)"
ESCAPED = r"a\|b &lt;img src=x&gt; \`c\` \[d\](e)"


def make_card(repo_id="ant/latents", **changes):
    vae = {"name_or_path": "vae", "revision": None, "class_name": "AutoencoderKL", "dtype": "float32"}
    fields = {
        "kind": "latents", "dtype": "float32", "latent_channels": 2, "latent_size": 8, "resolution": 16,
        "scaling_factor": 0.5, "vae": vae | changes.pop("vae", {}), "source": {}, "id2label": {0: "ant"},
        "num_samples": 3, "shards": (),
    }  # fmt: skip
    return latents_card(LatentsInfo(**fields | changes), repo_id=repo_id).text


@pytest.mark.parametrize(
    "changes",
    [
        {"source": {"train_data_dir": STRANGE}},
        {"source": {"tars": STRANGE.replace(" <", "\n<")}},
        {"vae": {"name_or_path": STRANGE}},
        {"vae": {"revision": STRANGE}},
        {"crop": STRANGE},
        {"captions": (STRANGE,), "id2label": {}, "format_version": 2},
    ],
)
def test_names_stay_text_in_their_place(changes):
    text = re.sub(r"^```.*?^```$", "", make_card(**changes), flags=re.MULTILINE | re.DOTALL)
    assert ESCAPED in text and "<img" not in text
    assert len(re.findall(r"^\| .* \|$", text, re.MULTILINE)) == 7


def test_the_name_of_the_folder_is_quoted_where_it_is_code():
    name = "ant/\"; import os; 'x' $(true) #"
    text = make_card(repo_id=name)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ast.parse(code) and f"load_dataset({json.dumps(name)}, " in code
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert shlex.split(command)[3] == f"latents:{name}"


def test_the_formula_is_that_of_the_statistics():
    assert "`(latents - 0.0) * 0.5`" in make_card()
    text = make_card(latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0))
    assert "| `(latents - latents_mean) * 0.5 / latents_std` |" in text
    assert "latents_std = torch.tensor([3.0, 4.0]).view(1, -1, 1, 1)" in text
