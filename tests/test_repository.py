# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the repository says of itself: workflows, promises and the tests that hold them, versions."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from diffusers_tread import __version__


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_commits_whose_release_is_named(workflow):
    lines = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert lines and len(lines) == sum("uses" in step for step in steps(workflow))
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_and_no_more_unless_they_publish(workflow):
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if workflow.stem == "publish" else {})


def test_the_tests_run_on_every_python_that_the_package_names_with_the_torch_of_the_makefile():
    job = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["tests"]
    (run,) = [step for step in job["steps"] if "run" in step]
    classifiers = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    assert job["strategy"]["matrix"]["python"] == classifiers and run["run"] == ".ci/run"
    (default,) = re.findall(r"'(torch==[\d.]+)'", run["env"]["TORCH"])
    assert default in read("Makefile").split()


def test_only_a_tag_of_a_version_publishes_and_that_version_alone():
    content = yaml.safe_load(read(".github/workflows/publish.yml"))
    assert content[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 takes "on" for a truth value
    build, publish = content["jobs"]["build"], content["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["environment"] == "pypi"
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert any("twine check --strict" in command for command in commands)
    assert any("GITHUB_REF_NAME#v" in command for command in commands)


def test_each_promise_about_untrusted_files_names_tests_that_are_there():
    promises = [line for line in read("SECURITY.md").splitlines() if line.startswith("| ") and "tests/" in line]
    assert len(promises) >= 10
    for promise in promises:
        named = re.findall(r"\[`(test_\w+)`\]\((tests/[\w/]+\.py)\)", promise)
        assert named and all(f"def {test}(" in read(file) for test, file in named), promise


def test_every_kind_of_addition_is_in_the_guide_to_contributing():
    examples = {path.name for path in (ROOT / "tests" / "additions").glob("*.py")}
    guide = read("CONTRIBUTING.md")
    assert set(re.findall(r"\]\(tests/additions/(\w+\.py)\)", guide)) == examples
    lines = set(re.findall(r"`(register_\w+)", read("docs/architecture.md").split("## Layout")[0]))
    assert lines <= set(re.findall(r"`(register_\w+)`", guide))


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_forms_have_what_github_asks_for(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    assert asked and all(field["attributes"]["label"] and field["id"] for field in asked)


def test_the_changelog_s_latest_release_is_the_version():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == __version__ and f"version: {__version__}" in read("CITATION.cff")
    assert f"diffusers_tread-{__version__}-py3-none-any.whl[" in read("README.md")


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    names = [name for name in listed.stdout.splitlines() if not name.endswith(".png") and (ROOT / name).exists()]
    assert len(names) > 100
    assert [name for name in names if re.search(r"(?<![\w.~-])/(root|work)/", read(name))] == []
