"""What setup.cfg, constraints.txt and the Makefile promise to somebody who installs the project."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.guides import blocks

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def _setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def _requirements(*names: str) -> list[Requirement]:
    parser = _setup_cfg()
    sections = [parser["options"]["install_requires"], *(parser["options.extras_require"][name] for name in names)]
    return [Requirement(line) for text in sections for line in text.splitlines() if line]


def _pins(python: str) -> dict[str, str]:
    """Version of every package that constraints.txt allows for a Python; one exact pin each."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, str] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({key: str(value) for key, value in environment.items()}):
            name = canonicalize_name(pin.name)
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and name not in pins, line
            pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_to_a_version_it_allows(python: str) -> None:
    pins = _pins(python)
    for requirement in _requirements(
        "train", "lora", "gpu", "ray", "decord", "s3", "gs", "http", "terminal", "pdf", "dev"
    ):
        environment = {"python_version": python}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_exactly_the_pinned_pythons_may_install() -> None:
    allowed = SpecifierSet(_setup_cfg()["options"]["python_requires"])
    assert [python for python in ("3.9", *PYTHONS, "3.14") if allowed.contains(python)] == list(PYTHONS)


def test_base_installation_has_no_torch() -> None:
    names = {requirement.name for requirement in _requirements()}
    assert not names & {"torch", "transformers", "deepspeed", "accelerate"}
    assert "msgspec" in names


def test_torch_is_pinned_to_one_version() -> None:
    torch = [requirement for requirement in _requirements("train", "dev") if requirement.name == "torch"]
    assert [str(requirement.specifier) for requirement in torch] == [f"=={_pins('3.11')['torch']}"]


def _make(*arguments: str) -> str:
    """The last command that make would run, the environment being complete; no variable of the caller leaks in."""
    make = shutil.which("make")
    assert make is not None
    result = subprocess.run(
        [make, "--dry-run", "--no-print-directory", "--old-file=.venv/.complete", *arguments],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()[-1].rstrip()


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["DATASET=mp_doc%50"], '"mp_doc%50" --out "shards/mp_doc-50"'),
        (["DATASET=demo"], '"demo" --out "shards/demo" --model "checkpoints/tiny"'),
        (["DATASET=demo%50"], '"demo%50" --out "shards/demo-50" --model "checkpoints/tiny"'),
        (["DATASET=demo", "MODEL=other"], '"demo" --out "shards/demo" --model "other"'),
        (["DATASET=mp_doc,demo%50"], '"mp_doc,demo%50" --out "shards/mp_doc+demo-50" --model "checkpoints/tiny"'),
        (["DATASET=demonstrations"], '"demonstrations" --out "shards/demonstrations"'),
        (
            ["DATASET=a%80,b%50,c", "OUT=x/y", "MAX_LENGTH=2048", "WORKERS=3", "SEED=7", "ARGS=--pixels raw"],
            '"a%80,b%50,c" --out "x/y" --max-length 2048 --workers 3 --seed 7 --pixels raw',
        ),
        (["DATASET=a%80,b"], '"a%80,b" --out "shards/a-80+b"'),
    ],
)
def test_make_shards_passes_on_its_arguments(arguments: list[str], command: str) -> None:
    words = " ".join(_make("shards", *arguments).split())
    assert words == f".venv/bin/vlprep build {command}"


def test_make_shards_without_a_dataset_says_what_to_write() -> None:
    make = shutil.which("make")
    assert make is not None
    result = subprocess.run(
        [make, "--old-file=.venv/.complete", "shards"],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "make shards DATASET=demo" in result.stderr


def test_the_installation_succeeds_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    environment = {**os.environ, "CC": "/bin/false"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'building extension "prep.media._bicubic" failed' in result.stderr + result.stdout
    assert not list(tmp_path.rglob("*.so"))


def _instructions(name: str) -> list[str]:
    """Arguments of every instruction of a kind in the Dockerfile, each on one line."""
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / "Dockerfile").read_text())
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def test_the_dockerfile_copies_files_that_exist_and_that_are_not_ignored() -> None:
    sources = [source for line in _instructions("COPY") for source in line.split()[:-1]]
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert not {*sources} & {*(REPOSITORY / ".dockerignore").read_text().split()}
    packages = _setup_cfg()["options.packages.find"]["include"].replace("*", "").split()
    assert {"setup.cfg", "setup.py", "pyproject.toml", "constraints.txt", *packages} <= {*sources}


def test_the_dockerfile_installs_extras_and_packages_that_exist() -> None:
    text = "\n".join(_instructions("RUN"))
    python = set(re.findall(r"python(3\.\d+)", text))
    assert python == {"3.12"} and python < {*PYTHONS}
    installs = re.findall(r"pip install -c constraints.txt (?:-e '\.\[(.*?)\]'|(\S+))", text)
    assert len(installs) == text.count("pip install") == 2
    extras = {extra for names, _ in installs for extra in names.split(",") if extra}
    assert "train" in extras and extras <= {*_setup_cfg()["options.extras_require"]}
    assert {canonicalize_name(package) for _, package in installs if package} <= {*_pins("3.12")}


def test_the_page_about_clusters_names_one_image() -> None:
    (compose,) = blocks("cluster.md", "Containers", "yaml")
    service = yaml.safe_load(compose)["services"]["train"]
    commands = "".join(blocks("cluster.md", "Containers", "bash"))
    assert f"docker build -t {service['image']} ." in commands
    assert f"docker-daemon://{service['image']}" in commands
    assert f"docker build -t {service['image']} ." in (REPOSITORY / "Dockerfile").read_text()
    assert service["command"] in commands and "train/main.py" in service["command"].split()
    (manifest,) = blocks("cluster.md", "Training", "yaml")
    assert f"image: {service['image']}\n" in manifest
