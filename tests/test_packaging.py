"""Wheel and sdist hold what they should, and run where nothing of the checkout is in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lfm2_gpu
from support import ROOT

pytest.importorskip("setuptools", minversion="77")

# what a build needs of the checkout
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lfm2_gpu", "kernels")


def run(*command: str | Path, cwd: Path) -> str:
    # nothing inherited may lead to the checkout, or to the interpreter of Triton
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it and not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    # a copy, since a build leaves its traces beside the sources
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copy(path, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    run(sys.executable, "-c", build.format(str(folder)), cwd=source)
    [sdist] = folder.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    [root] = unpacked.iterdir()
    build = "from setuptools import build_meta; print(build_meta.build_wheel({!r}))"
    run(sys.executable, "-c", build.format(str(folder)), cwd=root)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment: the wheel, and this environment's dependencies."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    purelib = Path(run(python, "-c", code, cwd=root).strip())
    # dependencies by reference, as torch is large; this package itself only from the wheel
    (purelib / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    [wheel] = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    options = ["--no-index", "--quiet", "--no-compile", "--ignore-installed"]
    run(*pip, *options, str(wheel), cwd=root)
    return root / "bin"


def test_names_and_version(dist: Path) -> None:
    version = lfm2_gpu.__version__
    assert version == "0.1.0"
    assert {path.name for path in dist.iterdir()} == {
        f"lfm2_gpu-{version}.tar.gz",
        f"lfm2_gpu-{version}-py3-none-any.whl",
    }


def test_wheel_holds_the_packages_and_nothing_else(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "lfm2_gpu"), (ROOT / "kernels", "lfm2_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"lfm2_gpu-{lfm2_gpu.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == wanted
    assert f"{info}/licenses/LICENSE" in names
    assert {"lfm2_gpu/py.typed", "lfm2_kernels/py.typed"} <= names


def test_metadata(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    info = f"lfm2_gpu-{lfm2_gpu.__version__}.dist-info"
    lines = archive.read(f"{info}/METADATA").decode().splitlines()
    assert "Name: lfm2-gpu" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.10" in lines
    base = {
        line.split()[1]
        for line in lines
        if line.startswith("Requires-Dist") and "extra" not in line
    }
    packages = {"torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "tqdm"}
    assert {name.split("<")[0].split(">")[0].rstrip(";").lower() for name in base} == packages
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra")}
    assert extras == {"serve", "hub", "bench", "ray", "eval", "dev"}
    assert "lfm2-gpu = lfm2_gpu.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    command = installed / "lfm2-gpu"
    assert run(command, "--version", cwd=tmp_path) == f"lfm2-gpu {lfm2_gpu.__version__}\n"
    where = "import lfm2_gpu, lfm2_kernels; print(lfm2_gpu.__file__); print(lfm2_kernels.__file__)"
    for path in run(installed / "python", "-c", where, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_the_installed_model_generates(installed: Path, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--max-tokens", "8", "--temperature", "0", "--ignore-eos"]
    text = run(installed / "lfm2-gpu", "generate", "pocket", "A river is", *flags, cwd=tmp_path)
    assert len(text.strip()) > 3
    assert "pocket" in run(installed / "lfm2-gpu", "inspect", "pocket", cwd=tmp_path)
