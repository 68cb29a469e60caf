"""The set-up script: its pins fit the metadata and the README, its stamp sees what matters."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import ROOT


@pytest.fixture
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_pins_are_in_the_ranges_of_the_metadata(setup_env: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    pins = {
        "torch": (setup_env.TORCH_WITH_DRIVER, setup_env.TORCH_WITHOUT_DRIVER),
        "triton": (setup_env.TRITON,),
    }
    for package, versions in pins.items():
        low, high = re.findall(rf'"{package}>=([\d.]+),<([\d.]+)', text)[0]
        for version in versions:
            assert numbers(low) <= numbers(version) < numbers(high)
            assert version in readme


def test_stamp_sees_torch_its_index_and_the_files(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text("a")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    keys = [setup_env.stamp_key("2.11.0", ""), setup_env.stamp_key("2.13.0", "")]
    keys.append(setup_env.stamp_key("2.13.0", "URL"))
    (tmp_path / "pyproject.toml").write_text("b")
    keys.append(setup_env.stamp_key("2.13.0", "URL"))
    assert len(set(keys)) == 4
    assert setup_env.stamp_key("2.13.0", "URL") == keys[-1]


def test_a_stamp_that_fits_ends_the_set_up(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    stamp = tmp_path / "stamp"
    monkeypatch.setattr(setup_env, "STAMP", stamp)
    monkeypatch.setattr(setup_env, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(setup_env, "has_nvidia_driver", lambda: True)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    stamp.write_text(setup_env.stamp_key(setup_env.TORCH_WITH_DRIVER, ""))
    setup_env.main()
    assert capsys.readouterr().out == ""
    # a driver that has gone needs another torch
    monkeypatch.setattr(setup_env, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(setup_env, "make_venv", lambda: sys.exit("would set up"))
    with pytest.raises(SystemExit, match="would set up"):
        setup_env.main()
    assert "driver is absent: torch 2.13.0" in capsys.readouterr().out


def test_an_interpreter_that_does_not_start(setup_env: ModuleType, tmp_path: Path) -> None:
    assert setup_env.runs(Path(sys.executable))
    assert not setup_env.runs(tmp_path / "python")


def test_pip_failure_shows_pips_own_words(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_env, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(setup_env, "LOG", tmp_path / "setup.log")
    with pytest.raises(SystemExit, match=r"(?s)not-a-requirement.*failed with exit code"):
        setup_env.pip("something", "--no-index", "not-a-requirement-of-anything==0")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_finds_the_checkout_from_any_folder(tmp_path: Path) -> None:
    # a make around this one would add its own lines
    quiet = "--no-print-directory"
    command = ["make", quiet, "-f", str(ROOT / "Makefile"), "--dry-run", "test"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'"{ROOT}/tools/setup_env.py"' in done.stdout
    assert f'cd "{ROOT}" &&' in done.stdout
    # what closes the output is pytest's summary
    assert "-m pytest" in done.stdout.splitlines()[-1]
