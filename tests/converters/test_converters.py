# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Conversion of other people's weights: parity with the sources' formulas, round trips, and what is refused."""

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from closeness import difference, rounding
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_tread import EDMHeunScheduler, TokenRoute, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.converters import convert_checkpoint, convert_diffusers_dit, export_dit
from diffusers_tread.converters.__main__ import main


sys.path.insert(0, str(Path(__file__).parent))
from dit_formulas import dit, random_dit  # noqa: E402


# Six blocks of width 32, with 128 in the MLP and 16 tokens. DiT uses most of it, by its cosines of up to 999.
LIMIT = rounding(6 * 312)
LABELS = torch.tensor([0, 5, 2])  # 5 is the null class
# What the tiny checkpoints do not tell.
HINTS = {"num_attention_heads": 4, "num_classes": 5}
FLAGS = ["--num_attention_heads=4", "--num_classes=5"]
# Per source: times that its network sees, and the timesteps that our scheduler gives for them.
TIMES = {
    "tread": ([-1.5, 0.0, 1.1], lambda c_noise: c_noise),
    "tread_flow": ([0.0, 0.3, 1.0], lambda t: 1000 * t),
    "dit": ([0.0, 500.0, 999.0], lambda t: t),
    "sit": ([0.0, 0.3, 1.0], lambda t: 1000 * (1 - t)),
    "repa": ([0.0, 0.3, 1.0], lambda t: 1000 * t),
}
OBJECTIVES = {"tread": "edm", "tread_flow": "flow", "dit": "epsilon", "sit": "flow", "repa": "flow"}


@pytest.fixture
def weights():
    """A DiT with learned variance: six output channels for three of input."""
    return random_dit(out_channels=6)


@pytest.fixture
def latents():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def convert(tmp_path):
    """Saves a checkpoint with torch.save and converts it."""

    def convert(content, source="tread", **options):
        torch.save(content, tmp_path / "checkpoint.pt")
        return convert_checkpoint(tmp_path / "checkpoint.pt", source=source, **(HINTS | options))

    return convert


def state_of(content):
    return content.state_dict() if isinstance(content, torch.nn.Module) else content


