# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The page, started as a Space starts it, in a headless Chromium."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import make_transformer

from diffusers_tread import EDMHeunScheduler, SparseGuidance, TREADPipeline
from diffusers_tread.flops import guidance_flops
from diffusers_tread.pictures import make_grid


if importlib.util.find_spec("gradio") is None:  # not imported here, where it would cost every worker seconds
    pytest.skip("needs gradio: pip install 'diffusers-tread[app]'", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs the programs chromium and chromedriver", allow_module_level=True)

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


SCRIPT = Path(__file__).parents[2] / "examples" / "app.py"
SPARSE = "Sparse Guidance"
KINDS = {
    "none": ClassifierFreeGuidance(guidance_scale=1.0),
    "classifier-free": ClassifierFreeGuidance(guidance_scale=1.4),
    "classifier-free + Sparse Guidance": SparseGuidance(null_weak_branch=True),
    "autoguidance": SparseGuidance(strong_ratio=0.0, weak_ratio=0.0, weak_checkpoint=True),
    "autoguidance + Sparse Guidance": SparseGuidance(weak_checkpoint=True),
}
# A fresh profile that asks nobody for anything.
CHROMIUM_FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage window-size=1280,900"
).split()


@pytest.fixture
def folder(tmp_path):
    """A pipeline with an earlier checkpoint: grey, 8 x 8, three classes, two of them with names."""
    torch.manual_seed(0)
    transformer, earlier = [make_transformer(std=0.3, num_classes=3) for _ in range(2)]
    settings = {"guidance_transformer": earlier, "id2label": {0: "zero", 2: "two"}}
    TREADPipeline(transformer, FlowMatchEulerDiscreteScheduler(), **settings).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def server(folder):
    """The page's address, and what the script has printed, as a function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    environment = {**os.environ, "TREAD_PIPELINE": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment |= {"GRADIO_TEMP_DIR": str(folder / "gradio")}
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, SCRIPT], env=environment, stdout=output, stderr=output)
    try:
        url, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=10).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        yield url, log.read_text
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*CHROMIUM_FLAGS, f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


class Page:
    """What a visitor does and sees."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.buttons("Generate"))

    def wait(self, condition):
        wait = WebDriverWait(self.browser, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def find(self, xpath):
        return self.browser.find_elements(By.XPATH, xpath)

    def buttons(self, text):
        return self.find(f"//button[normalize-space()='{text}']")

    def type(self, name, text):
        (field,) = self.find(f"//input[@aria-label='{name}']")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text)

    def fill(self, values):
        for name, value in values.items():
            self.type(name, str(value))

    def choose(self, name, option):
        """An option of a drop-down list."""
        (field,) = self.find(f"//input[@aria-label='{name}']")
        field.click()
        self.wait(lambda: self.find(f"//*[@role='option'][@aria-label='{option}']"))[0].click()

    def choose_kind(self, kind):
        self.find(f"//label[normalize-space()='{kind}']")[0].click()

    def is_shown(self, name):
        return bool(self.find(f"//input[@aria-label='{name}']"))

    def generate(self):
        """Clicks, and gives both pictures as arrays and both texts."""
        before = self.sources()
        self.buttons("Generate")[0].click()
        self.wait(lambda: len(self.sources()) == 2 and not set(self.sources()) & set(before))
        self.wait(lambda: len(self.costs()) == 2)
        return [self.fetch(source) for source in self.sources()], self.costs()

    def sources(self):
        return [image.get_attribute("src") for image in self.find("//img[contains(@src, '/file=')]")]

    def costs(self):
        return [text.text for text in self.find("//p[contains(., 'GFLOPs')]") if "per image" in text.text]

    def fetch(self, source):
        program = """
            const done = arguments[1], reader = new FileReader();
            reader.onload = () => done(reader.result);
            fetch(arguments[0]).then(answer => answer.blob()).then(blob => reader.readAsDataURL(blob));
        """
        data = self.browser.execute_async_script(program, source)
        return np.array(PIL.Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))

    def refuses(self, name, text):
        """The message that a value gives; the good value is put back."""
        good = self.find(f"//input[@aria-label='{name}']")[0].get_attribute("value")
        self.type(name, text)
        self.buttons("Generate")[0].click()
        message = self.wait(self.messages)[0]
        for button in self.find("//*[@data-testid='toast-close']"):
            button.click()
        self.wait(lambda: not self.find("//*[@data-testid='toast-body']"))
        self.type(name, good)
        return message

    def messages(self):
        texts = [body.text for body in self.find("//*[@data-testid='toast-body']")]
        return [text for text in texts if "Expected" in text]


@pytest.fixture
def page(browser, server):
    return Page(browser, server[0])


