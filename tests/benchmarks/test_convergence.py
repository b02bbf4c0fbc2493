# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs differ by their routes alone, what is compared follows from the curves, and a run that was cut goes on."""

import json
from types import SimpleNamespace

import convergence
import convergence_data
import convergence_report
import numpy as np
import PIL.Image
import pytest
import torch
from convergence_data import Images, draw_avatars, read_folders
from convergence_judge import NUM_LEVELS, Judge, level_weights
from convergence_train import Draws, Run, Variant, make_model, to_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_tread import FlowMatchingObjective
from diffusers_tread.flops import training_flops
from diffusers_tread.objectives import flow


NUM_CLASSES, SIZE = 4, 8
SMOKE = """
    --width 32 --depth 6 --heads 2 --steps 12 --warmup_steps 3 --lr 0.01 --batch_size 4 --evaluations 4 --warmup 1
    --samples_at 2 --heldout_per_level 4 --num_samples 8 --sampling_steps 2 --eval_batch_size 20 --judge_steps 30
"""


def make_images(seed: int = 0) -> Images:
    """Noise around a colour per class."""
    numbers = np.random.default_rng(seed)
    colors = np.array([[60, 60, 60], [200, 60, 60], [60, 200, 60], [60, 60, 200]])
    fields = {}
    for kind, count in (("train", 40), ("heldout", 32)):
        labels = np.arange(count) % NUM_CLASSES
        noise = numbers.integers(-50, 50, (count, SIZE, SIZE, 3))
        fields |= {f"{kind}_images": (colors[labels][:, None, None] + noise).astype(np.uint8)}
        fields |= {f"{kind}_labels": labels}
    return Images(**fields, class_names=("grey", "red", "green", "blue"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    make_images().save(path)
    return path


@pytest.fixture
def flags(data_file):
    return ["--data", str(data_file), *SMOKE.split()]


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    """The report of dense and routed with two seeds, and the folder with what was written."""
    folder = tmp_path_factory.mktemp("run")
    report = convergence.main(
        ["--data", str(data_file), *SMOKE.split(), "--seeds", "0,1", "--guidance_scales", "1,2"]
        + ["--output", str(folder / "report.json"), "--plot", str(folder / "plot.png")]
        + ["--samples", str(folder / "samples.png")]
    )
    return report, folder


def losses(report: dict) -> dict:
    return {
        (run["variant"], run["seed"]): [(point["heldout_losses"], point["train_loss"]) for point in run["points"]]
        for run in report["runs"]
    }


# ------------------------------------------------------------------------------------------------------------- report


def test_another_denoiser_learns_digits_and_routes_what_it_is_told_to(tmp_path):
    convergence.main(["--make_data", str(tmp_path / "digits.npz"), "--digits"])
    images = Images.load(tmp_path / "digits.npz")
    assert images.train_images.shape == (1197, 8, 8, 3) and len(images.heldout_images) == 600
    assert not {image.tobytes() for image in images.train_images} & {one.tobytes() for one in images.heldout_images}

    model = '{"_class_name": "TREADTransformer2DModel", "num_attention_heads": 3, "attention_head_dim": 8}'
    flags = ["--data", str(tmp_path / "digits.npz"), *SMOKE.split(), "--model", model, "--num_samples", "10"]
    convergence.main([*flags, "--variants", "unit=row", "--steps", "4"])
    args = convergence.parse_args(flags)
    variant = Variant.parse("unit=row", depth=args.depth)
    made = make_model(args, variant, 0, size=8, num_classes=10)
    assert made.config.num_attention_heads == 3 and made.token_router.routes[0].unit == "row"


def test_the_report_holds_all_that_was_measured(finished):
    report, folder = finished
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [(run["seed"], run["variant"]) for run in report["runs"]] == [
        (seed, name) for seed in (0, 1) for name in ("dense", "routed")
    ]
    assert report["command"].startswith("python benchmarks/convergence.py --data")
    assert report["data"]["train_images"] == 40 and report["data"]["classes"] == NUM_CLASSES
    assert "data" not in report["settings"] and report["settings"]["lr"] == 0.01
    assert report["judge"]["reference_images"] == 24 and report["judge"]["heldout_accuracy"] > 0.5
    for run in report["runs"]:
        points = run["points"]
        assert run["finished"] and [point["step"] for point in points] == [0, 3, 6, 9, 12]
        assert [sorted(point.get("samples", {})) for point in points] == [[], [], ["1", "2"], [], ["1", "2"]]
        assert all(before["seconds"] < after["seconds"] for before, after in zip(points, points[1:], strict=False))
        assert points[-1]["heldout_loss"] < points[0]["heldout_loss"]
        assert all(len(point["heldout_losses"]) == NUM_LEVELS for point in points)


def test_the_figure_and_the_sheet_are_written(finished):
    _, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "report.json", "samples.npz", "samples.png"]
    assert PIL.Image.open(folder / "plot.png").size == (1600, 500)
    with np.load(folder / "samples.npz") as rows:
        assert {name: rows[name].shape for name in rows.files} == {
            name: (NUM_CLASSES, SIZE, SIZE, 3) for name in ("real", "dense", "routed")
        }
        assert (rows["real"] == make_images().heldout_images[:NUM_CLASSES]).all()


def test_a_report_is_shown_again_without_training(finished, tmp_path, monkeypatch, capsys):
    report, folder = finished
    monkeypatch.setattr(convergence, "compare_variants", None)
    flags = ["--plot", str(tmp_path / "again.png"), "--plot_against", "flops"]
    again = convergence.main(["--from_json", str(folder / "report.json"), *flags])
    assert again == json.loads(json.dumps(report)) and (tmp_path / "again.png").exists()
    assert convergence.table(report) in capsys.readouterr().out


def test_the_table_has_a_line_per_variant_and_says_how_many_seeds(finished):
    header, rule, *lines, blank, conditions = convergence.table(finished[0]).splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [["| dense", "2"], ["| routed", "2"]]
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")} and "CFG 2" in header
    assert "40 images of 8 pixels in 4 classes" in conditions and not blank


# --------------------------------------------------------------------------------------------------------------- runs


def test_two_runs_of_a_seed_are_the_same_and_of_two_seeds_are_not(finished, flags):
    first, second = losses(finished[0]), losses(convergence.main(flags))
    assert second == {key: value for key, value in first.items() if key[1] == 0}
    assert first["dense", 0] != first["dense", 1]


def test_nothing_but_the_routes_differs_between_variants(finished, flags):
    """A route that takes no token away trains as dense does, to the last bit; one that takes some does not."""
    report = convergence.main([*flags, "--variants", "ratio=0"])
    dense, routed = losses(finished[0])["dense", 0], losses(finished[0])["routed", 0]
    assert losses(report)["ratio=0", 0] == dense
    assert routed[0] == dense[0] and routed[1] != dense[1]


@pytest.fixture
def make_run(flags):
    images = make_images()
    data = to_device(images, "cpu")

    def make(name: str, *others: str) -> Run:
        args = convergence.parse_args([*flags, *others])
        variant = Variant.parse(name, depth=args.depth)
        draws = Draws.make(args, 0, steps=variant.num_steps(args.steps), num_images=len(images.train_images))
        sets = {"images": data["train_images"], "labels": data["train_labels"]}
        return Run(args, variant, 0, **sets, draws=draws, num_classes=NUM_CLASSES)

    return make


def test_the_first_steps_route_and_the_dense_end_does_not(make_run):
    run, lengths = make_run("ratio=0.75+start=1+dense_end=0.25"), []
    run.model.transformer_blocks[1].register_forward_hook(lambda block, _, output: lengths.append(output.shape[1]))
    for _ in run.train(lambda run, number: {}):
        pass
    assert lengths == [4] * 9 + [16] * 3


def test_a_step_asks_the_device_for_no_value(make_run, monkeypatch):
    class Values(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **kwargs or {})

    def draw(latents, generator):  # on the CPU, it looks at the latents
        return torch.randn(len(latents), generator=generator), torch.randn(latents.shape, generator=generator)

    monkeypatch.setattr(flow, "draw", draw)
    run = make_run("routed")
    with Values():
        for step in range(2):
            run.step(step)
        with pytest.raises(AssertionError):
            run.loss_sum.item()


def test_a_run_counts_the_flops_of_its_steps(make_run):
    run = make_run("routed+dense_end=0.25")
    routed, dense = (4 * training_flops(run.model, selection_ratio=ratio) for ratio in (None, 0.0))
    assert run.flops(12) == 9 * routed + 3 * dense and run.flops(5) == 5 * routed
    assert make_run("dense").flops(12) == 12 * dense


def test_a_longer_run_sees_the_same_data_first(make_run):
    short, long = make_run("dense").draws, make_run("dense+steps=2.5").draws
    assert len(long.order) == 30
    for name in ("order", "dropped", "routing"):
        assert torch.equal(getattr(long, name)[:12], getattr(short, name))
    assert sorted(long.order[:10].flatten().tolist()) == list(range(40))  # an epoch


def test_what_is_judged_are_always_the_averaged_weights(make_run):
    run = make_run("routed")
    run.step(0)
    run.step(1)
    weights = list(run.averaged.parameters())
    assert all(torch.equal(one, two) for one, two in zip(weights, run.ema.shadow_params, strict=True))
    assert not run.averaged.training and not torch.equal(weights[0], run.parameters[0])


def test_the_learning_rate_rises_stays_and_falls_to_zero(make_run):
    run = make_run("dense", "--steps", "20", "--warmup_steps", "4", "--decay", "0.5")
    rates = [run.schedule(step) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8 + [step / 10 for step in range(9, 0, -1)])


def test_a_loss_that_is_not_finite_stops_the_run(make_run):
    run = make_run("dense")
    nn.init.constant_(run.model.proj_out.bias, float("nan"))
    with pytest.raises(ValueError, match="Expected a finite loss, got nan in steps 0 to 3 of dense, seed 0. Lower"):
        list(run.train(lambda run, number: {}))


def test_a_warm_up_takes_steps_of_each_kind(make_run, monkeypatch):
    steps = []
    monkeypatch.setattr(Run, "step", lambda run, step: steps.append(step))
    make_run("dense").warm_up()
    make_run("routed+dense_end=0.5").warm_up()
    assert steps == [0, 0, 11]


@pytest.mark.parametrize(
    "text", ["dens", "ratio=0.5,start=1", "ratio=1", "ratio", "end=7", "dense+ratio=0.5", "dense_end=1", "steps=0"]
)
def test_an_unknown_variant_is_refused(text):
    with pytest.raises(ValueError, match="Expected"):
        Variant.parse(text, depth=8)


# ------------------------------------------------------------------------------------------------------ going on


def test_a_run_that_was_cut_goes_on_with_what_is_missing(finished, flags, tmp_path, monkeypatch):
    whole, output = losses(finished[0]), ["--output", str(tmp_path / "report.json")]
    flags = [*flags, "--guidance_scales", "1,2", *output, "--samples", str(tmp_path / "samples.png")]
    train_variant, started = convergence.train_variant, []

    def stops_in_the_second_run(args, name, seed, **others):
        started.append((name, seed))
        for number, point in enumerate(train_variant(args, name, seed, **others)):
            if len(started) == 2 and number == 3:
                raise KeyboardInterrupt
            yield point

    monkeypatch.setattr(convergence, "train_variant", stops_in_the_second_run)
    with pytest.raises(KeyboardInterrupt):
        convergence.main(flags)
    left = json.loads((tmp_path / "report.json").read_text())
    done = [(run["variant"], run["finished"], len(run["points"])) for run in left["runs"]]
    assert done == [("dense", True, 5), ("routed", False, 3)]

    report = convergence.main([*flags, "--resume", "--seeds", "0,1"])
    assert started == [("dense", 0), ("routed", 0), ("routed", 0), ("dense", 1), ("routed", 1)]
    assert losses(report) == whole
    with np.load(tmp_path / "samples.npz") as rows:
        assert rows.files == ["real", "dense", "routed"]


def test_a_report_of_other_settings_does_not_go_on(finished, flags):
    output = ["--output", str(finished[1] / "report.json"), "--resume"]
    with pytest.raises(ValueError, match="same settings, got other guidance_scales, lr. Give another --output"):
        convergence.main([*flags, *output, "--lr", "0.02"])


def test_nothing_starts_that_would_end_after_the_time_limit(flags, capsys):
    report = convergence.main([*flags, "--seeds", "0,1", "--time_limit", "0"])
    assert [(run["variant"], run["seed"]) for run in report["runs"]] == [("dense", 0)]
    assert "Left out routed, seed 0" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- comparing


def power_law_run(variant: str, *, seconds: float, seed: int = 0) -> dict:
    """A run of 10 steps whose loss is 3 / sqrt(step), each step taking so many seconds and twice as many FLOPs."""
    points = [
        {"step": at, "seconds": at * seconds, "flops": 2 * at * seconds, "heldout_loss": 3 / max(at, 0.5) ** 0.5}
        for at in range(0, 11, 2)
    ]
    return {"variant": variant, "seed": seed, "finished": True, "points": points}


def test_the_way_to_a_loss_is_that_of_the_analytic_curve():
    run = power_law_run("dense", seconds=0.7)
    for step in (2, 3, 4.5, 7.77, 10):
        assert convergence_report.reach(run, 3 / step**0.5, "seconds") == pytest.approx(0.7 * step)
        assert convergence_report.loss_at(run, "flops", 1.4 * step) == pytest.approx(3 / step**0.5)
    with pytest.raises(ValueError, match="Expected a level that the run reaches"):
        convergence_report.reach(run, 0.1, "seconds")


def test_twice_as_fast_steps_reach_equal_losses_in_half_the_time():
    runs = [power_law_run("dense", seconds=1.0, seed=seed) for seed in (0, 1, 2)]
    runs += [power_law_run("routed", seconds=0.5, seed=0), power_law_run("routed", seconds=0.4, seed=1)]
    runs.append(power_law_run("routed", seconds=9.0, seed=2) | {"finished": False})
    summary = convergence_report.summarise(runs, decay=0.2)
    assert summary["dense"]["seeds"] == [0, 1, 2] and summary["dense"]["against_dense"] is None
    against = summary["routed"]["against_dense"]
    assert summary["routed"]["seeds"] == [0, 1] and len(against["loss_levels"]) == convergence_report.NUM_LEVELS
    assert against["seconds_to_equal_loss"]["by_seed"] == [pytest.approx([2.0] * 5), pytest.approx([2.5] * 5)]
    assert against["seconds_to_equal_loss"]["median"] == pytest.approx(2.25)
    assert against["step_time_ratio"]["max"] == pytest.approx(2.5) and against["flop_ceiling"] == pytest.approx(2.0)
    assert against["final_loss_ratio"]["mean"] == pytest.approx(1.0)
    # After the FLOPs of 8 routed steps, before the learning rate falls, dense did 4 (of the second seed 3.2).
    expected = {"max": (8 / 3.2) ** 0.5, "min": 2**0.5}
    assert {name: against["equal_flops_loss_ratio"][name] for name in expected} == pytest.approx(expected)


def test_runs_that_share_no_loss_are_not_compared_by_it():
    low = power_law_run("routed", seconds=1.0)
    for point in low["points"]:
        point["heldout_loss"] /= 100
    against = convergence_report.compare([(power_law_run("dense", seconds=1.0), low)], decay=0.2)
    assert against["loss_levels"] == [] and against["seconds_to_equal_loss"]["median"] is None
    assert convergence_report.form(against["seconds_to_equal_loss"], "{:.2f}") == "-"


# ------------------------------------------------------------------------------------------------------------ judging


def test_real_images_are_nearer_to_real_ones_than_noise_is(flags):
    args = convergence.parse_args(flags)
    judge = Judge(args, data=to_device(make_images(), "cpu"), num_classes=NUM_CLASSES)
    noise = torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    features, is_right = judge.look(noise, torch.arange(8) % NUM_CLASSES)
    assert features.shape == (8, 64) and is_right.dtype == torch.bool
    assert judge.report["distance_of_real_images"] < judge.distance(features) / 3


def test_the_weights_of_the_levels_are_how_often_training_draws_them():
    times = []

    def denoiser(hidden_states, timestep):
        times.append(timestep / 1000)
        return SimpleNamespace(sample=torch.zeros_like(hidden_states))

    objective = FlowMatchingObjective(logit_mean=0.5)
    objective.loss(denoiser, torch.zeros(20000, 1, 1, 1))
    drawn = torch.histc(torch.cat(times), bins=NUM_LEVELS, min=0, max=1) / 20000
    assert level_weights(objective).sum() == pytest.approx(1.0)
    torch.testing.assert_close(level_weights(objective).float(), drawn, rtol=0, atol=0.01)


# --------------------------------------------------------------------------------------------------------------- data


def test_folders_become_a_file_without_images_that_both_sets_have(tmp_path):
    numbers = np.random.default_rng(0)
    for name in ("train/b", "train/a", "heldout/b", "heldout/a"):
        (tmp_path / name).mkdir(parents=True)
        for index, pixels in enumerate(numbers.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)):
            PIL.Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    again = tmp_path / "heldout" / "a" / "2.png"
    again.write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes())
    flags = ["--train_folder", str(tmp_path / "train"), "--heldout_folder", str(tmp_path / "heldout"), "--size", "8"]
    assert convergence.main(["--make_data", str(tmp_path / "data.npz"), *flags]) == {}

    images = Images.load(tmp_path / "data.npz")
    assert images.class_names == ("a", "b") and images.size == 8
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and images.heldout_labels.tolist() == [0, 0, 1, 1, 1]
    first = np.asarray(PIL.Image.open(tmp_path / "train" / "a" / "0.png"), dtype=float)
    averaged = first.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(images.train_images[0] - averaged).max() <= 1  # a box filter, and white nowhere

    (tmp_path / "heldout" / "b").rename(tmp_path / "heldout" / "c")
    with pytest.raises(ValueError, match="Expected the same classes"):
        read_folders(tmp_path / "train", tmp_path / "heldout", size=8)