def with_random_weights(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def assert_equal(left, right):
    left, right = state_of(left), state_of(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# Parity.


@pytest.mark.parametrize("source", TIMES)
@torch.no_grad()
def test_a_converted_network_gives_the_source_s_output(convert, weights, latents, source):
    times, timesteps = torch.tensor(TIMES[source][0]), TIMES[source][1]
    transformer = convert(weights, source).transformer
    output = transformer(latents, timesteps(times), LABELS).sample
    expected = dit(weights, latents, times, LABELS, heads=4)[:, :3]  # without the variances
    expected = -expected if source == "sit" else expected  # data - noise there, noise - data here
    assert difference(output.double(), expected) < LIMIT
    assert transformer.config.objective == OBJECTIVES[source]


def sampled(pipe, latents, steps):
    pipe.set_progress_bar_config(disable=True)
    return pipe(LABELS, num_inference_steps=steps, latents=latents, output_type="latent").images.double()


def test_a_step_of_the_edm_pipeline_is_the_source_s_preconditioned_denoiser(convert, latents):
    weights, sigma, sigma_data = random_dit(), 2.0, 0.5
    pipe = convert(weights)
    # From sigma = 80 the step would round off the fifth digit by itself.
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, sigma_max=sigma)
    x, total = sigma * latents.double(), (sigma**2 + sigma_data**2) ** 0.5  # EDM (arXiv 2206.00364), Table 1
    network = dit(weights, x / total, torch.full((3,), np.log(sigma) / 4), LABELS, heads=4)
    denoised = (sigma_data / total) ** 2 * x + sigma * sigma_data / total * network
    assert difference(sampled(pipe, latents, 1), denoised) < LIMIT


@pytest.mark.parametrize("source", ["tread_flow", "sit", "repa"])
def test_steps_of_the_flow_pipelines_are_the_source_s_euler_steps(convert, weights, latents, source):
    x = latents.double()
    for sigma, following in [(1.0, 0.5005), (0.5005, 0.001), (0.001, 0.0)]:  # diffusers' levels
        time = 1 - sigma if source == "sit" else sigma
        velocity = dit(weights, x, torch.full((3,), time), LABELS, heads=4)[:, :3]
        x = x + (sigma - following if source == "sit" else following - sigma) * velocity
    assert difference(sampled(convert(weights, source), latents, 3), x) < LIMIT


def test_steps_of_the_noise_predicting_pipeline_are_the_source_s_ddim_steps(convert, weights, latents):
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = latents.double()
    for time, previous in [(500, kept[0]), (0, torch.tensor(1.0))]:  # DDIM (arXiv 2010.02502), Equation 12, eta 0
        noise = dit(weights, x, torch.full((3,), float(time)), LABELS, heads=4)[:, :3]
        data = (x - (1 - kept[time]).sqrt() * noise) / kept[time].sqrt()
        x = previous.sqrt() * data + (1 - previous).sqrt() * noise
    assert difference(sampled(convert(weights, "dit"), latents, 2), x) < LIMIT


def test_only_the_sources_that_routed_get_the_paper_s_route(convert, weights):
    routes = {source: convert(weights, source).transformer.config.routes for source in TIMES}
    paper = [TokenRoute(start=2, end=2, selection_ratio=0.5).to_dict()]
    assert routes == {"tread": paper, "tread_flow": paper, "dit": None, "sit": None, "repa": None}


def test_the_heads_of_dit_s_own_sizes_are_known(convert):
    weights = random_dit(width=384, depth=12, mlp_ratio=1, channels=4, out_channels=4, classes=3)
    config = convert(weights, num_attention_heads=None, num_classes=3).transformer.config
    assert (config.num_attention_heads, config.attention_head_dim, config.mlp_ratio) == (6, 64, 1.0)
    assert (config.in_channels, config.sample_size, config.num_classes, config.patch_size) == (4, 8, 3, 2)


# Which weights of a file.


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def compiled(weights):
    """As of a model whose blocks are compiled one by one."""
    return {name.replace(".attn.", "._orig_mod.attn."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda raw, ema: prefixed(ema, "model."),  # EDM's preconditioning
        lambda raw, ema: prefixed(ema, "module._orig_mod.model."),
        lambda raw, ema: compiled(ema),
        lambda raw, ema: {"model": prefixed(raw, "module."), "ema": ema, "opt": {"state": {0: {"step": 1}}}},
        lambda raw, ema: {"model_state_dict": raw, "ema_state_dict": {"n_averaged": 3} | prefixed(ema, "module.")},
        lambda raw, ema: {"state_dict": prefixed(raw, "model.") | prefixed(ema, "model_ema.")},
        lambda raw, ema: {"ema": ema, "args": argparse.Namespace(model="DiT-XL/2", epochs=1400)},
        lambda raw, ema: {"ema": {name: tensor for name, tensor in ema.items() if name != "pos_embed"}},
    ],
)
def test_wrappers_are_taken_off_and_averaged_weights_preferred(convert, wrap):
    raw, ema = random_dit(seed=1), random_dit(seed=2)
    has_positions = any("pos_embed" in str(name) for name in pickled_names(wrap(raw, ema)))
    transformer = convert(wrap(raw, ema), sample_size=None if has_positions else 8).transformer
    assert_equal(transformer, convert(ema).transformer)


def pickled_names(content):
    for name, value in content.items():
        yield name
        yield from pickled_names(value) if isinstance(value, dict) else ()


def test_weights_are_chosen_by_name(convert, tmp_path):
    raw, ema = random_dit(seed=1), random_dit(seed=2)
    content = {"model": prefixed(raw, "model."), "ema": ema}
    assert_equal(convert(content, weights="model").transformer, convert(raw).transformer)
    with pytest.raises(ValueError, match=r"one of \['ema', 'model.model'\], got 'average'"):
        convert(content, weights="average")
    with pytest.raises(ValueError, match=r"one of \['one', 'two'\], got None"):
        convert({"one": raw, "two": ema})

    safetensors.torch.save_file(ema, tmp_path / "ema.safetensors")
    from_safetensors = convert_checkpoint(tmp_path / "ema.safetensors", source="tread", **HINTS)
    assert_equal(from_safetensors.transformer, convert(ema).transformer)


def test_halves_are_converted_to_float32(convert):
    halves = {name: tensor.half() for name, tensor in random_dit().items()}
    state_dict = convert(halves).transformer.state_dict()
    assert torch.equal(state_dict["patch_embedding.bias"], halves["x_embedder.proj.bias"].float())


# What is refused.


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), r"Missing: \['blocks.1.mlp.fc1.bias'\], unknown: \[\]"),
        (lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}), "Missing: .*blocks.0.attn.k_norm"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.2.")], "Missing: .*blocks.2.attn.proj"),
        (lambda w: w.update({"t_embedder.mlp.2.bias": torch.zeros(7)}), "size mismatch for timestep_embedding"),
        (lambda w: w.update({"final_layer.linear.bias": torch.zeros(7)}), "3 or 6 channels .* got 7 rows"),
        (lambda w: w.update({"pos_embed": w["pos_embed"].flip(1)}), "sine-cosine table of 16 tokens"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][:, :15]}), "another of shape"),
        (lambda w: w.pop("pos_embed"), "Give sample_size"),
        (lambda w: w.clear(), "got no tensors"),
        (lambda w: w.pop("x_embedder.proj.weight"), "Is it another architecture"),
    ],
)
def test_wrong_weights_are_named(convert, change, message):
    weights = random_dit()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert(weights)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "ddpm"}, r"source among \['dit', 'lightningdit', 'repa', .*\], got 'ddpm'"),
        ({"num_attention_heads": None}, "width 32, got 0"),
        ({"num_attention_heads": 5}, "width 32, got 5"),
        ({"num_attention_heads": -4}, "width 32, got -4"),
        ({"sample_size": 16}, "got 16, and 8 from the checkpoint"),
    ],
)
def test_wrong_options_are_refused(convert, options, message):
    with pytest.raises(ValueError, match=message):
        convert(random_dit(), **options)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format, contents", [(False, r"\.pt with \w+\.mkdir\. If"), (True, r"\.pt\. If")])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path, old_format, contents):
    made, file = tmp_path / "made", tmp_path / "hostile.pt"
    content = {"ema": random_dit(), "args": argparse.Namespace(epochs=1), "more": Hostile(made)}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=f"{contents}.* was not read.*--allow_unsafe_pickle"):
        convert_checkpoint(file, source="tread", **HINTS)
    assert not made.exists()

    pipe = convert_checkpoint(file, source="tread", **HINTS, allow_unsafe_pickle=True)
    assert made.exists() and isinstance(pipe, TREADPipeline)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="missing.pt, which is none"):
        convert_checkpoint(tmp_path / "missing.pt", source="dit")
    torch.save(random_dit(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-2000])
    for name in ("text.pt", "empty.pt", "text.safetensors"):
        (tmp_path / name).write_text("" if name == "empty.pt" else "a page that says: not found")
    for name in ("cut.pt", "text.pt", "empty.pt", "text.safetensors"):
        with pytest.raises(ValueError, match=f"Expected .*{name}"):
            convert_checkpoint(tmp_path / name, source="dit")


