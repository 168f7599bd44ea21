"""The set-up files agree with each other and name nothing of one machine."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import clseg

PROJECT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def canonical(requirement: str) -> str:
    """The distribution's name as the lock writes it: `PyYAML>=6` is `pyyaml`."""
    return re.sub(r"[-_.]+", "-", NAME.match(requirement.strip()).group()).lower()


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(read("pyproject.toml"))


@pytest.fixture(scope="module")
def lock():
    """The lock's entries: one text each, hashes included."""
    return re.split(r"\n(?=[a-z0-9])", re.sub(r"(?m)^ *#.*\n", "", read("requirements.lock")))


def test_every_dependency_is_locked(project, lock):
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"test", "cluster", "n4", "monai", "benchmarks", "site", "browser"}
    locked = [requirements for name, requirements in extras.items() if name != "benchmarks"]
    wanted += [requirement for extra in locked for requirement in extra]
    assert {canonical(requirement) for requirement in wanted} <= {canonical(entry) for entry in lock}


def test_the_lock_pins_torch_and_hashes_everything(lock):
    assert len(lock) > 100
    pins = {entry.split(" ")[0] for entry in lock}
    assert {"torch==2.15.0", "torchvision==0.29.2"} <= pins
    unhashed = [
        entry
        for entry in lock
        if not re.fullmatch(r"[\w.-]+==\S+( ;[^\\]+)?( \\\s+--hash=sha256:[0-9a-f]{64})+\s*", entry)
    ]
    assert unhashed == []


def test_the_lock_serves_linux_and_macos(lock):
    markers = "".join(entry.partition("\\")[0] for entry in lock)
    assert "sys_platform == 'linux'" in markers
    assert "sys_platform == 'darwin'" in markers


def test_the_lock_and_its_recipe_agree():
    recipe = read("Makefile")
    assert "TORCH := torch==2.15.0" in recipe
    assert "TORCHVISION := torchvision==0.29.2" in recipe
    assert "#    make lock\n" in read("requirements.lock")


def test_conda_installs_the_locked_set(project):
    environment = yaml.safe_load(read("environment.yml"))
    python, pip, packages = environment["dependencies"]
    assert environment["name"] == project["project"]["name"]
    assert python.startswith("python" + project["project"]["requires-python"])
    assert pip == "pip"
    assert packages == {"pip": ["-r requirements.lock"]}


def test_one_version_everywhere(project):
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == project["project"]["version"] == clseg.__version__
    assert citation["license"] == project["project"]["license"] == "MIT"
    assert read("LICENSE").startswith("MIT License\n\nCopyright (c) 2026 the clseg authors\n")


def test_the_three_papers_are_cited():
    references = yaml.safe_load(read("CITATION.cff"))["references"]
    ids = [reference["identifiers"][0]["value"] for reference in references]
    assert ids == ["arXiv:2006.10511", "arXiv:2106.09157", "arXiv:2211.08557"]


def test_tests_run_on_one_thread_in_an_empty_folder():
    assert torch.get_num_threads() == 1
    assert Path(os.environ["CLSEG_OUT"]).name.startswith("clseg-test-")


def committed() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]


def test_no_committed_file_names_a_machine_or_a_registry():
    foreign = re.compile(
        r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|private|mnt|opt|srv|var/tmp)/\w"
        r"|[A-Za-z]:\\Users|pypi\.(?:org|python)|pythonhoste[d]|download\.pytorch|anaconda\.(?:org|com)|npmj[s]",
    )
    found = []
    for name in committed():
        text = (PROJECT / name).read_bytes().decode("utf-8", errors="replace")
        found += [f"{name}: {match.group()}" for match in foreign.finditer(text)]
    assert found == []


def test_what_is_made_is_not_committed_but_results_are():
    names = [".venv/x", "out/x", "data/x", "build/x", "clseg/__pycache__/x", "paper_figures/x", "clseg/data/x"]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=PROJECT, capture_output=True, text=True, check=False)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout.splitlines() == names[:-2]
