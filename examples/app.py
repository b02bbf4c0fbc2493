# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A web page that samples a pipeline with classifier-free guidance and with another kind, and compares their cost.

    python examples/app.py runs/xl2/pipeline

A Space starts it without arguments; there, TREAD_PIPELINE names the pipeline. GRADIO_SERVER_NAME and
GRADIO_SERVER_PORT set the address. See docs/samples-and-app.md.
"""

import argparse
import os
import threading
import time

from diffusers_tread.installation import require


require("app", "gradio")

import diffusers
import gradio as gr
import PIL.Image
import torch
from diffusers import BaseGuidance, ClassifierFreeGuidance

import diffusers_tread
from diffusers_tread import SparseGuidance, TREADPipeline, get_token_router
from diffusers_tread.files import find_pipeline
from diffusers_tread.flops import guidance_flops
from diffusers_tread.hub_errors import ADVICE, LOST
from diffusers_tread.objectives import find_objective
from diffusers_tread.pictures import make_grid


# The page offers those that the model's objective accepts, with the settings of the pipeline's own scheduler.
SAMPLERS = ("EDMHeunScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
SAMPLERS += ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowSDEScheduler")
SAMPLERS += ("DDIMScheduler", "DPMSolverMultistepScheduler")
CFG, SPARSE, AUTO = "classifier-free", "Sparse Guidance", "autoguidance"
SPARSE_KINDS = {
    SPARSE: {},
    f"{CFG} + {SPARSE}": {"null_weak_branch": True},
    AUTO: {"weak_checkpoint": True},
    f"{AUTO} + {SPARSE}": {"weak_checkpoint": True},
}
INTEGERS = {"Seed": (0, 2**53), "Images": (1, 16), "Steps": (1, 250)}
NUMBERS = {"Scale on the left": (0, 100), "Scale": (0, 100), "Strong ratio": (0, 1), "Weak ratio": (0, 1)}
NUMBERS |= {"Rescaling": (0, 1), "Guided above noise level": (0, 1000), "Guided up to noise level": (0, 1000)}
EVERYWHERE = (0.0, 1000.0)  # more than any sampler's noise levels
LOCK = threading.Lock()  # for the model: one request at a time
# Only system fonts, so that the page loads nothing from other servers.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "pretrained_pipeline",
        nargs="?",
        default=os.environ.get("TREAD_PIPELINE"),
        help="A TREADPipeline: its folder or a run's, or a repository on the Hub; by default TREAD_PIPELINE.",
    )
    args = parser.parse_args(argv)
    if args.pretrained_pipeline is None:
        raise ValueError("Expected a pipeline as argument or in TREAD_PIPELINE, got neither.")
    return args


def load_pipeline(name: str) -> TREADPipeline:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        pipeline = TREADPipeline.from_pretrained(find_pipeline(name)).to(device)
    except LOST as error:
        raise ValueError(f"Expected a TREADPipeline, got {name} ({error}). {ADVICE}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline(0, num_inference_steps=1)  # warm-up: the first call takes longer, and the page shows times
    return pipeline


def make_guider(kind: str, scale: float, strong_ratio: float, weak_ratio: float, rescale: float = 0.0) -> BaseGuidance:
    """Makes a guider. Raises ValueError for settings that are not valid."""
    if kind not in SPARSE_KINDS:
        scale = 1.0 if kind == "none" else scale
        if not scale >= 1.0:
            raise ValueError(f"Expected a scale >= 1 for classifier-free guidance, got {scale:g}.")
        return ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    if kind == AUTO:
        strong_ratio = weak_ratio = 0.0
    ratios = {"strong_ratio": strong_ratio, "weak_ratio": weak_ratio}
    return SparseGuidance(guidance_scale=scale, guidance_rescale=rescale, **ratios, **SPARSE_KINDS[kind])


def scheduler_class(name: str) -> type:
    return getattr(diffusers, name, None) or getattr(diffusers_tread, name)


def offered_samplers(pipeline: TREADPipeline) -> list[str]:
    """The pipeline's own scheduler and those that its model's objective accepts."""
    accepts = find_objective(pipeline.transformer.config.objective).accepts
    own = type(pipeline.scheduler).__name__
    return list(dict.fromkeys([own, *(name for name in SAMPLERS if accepts(scheduler_class(name)()))]))


def offered_kinds(pipeline: TREADPipeline) -> list[str]:
    kinds, has_routes = ["none", CFG], bool(get_token_router(pipeline.transformer).routes)
    if has_routes:
        kinds += [SPARSE, f"{CFG} + {SPARSE}"]
    if pipeline.guidance_transformer is not None:
        kinds += [AUTO, *([f"{AUTO} + {SPARSE}"] if has_routes else [])]
    return kinds


def sample(
    pipeline: TREADPipeline,
    guider: BaseGuidance,
    interval: tuple[float, float],
    *,
    sampler: str,
    label: int,
    steps: int,
    seed: int,
    num_images: int,
) -> tuple[PIL.Image.Image, str]:
    """Samples images, and returns them side by side with a text about their cost."""
    # Make a new pipeline, because the page's pipeline must not change.
    parts = {name: pipeline.components[name] for name in ("transformer", "vae", "guidance_transformer")}
    scheduler = scheduler_class(sampler).from_config(pipeline.scheduler.config)
    pipeline = TREADPipeline(**parts, scheduler=scheduler, guider=guider)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]

    # Sample.
    started = time.perf_counter()
    options = {"num_inference_steps": steps, "generator": generators, "guidance_interval": interval}
    images = pipeline([label] * num_images, **options).images
    seconds = time.perf_counter() - started

    # Cost.
    calls, weak_model = pipeline.num_timesteps, parts["guidance_transformer"]
    guided = {"guidance_model": weak_model, "guided_steps": pipeline.guided_steps}
    cost = guidance_flops(parts["transformer"], guider, num_steps=calls, **guided)
    text = f"**{cost.total / 1e9:.3g} GFLOPs** and **{seconds / num_images * 1e3:.3g} ms** per image"
    text += f" · {cost.share_of_cfg:.0%} of the FLOPs of dense classifier-free guidance"
    return make_grid(images, columns=4), text


def check_number(name: str, value, lowest: int, highest: int, *, is_integer: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or (is_integer and value != int(value)):
        kind = "an integer" if is_integer else "a number"
        raise ValueError(f"Expected {name}: {kind} from {lowest} to {highest}, got {str(value):.40}.")


def compare(
    pipeline: TREADPipeline,
    label,
    seed,
    num_images,
    sampler,
    steps,
    cfg_scale,
    kind,
    scale,
    strong_ratio,
    weak_ratio,
    rescale=0.0,
    low=EVERYWHERE[0],
    high=EVERYWHERE[1],
) -> tuple[PIL.Image.Image, str, PIL.Image.Image, str]:
    """Makes the pictures and costs of both sides. For bad input raises gr.Error, which the page shows."""
    # Check the input.
    numbers = {"Seed": seed, "Images": num_images, "Steps": steps, "Class": label}
    numbers |= {"Scale on the left": cfg_scale, "Scale": scale, "Strong ratio": strong_ratio, "Weak ratio": weak_ratio}
    numbers |= {"Rescaling": rescale, "Guided above noise level": low, "Guided up to noise level": high}
    try:
        if empty := [name for name, value in numbers.items() if value is None]:
            raise ValueError(f"Expected a value in every field, got none in {', '.join(empty)}.")
        classes = {"Class": (0, max(pipeline.transformer.config.num_classes - 1, 0))}
        for name, (lowest, highest) in (INTEGERS | classes | NUMBERS).items():
            check_number(name, numbers[name], lowest, highest, is_integer=name not in NUMBERS)
        if sampler not in (samplers := offered_samplers(pipeline)):
            raise ValueError(f"Expected Sampler: one of {samplers}, got {sampler!r:.40}.")
        if kind not in (kinds := offered_kinds(pipeline)):
            raise ValueError(f"Expected Kind: one of {kinds}, got {kind!r:.40}.")
        if not low < high:
            raise ValueError(f"Expected a noise level to guide up to above {low:g}, got {high:g}.")

        # Sample both sides.
        sides = [(make_guider(CFG, cfg_scale, 0.0, 0.0), EVERYWHERE)]
        sides += [(make_guider(kind, scale, strong_ratio, weak_ratio, rescale), (low, high))]
        settings = {"sampler": sampler, "label": int(label), "num_images": int(num_images)}
        settings |= {"steps": int(steps), "seed": int(seed)}
        with LOCK:
            return sum((sample(pipeline, *side, **settings) for side in sides), ())
    except ValueError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def build_page(pipeline: TREADPipeline) -> gr.Blocks:
    """Builds the page of a pipeline; one request runs at a time."""
    # What it offers.
    config, names = pipeline.transformer.config, pipeline.config.id2label or {}
    samplers = offered_samplers(pipeline)
    labels = range(max(config.num_classes, 1))  # a model without classes has one label
    classes = [(f"{label}: {names[str(label)]}" if str(label) in names else f"{label}", label) for label in labels]
    kinds = offered_kinds(pipeline)

    # Inputs and outputs.
    with gr.Blocks(title="diffusers-tread", analytics_enabled=False) as page:
        gr.Markdown("# Token routing and Sparse Guidance\nThe same noise, guided in two ways.")
        with gr.Row():
            label = gr.Dropdown(classes, value=0, label="Class")
            seed = gr.Number(0, label="Seed")
            num_images = gr.Number(8, label="Images")
            sampler = gr.Dropdown(samplers, value=samplers[0], label="Sampler", scale=2)
            steps = gr.Number(20, label="Steps")
        with gr.Row():
            with gr.Column():
                gr.Markdown("## Dense classifier-free guidance")
                cfg_scale = gr.Number(1.5, label="Scale on the left", step=0.1)
            with gr.Column():
                gr.Markdown("## Guidance of your choice")
                kind = gr.Radio(kinds, value=SPARSE if SPARSE in kinds else CFG, label="Kind")
                with gr.Row():
                    scale = gr.Number(1.4, label="Scale", step=0.1)
                    strong_ratio = gr.Number(0.2, label="Strong ratio", step=0.05, visible=SPARSE in kinds)
                    weak_ratio = gr.Number(0.8, label="Weak ratio", step=0.05, visible=SPARSE in kinds)
                with gr.Row():
                    rescale = gr.Number(0, label="Rescaling", step=0.1)
                    low = gr.Number(EVERYWHERE[0], label="Guided above noise level", step=0.1)
                    high = gr.Number(EVERYWHERE[1], label="Guided up to noise level", step=0.1)
        button = gr.Button("Generate", variant="primary")
        outputs = []
        with gr.Row():
            for side in ("Left", "Right"):
                with gr.Column():
                    outputs += [
                        gr.Image(label=side, format="png", type="pil", buttons=["download", "fullscreen"]),
                        gr.Markdown(),
                    ]
        gr.Markdown(
            "A ratio is the share of tokens that skip the middle blocks. Noise levels are the sampler's sigmas, t in "
            "[0, 1] of flow matching. FLOPs are counted, multiply-adds as two; times are measured."
        )

        # Actions.
        def run(*values):
            return compare(pipeline, *values)

        inputs = [label, seed, num_images, sampler, steps, cfg_scale, kind, scale, strong_ratio, weak_ratio]
        more = [rescale, low, high]
        inputs += more
        button.click(run, inputs, outputs, concurrency_limit=1, api_visibility="private")
        # Show only the fields that this kind of guidance uses.
        kind.change(
            lambda kind: 4 * [gr.update(visible=kind != "none")] + 2 * [gr.update(visible=SPARSE in kind)],
            kind,
            [scale, *more, strong_ratio, weak_ratio],
            api_visibility="private",
        )
    # Only the button starts work, and the queue is short.
    return page.queue(max_size=32, api_open=False, default_concurrency_limit=1)


def main(argv: list[str] | None = None) -> None:
    demo = build_page(load_pipeline(parse_args(argv).pretrained_pipeline))
    demo.launch(theme=THEME, max_file_size="1kb")  # the page needs no uploads


if __name__ == "__main__":
    main()