# Ours into DiT's layout.


@pytest.fixture
def transformer():
    model = TREADTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, sample_size=8, num_classes=5, objective="edm"
    )
    return with_random_weights(model).eval()


@torch.no_grad()
def test_an_exported_model_gives_the_same_output_in_dit(transformer, latents):
    exported, times = export_dit(transformer), torch.tensor([-1.0, 0.2, 1.0])
    assert exported.keys() == random_dit(depth=12).keys()
    expected = transformer(latents, times, LABELS).sample.double()
    assert difference(dit(exported, latents, times, LABELS, heads=4), expected) < LIMIT


@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_ours_to_dit_and_back_is_bitwise_equal(tmp_path, convert, transformer, objective):
    transformer.register_to_config(objective=objective)
    convert(export_dit(transformer)).transformer.save_pretrained(tmp_path / "back")
    # The weights do not tell the objective: the source's name does, or who loads them.
    back = TREADTransformer2DModel.from_pretrained(
        tmp_path / "back", **({"objective": "flow"} if objective == "flow" else {})
    )
    assert_equal(back, transformer)
    names = [name for name in transformer.config if not name.startswith("_")]
    assert {name: back.config[name] for name in names} == {name: transformer.config[name] for name in names}


def test_dit_to_ours_and_back_is_bitwise_equal(convert):
    weights = random_dit()
    assert_equal({**export_dit(convert(weights, "dit").transformer), "pos_embed": weights["pos_embed"]}, weights)


