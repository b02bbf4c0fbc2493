# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What pip installs, and what importing it costs."""

import ast
import re
import runpy
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import diffusers_tread


ROOT = Path(__file__).parents[1]
KINDS = (".py", ".yaml")  # of files in the examples
CORE = {"torch", "diffusers", "safetensors", "huggingface-hub", "numpy"}
# Import names of the optional packages, ours and those that diffusers picks up where it finds them.
OPTIONAL = "accelerate cleanfid datasets matplotlib peft scipy sklearn tensorboard transformers tyro".split()


# Where pip's name of a package is not the name it is imported by.
PIP_NAMES = {"sklearn": "scikit-learn", "dicebear": "dicebear-core", "dicebear_styles": "dicebear-styles"}
PIP_NAMES |= {"resvg_py": "resvg-py", "tokenizers": "transformers"}  # transformers brings tokenizers


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture
def python_with_the_wheel(wheel, tmp_path):
    """An environment with the wheel and this one's packages, but for the package itself.

    A .pth file names the folder of the packages; what .pth files in there name, such as an editable install, does not
    count then.
    """
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    where = [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, capture_output=True, text=True, check=True).stdout
    (own,) = tmp_path.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--no-compile", wheel.filename], check=True)
    (own / "packages.pth").write_text(packages)
    return python


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
    scripts = {
        f"diffusers_tread/{path.relative_to(ROOT)}" for path in (ROOT / "examples").rglob("*") if path.suffix in KINDS
    }
    assert names == source | cards | scripts | {"diffusers_tread/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def requirements(wheel):
    """(package, extra or None) of all that a wheel requires."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    for line in Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist"):
        extra = re.search(r"extra == '(\w+)'", line)
        yield re.match(r"[\w-]+", line)[0].replace("_", "-"), extra and extra[1]


def test_the_wheel_requires_the_core_packages_and_no_other(wheel):
    assert {package for package, extra in requirements(wheel) if extra is None} == CORE


def test_the_extras_bring_what_is_required_of_them_and_nothing_that_would_replace_torch(wheel):
    brought = set(requirements(wheel))
    for path in [*(ROOT / "examples").glob("*.py"), *(ROOT / "src").rglob("*.py")]:
        calls = re.findall(r"^ *require\((\".*?)\)", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for extras, *modules in (ast.literal_eval(f"({call})") for call in calls):
            for module in modules:
                package = PIP_NAMES.get(module, module)
                assert any((package, extra) in brought for extra in extras.split(",")), f"{path} requires {module}"
    # These ask for torchvision, of which pip takes the newest, and the torch of that.
    assert not {"clean-fid", "torch-fidelity", "timm", "torchvision"} & {package for package, _ in brought}


def test_an_index_takes_the_wheel(wheel):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel.filename]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert wheel.read(name).startswith(b"Metadata-Version: 2.4\n")  # which older ones take, too


def test_the_readme_of_an_index_s_page_has_links_that_lead_somewhere(tmp_path, monkeypatch):
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))
    citation = tmp_path / "CITATION.cff"
    citation.write_text("cff-version: 1.2.0\n")
    monkeypatch.delenv("DIFFUSERS_TREAD_REPOSITORY", raising=False)
    monkeypatch.setenv("GITHUB_REPOSITORY", "cat/dog")  # of whoever builds the package in a workflow
    assert hook["repository"](tmp_path) is None
    monkeypatch.setenv("DIFFUSERS_TREAD_REPOSITORY", "https://github.com/ant/bee")
    assert hook["repository"](tmp_path) == "https://github.com/ant/bee"
    citation.write_text('cff-version: 1.2.0\nrepository-code: "https://example.org/ant/"\n')
    address = hook["repository"](tmp_path)
    assert address == "https://example.org/ant"

    text = hook["with_absolute_links"]((ROOT / "README.md").read_text(encoding="utf-8"), address, "v1")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and all(re.match("[a-z]+:", link) for _, link in links)
    ours = [(picture, link.removeprefix(f"{address}/")) for picture, link in links if link.startswith(address)]
    for picture, link in ours:
        kind, revision, path = link.partition("#")[0].split("/", 2)
        assert (kind, revision) == ("raw" if picture else "blob", "v1") and (ROOT / path).exists()


def test_every_source_file_opens_with_the_licence_line():
    line = "# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0."
    folders = ("src", "tests", "examples", "benchmarks")
    files = [ROOT / "hatch_build.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert [str(path) for path in files if path.read_text(encoding="utf-8").split("\n")[0] != line] == []


@pytest.mark.slow
def test_a_stranger_trains_samples_evaluates_and_exports_with_the_wheel_alone(python_with_the_wheel):
    pytest.importorskip("cleanfid")
    command = ["bash", str(ROOT / "tests" / "wheel_journey.sh"), str(python_with_the_wheel)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("All of it works.\n")
