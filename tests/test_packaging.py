# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What pip installs, and what importing it costs."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import diffusers_tread


ROOT = Path(__file__).parents[1]
CORE = {"torch", "diffusers", "safetensors", "huggingface-hub", "numpy"}
# Import names of the optional packages, ours and those that diffusers picks up where it finds them.
OPTIONAL = "accelerate cleanfid datasets matplotlib peft scipy sklearn tensorboard transformers tyro".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def import_without(packages, program):
    """Runs a program in a new interpreter that takes the packages for absent, as do diffusers' own checks."""
    program = f"import sys; sys.modules.update(dict.fromkeys({packages})); import diffusers_tread; {program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_public_api_imports_without_any_optional_package():
    result = import_without(OPTIONAL, "[getattr(diffusers_tread, name) for name in diffusers_tread.__all__]")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_no_package_that_only_the_examples_need():
    # Without those that diffusers itself imports where it finds them: transformers brings scikit-learn along.
    result = import_without(["accelerate", "peft", "transformers"], "print(*sys.modules)")
    assert "diffusers_tread" in result.stdout.split(), result.stderr
    assert not {"cleanfid", "datasets", "matplotlib", "sklearn", "tensorboard", "tyro"} & set(result.stdout.split())


def test_the_pipeline_and_what_it_imports_of_diffusers_are_loaded_with_its_first_use():
    late = "diffusers_tread.pipelines", "diffusers.pipelines.pipeline_utils", "diffusers.models.autoencoders", "scipy"
    # Without transformers and peft, which import scipy where they find it.
    loads = f"print([name for name in {late[:-1]} if name in sys.modules])"
    result = import_without(
        ["accelerate", "peft", "transformers"],
        f"print([name for name in {late} if name in sys.modules]); diffusers_tread.TREADPipeline; {loads}",
    )
    assert result.stdout.splitlines() == ["[]", str(list(late[:-1]))], result.stderr


def test_the_names_of_the_package_exist_once_and_the_pipeline_is_one_like_the_others():
    namespace, names = {}, diffusers_tread.__all__
    exec("from diffusers_tread import *", namespace)  # fails where a name does not exist
    assert namespace["TREADPipeline"] is diffusers_tread.TREADPipeline
    assert len(names) == len(set(names)) and set(names) <= set(dir(diffusers_tread))
    with pytest.raises(AttributeError, match="TREADPipelines"):
        diffusers_tread.TREADPipelines  # noqa: B018


def test_the_citation_has_the_version_that_is_installed_and_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert diffusers_tread.__version__ == metadata.version("diffusers-tread") == citation["version"]
    papers = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert papers == {"arXiv:2501.04765", "arXiv:2601.01608"}


def test_the_wheel_holds_the_source_tree_its_type_marker_and_the_licence(wheel):
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    cards = {"diffusers_tread/hub/model_card.md", "diffusers_tread/hub/text_model_card.md"}
    assert names == source | cards | {"diffusers_tread/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_requires_the_core_packages_and_no_other(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist")
    requirements = [line for line in lines if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in requirements} == CORE


def test_every_source_file_opens_with_the_licence_line():
    line = "# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0."
    folders = ("src", "tests", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in files if path.read_text(encoding="utf-8").split("\n")[0] != line] == []
