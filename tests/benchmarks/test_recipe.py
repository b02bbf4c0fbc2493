# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Variants differ by what their names say, one that fails leaves the others alone, and so does a process that ends."""

import json
import threading
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
import recipe
import recipe_workers
import torch
from convergence_data import Images
from convergence_train import to_device, to_floats
from recipe_report import end_steps, summarise
from recipe_train import FEATURES, Recipe, RecipeRun, Teacher, contrast, train_teacher
from recipe_workers import Shared, Task, Workers

from diffusers_tread.runs.optimizers import MuonWithAdamW


DEPTH, STEPS = 8, 4
SMOKE = f"""
    --threads 1 --width 16 --depth {DEPTH} --heads 2 --steps {STEPS} --batch_size 2 --lrs 0.01 --muon_lrs 0.02
    --sweep_steps 1 --projector_dim 8 --teacher_steps 2 --teacher_batch_size 4 --evaluations 2 --samples_at 1
    --guidance_scales 1,2 --heldout_per_level 1 --num_samples 4 --sampling_steps 1 --eval_batch_size 20
    --judge_steps 2 --repeats 2 --warmup 0 --steps_per_turn 1
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Noise in two classes."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 2
    sets = {"train_images": pixels, "train_labels": labels, "heldout_images": pixels, "heldout_labels": labels}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    Images(**sets, class_names=("one", "two")).save(path)
    return path


@pytest.fixture
def args(data_file):
    return recipe.parse_args(["--data", str(data_file), *SMOKE.split()])


@pytest.fixture
def shared(data_file):
    data = to_device(Images.load(data_file), "cpu")
    judge = SimpleNamespace(num_classes=2)
    evaluate = SimpleNamespace(judge=judge)
    return Shared(
        images=data["train_images"], labels=data["train_labels"], evaluate=evaluate, teacher=Teacher().eval()
    )


@pytest.fixture
def make_run(args, shared):
    def make(name: str) -> RecipeRun:
        return Task(args=args, recipe=Recipe.parse(name, depth=DEPTH), seed=0).run(shared)

    return make


def test_a_variant_that_fails_is_told_after_the_others(data_file, tmp_path, monkeypatch, capsys):
    """It is the only one without a row; the others have one, in both tables."""
    make_terms = RecipeRun.make_terms

    def fail(run):
        if run.variant.name == "dense+align":
            raise RuntimeError("no teacher today")
        return make_terms(run)

    monkeypatch.setattr(RecipeRun, "make_terms", fail)
    names = ["dense", "tread+modern+align+muon"]
    flags = ["--variants", ",".join(names), "--alone", "dense+align", "--seeds", "3", "--plot"]
    output = tmp_path / "report.json"
    with pytest.raises(SystemExit, match="1"):
        recipe.main(
            ["--data", str(data_file), *SMOKE.split(), *flags, str(tmp_path / "p.png"), "--output", str(output)]
        )
    report = json.loads(output.read_text())
    assert report["failures"] == [{"what": "prepare dense+align", "error": "RuntimeError: no teacher today"}]
    assert [(run["seed"], run["variant"], run["finished"]) for run in report["runs"]] == [
        (3, name, True) for name in names
    ]
    for run in report["runs"]:
        steps, end = [point["step"] for point in run["points"]], end_steps(report, run["variant"])["equal_time"]
        assert steps == sorted({0, 2, STEPS, end})
        judged = {point["step"]: sorted(point["samples"]) for point in run["points"] if "samples" in point}
        assert judged == {end: ["1"]} | {STEPS: ["1", "2"]}
    assert report["settings"]["muon_lr"] == 0.02 and [row["flag"] for row in report["sweep"]] == ["lr", "muon_lr"]
    assert list(report["summary"]) == list(report["steps"]) == names and (tmp_path / "p.png").exists()

    told = capsys.readouterr().out
    lines = [line.split(" | ")[0][2:] for line in told.splitlines() if line.startswith("| ")]
    assert lines == ["variant", "---", *names, "variant", "---", *names]
    assert "Failed: prepare dense+align." in told and summarise(report) == report["summary"]


def test_twice_as_fast_steps_end_at_equal_time_after_twice_as_many():
    seconds = {"dense": (1.0, 0.8), "fast": (0.5, 0.1), "slow": (4.0, None)}
    steps = {name: {"seconds": {"median": one}, "kernel_seconds": two} for name, (one, two) in seconds.items()}
    report = {"steps": steps, "settings": {"steps": 12}}
    ends = {name: tuple(end_steps(report, name).values()) for name in steps}
    assert ends == {"dense": (12, 12), "fast": (24, 96), "slow": (3,)}
    assert end_steps(report | {"steps": {"fast": steps["fast"]}}, "fast") == {}
    args = SimpleNamespace(steps=12, evaluations=3)
    recipes = [Recipe(name="tread", route=None, pieces=(), ends=one) for one in [(), *ends.values()]]
    assert [one.stops(args) for one in recipes] == [[4, 8, 12], [4, 8, 12], [4, 8, 12, 24, 96], [3, 4, 8, 12]]
    assert [one.num_steps(12) for one in recipes] == [12, 12, 96, 12]


@pytest.mark.parametrize(("name", "num_tokens"), [("dense+align", 16), ("tread+align", 8), ("sprint+align", 4)])
def test_the_teacher_is_compared_with_the_tokens_that_are_kept(make_run, name, num_tokens):
    run, shapes = make_run(name), []
    (term,) = run.terms
    (block,) = term.projectors
    term.projectors[block].register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    weights = [one.clone() for one in run.trained]
    run.step(0)
    assert shapes == [(2, num_tokens, FEATURES)]
    assert not all(torch.equal(one, two) for one, two in zip(weights[-6:], run.trained[-6:], strict=True))
    assert len(list(run.averaged.parameters())) == len(weights) - 6  # without the projector


def test_a_delayed_route_is_aligned_where_it_begins(make_run):
    run = make_run("tread+align+delayed+modern+muon")
    (route,) = run.model.token_router.routes
    assert (route.start, route.end, route.rejoin_from) == (4, 4, 2) and list(run.terms[0].projectors) == [4]
    assert run.model.config.ffn == "swiglu" and run.model.config.value_residual
    assert isinstance(run.optimizer, MuonWithAdamW) and set(run.rates) == {0.01, 0.02}


def test_a_teacher_learns_to_find_the_other_crop(args):
    numbers, losses = torch.Generator().manual_seed(0), []
    images = 255 * torch.randint(2, (64, 3, 2, 2), generator=numbers, dtype=torch.uint8)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    args.teacher_batch_size = 16
    for args.teacher_steps in (1, 12):
        teacher, _ = train_teacher(args, images)
        crops = torch.Generator().manual_seed(1)
        losses.append(sum(contrast(args, teacher, images, crops)[0].item() for _ in range(4)) / 4)
    assert losses[1] < losses[0] - 0.2
    features = teacher(to_floats(images), (4, 4))
    assert features.shape == (64, 16, FEATURES) and features.mean(dim=(0, 1)).abs().max() < 1e-4


def test_a_process_that_ends_fails_its_task_and_the_other_takes_the_rest(args, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_workers, "execute", lambda task, shared: iter([{"point": {}}, {"finished": True}]))
    monkeypatch.setattr(recipe_workers, "set_up", lambda args: None)

    def end_at_the_first_task(connection):
        connection.recv()
        connection.recv()
        connection.close()

    workers = Workers(0)
    for target in (recipe_workers.work, end_at_the_first_task):
        ours, theirs = Pipe()
        thread = threading.Thread(target=target, args=(theirs,), daemon=True)
        thread.exitcode = -9
        thread.start()
        workers.processes[ours] = thread
    workers.share(args, SimpleNamespace(), tmp_path / "shared.pt")
    told = list(workers.run([SimpleNamespace(number=n) for n in range(4)], lambda task: task.number < 3))
    workers.close()
    ends = {task.number: message for task, message in told if "point" not in message}
    assert ends == {0: {"finished": True}, 1: {"error": "The process ended with -9."}, 2: {"finished": True}}


@pytest.mark.parametrize("text", ["routed", "dense+", "tread+modern+modern", "dense+delayed", "sprint+delayed"])
def test_an_unknown_variant_is_refused(text):
    with pytest.raises(ValueError, match="Expected"):
        Recipe.parse(text, depth=8)


@pytest.mark.parametrize(
    "wrong", ["--variants tread", "--alone tread", "--seeds 1000", "--samples_at 3", "--repeats 1"]
)
def test_impossible_flags_are_refused(data_file, wrong):
    with pytest.raises(ValueError, match="Expected"):
        recipe.main(["--data", str(data_file), *SMOKE.split(), *wrong.split()])