@pytest.mark.parametrize(
    "changes", [{"timestep_scale": 0.001}, {"attention_bias": False}, {"norm_eps": 1e-5}, {"freq_shift": 1}]
)
def test_a_model_that_dit_cannot_express_is_not_exported(changes):
    with pytest.raises(ValueError, match=f"DiT's settings .* got {changes}"):
        export_dit(TREADTransformer2DModel(num_layers=6, attention_head_dim=4, sample_size=8, **changes))


# diffusers' DiT.


def make_diffusers_dit(**changes):
    settings = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 6}
    settings |= {"num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5}
    model = with_random_weights(DiTTransformer2DModel(**(settings | changes)))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_eps": 1e-2}, {"attention_bias": False}, {"out_channels": None, "patch_size": 4, "num_layers": 2}],
)
@torch.no_grad()
def test_a_converted_diffusers_dit_gives_its_output(tmp_path, latents, changes):
    original = make_diffusers_dit(**changes)
    original.save_pretrained(tmp_path)
    pipe = convert_diffusers_dit(tmp_path)
    times = torch.tensor([0, 500, 999])
    expected = original(latents, times, LABELS).sample[:, :3]
    assert difference(pipe.transformer(latents, times, LABELS).sample, expected) < LIMIT
    assert isinstance(pipe.scheduler, DDIMScheduler) and not pipe.scheduler.config.clip_sample