def expected(folder, guider, *, label, seed, steps):
    """Two samples, as the pipeline itself makes them, and their cost in GFLOPs."""
    pipeline = TREADPipeline.from_pretrained(folder)
    pipeline.guider = guider
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    images = pipeline([label] * 2, num_inference_steps=steps, generator=generators).images
    flops = guidance_flops(pipeline.transformer, guider, num_steps=pipeline.num_timesteps).total
    return np.array(make_grid(images).convert("RGB")), flops / 1e9


@pytest.mark.slow
def test_a_visitor_samples_by_clicks_and_bad_input_gives_messages(page, server, folder):
    # Dense and Sparse Guidance side by side, with their cost.
    page.choose("Class", "2: two")
    page.fill({"Seed": 7, "Images": 2, "Steps": 3, "Scale on the left": 2, "Weak ratio": 0.6})
    images, texts = page.generate()
    left = expected(folder, ClassifierFreeGuidance(guidance_scale=2.0), label=2, seed=7, steps=3)
    right = expected(folder, SparseGuidance(weak_ratio=0.6), label=2, seed=7, steps=3)
    for image, text, (expected_image, gflops) in zip(images, texts, (left, right), strict=True):
        np.testing.assert_array_equal(image, expected_image)
        assert f"{gflops:.3g} GFLOPs" in text
        assert float(re.search(r"([\d.e+]+) ms per image", text)[1]) > 0
    assert (images[0] != images[1]).any()
    assert "100%" in texts[0] and f"{right[1] / left[1]:.0%}" in texts[1]

    # Other kinds, which show only the fields that they use.
    page.fill({"Weak ratio": 0.8})
    page.choose("Class", "1")
    for seed, (kind, guider) in enumerate(KINDS.items()):
        page.choose_kind(kind)
        fields = [name for name, is_used in (("Scale", kind != "none"), ("Weak ratio", SPARSE in kind)) if is_used]
        page.wait(lambda fields=fields: [name for name in ("Scale", "Weak ratio") if page.is_shown(name)] == fields)
        page.fill({"Seed": seed})
        images, texts = page.generate()
        expected_image, gflops = expected(folder, guider, label=1, seed=seed, steps=3)
        np.testing.assert_array_equal(images[1], expected_image, err_msg=kind)
        assert f"{gflops:.3g} GFLOPs" in texts[1], kind

    # Another sampler: 2N - 1 calls of the model instead of N.
    page.choose("Sampler", "FlowMatchHeunDiscreteScheduler")
    _, heun = page.generate()
    assert float(heun[1].split()[0]) / gflops == pytest.approx(5 / 3, rel=0.01)

    # Bad input.
    page.choose_kind(SPARSE)
    page.wait(lambda: page.is_shown("Weak ratio"))
    assert "Expected Steps: an integer from 1 to 250, got 0." in page.refuses("Steps", "0")
    assert "Expected Images: an integer from 1 to 16, got 2.5." in page.refuses("Images", "2.5")
    assert "Expected a value in every field, got none in Seed." in page.refuses("Seed", "")
    assert "Expected a scale >= 1" in page.refuses("Scale on the left", "0.5")
    assert "Expected weak_ratio > strong_ratio" in page.refuses("Weak ratio", "0.1")
    assert "Traceback" not in server[1]()

    # All that the browser asked for.
    events = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    asked = {url for url in urls if url.startswith(("http", "ws"))}
    assert asked and {url for url in asked if not url.startswith(server[0])} == set()


@pytest.fixture
def app():
    return importlib.import_module("app")


@pytest.mark.parametrize(
    ("objective", "own", "others"),
    [
        ("edm", EDMHeunScheduler(), ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]),
        ("flow", FlowMatchEulerDiscreteScheduler(), ["FlowMatchHeunDiscreteScheduler", "FlowSDEScheduler"]),
        ("epsilon", DDIMScheduler(), ["DPMSolverMultistepScheduler"]),
    ],
)
def test_every_sampler_that_is_offered_works(app, objective, own, others):
    pipeline = TREADPipeline(make_transformer(objective=objective, in_channels=3), own)
    offered = app.offered_samplers(pipeline)
    assert offered == [type(own).__name__, *others]
    for sampler in offered:
        numbers = {"seed": 1, "num_images": 2, "steps": 3, "cfg_scale": 1.5}
        guidance = {"kind": SPARSE, "scale": 1.4, "strong_ratio": 0.2, "weak_ratio": 0.8}
        left, left_cost, right, right_cost = app.compare(pipeline, label=1, sampler=sampler, **numbers, **guidance)
        assert left.size == right.size == (2 * 66, 66) and left_cost != right_cost
    assert pipeline.scheduler is own


def test_without_a_pipeline_there_is_one_clear_error(app, tmp_path, monkeypatch):
    monkeypatch.delenv("TREAD_PIPELINE", raising=False)
    with pytest.raises(ValueError, match="as argument or in TREAD_PIPELINE, got neither"):
        app.main([])
    with pytest.raises(ValueError, match="Expected a TREADPipeline, got"):
        app.main([str(tmp_path)])