def test_drawn_avatars_are_the_same_each_time_and_held_out_ones_are_new(monkeypatch):
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(convergence_data, "STYLES", ("thumbs", "gaze"))
    one, two = (draw_avatars(num_train=4, num_heldout=4, size=16) for _ in range(2))
    assert one.class_names == ("thumbs", "gaze") and one.train_images.shape == (4, 16, 16, 3)
    assert (one.train_images == two.train_images).all()
    images = {image.tobytes() for image in (*one.train_images, *one.heldout_images)}
    assert len(images) == 8


@pytest.mark.parametrize("wrong", ["dtype", "labels"])
def test_a_file_of_another_kind_is_refused(wrong):
    images = vars(make_images())
    images |= {"train_images": images["train_images"].astype(float)} if wrong == "dtype" else {}
    images |= {"heldout_labels": images["heldout_labels"] // 2} if wrong == "labels" else {}
    with pytest.raises(ValueError, match="Make the file with --make_data"):
        Images(**images)


@pytest.mark.parametrize(
    "wrong",
    [
        "--evaluations 13", "--samples_at 5", "--heads 3", "--decay 1", "--seeds 0,0", "--variants routed,routed",
        "--variants route", "--variants routed+steps=0.1", "--num_samples 10", "--num_samples 32", "--resume",
        "--train_folder somewhere",
    ],
)  # fmt: skip
def test_impossible_flags_are_refused(flags, wrong):
    with pytest.raises(ValueError, match="Expected"):
        convergence.main([*flags, *wrong.split()])


def test_without_data_the_remedy_is_named():
    with pytest.raises(ValueError, match="Make one with --make_data FILE"):
        convergence.main([])