def test_a_diffusers_pipeline_is_converted_with_its_scheduler_vae_and_names(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.3,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    original = DiTPipeline(make_diffusers_dit(), vae.eval(), scheduler, id2label={0: "tench", 3: "crane"})
    original.save_pretrained(tmp_path / "dit")
    # As facebook/DiT-XL-2-256 has it: the transformer's former class, and names beside the components.
    change_json(tmp_path / "dit" / "transformer" / "config.json", _class_name="Transformer2DModel")
    change_json(tmp_path / "dit" / "model_index.json", id2label={"0": "tench", "3": "crane"})

    pipe = convert_diffusers_dit(tmp_path / "dit")
    images = []
    for each in (original, pipe):
        each.set_progress_bar_config(disable=True)
        settings = {"guidance_scale": 1.0, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
        images.append(each(class_labels=[3, 0], output_type="np", **settings).images)
    np.testing.assert_allclose(images[1], images[0], atol=1e-5)
    assert images[0].std() > 0.01 and pipe.get_label_ids("crane") == [3]
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_diffusers_models_that_cannot_be_converted_are_refused(tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        convert_diffusers_dit(tmp_path / "missing")

    original = make_diffusers_dit(activation_fn="gelu")
    original.save_pretrained(tmp_path / "gelu")
    with pytest.raises(ValueError, match="'gelu-approximate', got 'gelu'"):
        convert_diffusers_dit(tmp_path / "gelu")

    original = make_diffusers_dit()
    original.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data[0] += 1
    original.save_pretrained(tmp_path / "embedders")
    with pytest.raises(ValueError, match="transformer_blocks.2.norm1.emb.class_embedder.* unlike block 0's"):
        convert_diffusers_dit(tmp_path / "embedders")

    file = tmp_path / "embedders" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["stranger"] = tensors.pop("proj_out_1.bias")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Missing: \['proj_out_1.bias'\], unknown: \['stranger'\]"):
        convert_diffusers_dit(tmp_path / "embedders")


def test_a_hostile_pickle_in_a_diffusers_folder_is_refused_and_nothing_of_it_runs(tmp_path):
    original, made = make_diffusers_dit(), tmp_path / "made"
    original.save_pretrained(tmp_path / "dit", safe_serialization=False)
    convert_diffusers_dit(tmp_path / "dit")  # an honest pickle is read
    file = tmp_path / "dit" / "diffusion_pytorch_model.bin"
    torch.save({**original.state_dict(), "more": Hostile(made)}, file)
    with pytest.raises(OSError, match="Unable to load weights"):
        convert_diffusers_dit(tmp_path / "dit")
    assert not made.exists()


def test_dit_s_own_formulas_can_be_had_from_a_diffusers_dit(tmp_path, latents):
    make_diffusers_dit().save_pretrained(tmp_path / "dit")
    convert_diffusers_dit(tmp_path / "dit").save_pretrained(tmp_path / "ours")
    transformer = TREADTransformer2DModel.from_pretrained(
        tmp_path / "ours", subfolder="transformer", freq_shift=0, ff_norm_eps=None
    )
    times = torch.tensor([0.0, 500.0, 999.0])
    with torch.no_grad():
        output = transformer(latents, times, LABELS).sample.double()
    expected = dit(export_dit(transformer), latents, times, LABELS, heads=2)
    assert difference(output, expected) < LIMIT


# The command line.


def test_the_command_writes_a_pipeline_that_loads(tmp_path, convert, weights):
    expected = convert(weights, "sit")
    main(["checkpoint", f"{tmp_path}/checkpoint.pt", f"{tmp_path}/sit", "--source", "sit", *FLAGS])
    loaded = TREADPipeline.from_pretrained(tmp_path / "sit")
    assert_equal(loaded.transformer, expected.transformer)
    assert isinstance(loaded.scheduler, type(expected.scheduler)) and loaded.scheduler.config.shift == 1.0
    assert {path.suffix for path in (tmp_path / "sit" / "transformer").iterdir()} == {".json", ".safetensors"}


def test_the_command_takes_a_vae_and_diffusers_folders(tmp_path):
    make_diffusers_dit().save_pretrained(tmp_path / "dit")
    vae = AutoencoderKL(block_out_channels=[4], norm_num_groups=4, latent_channels=3)
    vae.save_pretrained(tmp_path / "vae")
    main(["diffusers", f"{tmp_path}/dit", f"{tmp_path}/new/ours", "--vae", f"{tmp_path}/vae"])
    assert TREADPipeline.from_pretrained(tmp_path / "new" / "ours").vae.config.latent_channels == 3


def test_the_command_round_trip_through_dit_s_layout(tmp_path, transformer, monkeypatch):
    transformer.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(sys, "argv", ["convert", "to_dit", f"{tmp_path}/ours", f"{tmp_path}/dit.safetensors"])
    monkeypatch.delitem(sys.modules, "diffusers_tread.converters.__main__")
    runpy.run_module("diffusers_tread.converters", run_name="__main__")
    options = ["--source", "tread", *FLAGS, "--transformer_only"]
    main(["checkpoint", f"{tmp_path}/dit.safetensors", f"{tmp_path}/back", *options])
    assert_equal(TREADTransformer2DModel.from_pretrained(tmp_path / "back"), transformer)


def test_a_run_s_folder_or_a_pipeline_s_stands_for_the_transformer_in_it(tmp_path, transformer):
    pipe = TREADPipeline(transformer, EDMHeunScheduler())
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    for index, folder in enumerate(("run", "run/pipeline")):
        main(["to_dit", f"{tmp_path}/{folder}", f"{tmp_path}/{index}.safetensors"])
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


@pytest.fixture
def command(tmp_path, convert, weights):
    """Arguments for a checkpoint of DiT, whose heads are still to be told."""
    convert(weights)
    return ["checkpoint", f"{tmp_path}/checkpoint.pt", f"{tmp_path}/out", "--source=dit"]


def test_the_command_refuses_to_overwrite_and_says_what_is_wrong(tmp_path, command, capsys):
    with pytest.raises(SystemExit):
        main(command)
    assert "--num_attention_heads" in capsys.readouterr().err and not (tmp_path / "out").exists()

    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        main([*command, *FLAGS])
    assert "out, which exists" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_ctrl_c_ends_without_a_traceback_or_a_folder(tmp_path, command, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_tread.converters.__main__._run", stopped)
    with pytest.raises(SystemExit) as ended:
        main([*command, *FLAGS])
    assert ended.value.code == 130 and "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, convert, weights, monkeypatch):
    convert(weights)
    command = ["checkpoint", f"{tmp_path}/checkpoint.pt", f"{tmp_path}/out", "--source=dit", *FLAGS]

    def disk_full(self, folder, **options):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TREADPipeline, "save_pretrained", disk_full)
        with pytest.raises(OSError, match="No space"):
            main(command)
    assert not (tmp_path / "out").exists()
    main(command)
    assert not (tmp_path / "out" / "half").exists() and (tmp_path / "out" / "model_index.json").exists()
    assert not (tmp_path / "out.tmp").exists()
