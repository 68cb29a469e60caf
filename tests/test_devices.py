"""The device sentence: every way in which a GPU that is there cannot be used is named."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

from lfm2_gpu import devices
from lfm2_gpu.devices import Probe, environment, nvidia_smi, problem, select_device
from lfm2_gpu.errors import InvalidRequest

H100 = Probe(
    driver="580.159.04",
    torch="2.11.0+cu130",
    cuda="13.0",
    available=True,
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    archs=("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
)
BLIND = replace(H100, available=False, capability=None, archs=())


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(BLIND, driver=None), ["no NVIDIA driver", "torch 2.11.0+cu130"]),
        (
            replace(BLIND, torch="2.13.0+cpu", cuda=None),
            ["NVIDIA H100", "driver 580.159.04", "torch 2.13.0+cpu", "2.11 to 2.13 is needed"],
        ),
        (replace(BLIND, driver="570.86.15"), ["570.86.15", "CUDA 13.0", "needs driver 580.65"]),
        (replace(BLIND, cuda="12.8", driver="515.1"), ["515.1", "CUDA 12.8", "driver 525.60"]),
        (replace(BLIND, hidden_by="CUDA_VISIBLE_DEVICES=''"), ["CUDA_VISIBLE_DEVICES='' hides"]),
        (replace(BLIND, reason="CUDA unknown error"), ["580.159.04", "CUDA unknown error"]),
        (replace(H100, capability=(7, 5)), ["sm_75", "sm_80 or newer"]),
        (
            replace(H100, capability=(12, 0), archs=("sm_80", "sm_90a")),
            ["sm_120", "sm_80, sm_90a", "driver 580.159.04", "compiled for sm_120 is needed"],
        ),
    ],
)
def test_problem_names_driver_build_and_need(found: Probe, words: list[str]) -> None:
    text = problem(found)
    assert text is not None
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("capability", "archs"),
    [
        ((9, 0), H100.archs),
        # machine code of the same major version and an older minor runs; so does older PTX
        ((8, 9), ("sm_80",)),
        ((12, 1), ("compute_90",)),
        ((9, 0), ("sm_90a",)),
    ],
)
def test_problem_none(capability: tuple[int, int], archs: tuple[str, ...]) -> None:
    assert problem(replace(H100, capability=capability, archs=archs)) is None


def test_machine_code_does_not_run_on_an_older_minor() -> None:
    text = problem(replace(H100, capability=(8, 0), archs=("sm_89",)))
    assert text is not None
    assert "sm_80" in text


def test_select_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "probe", lambda: H100)
    device, sentence = select_device("auto")
    assert device.type == "cuda"
    assert sentence == (
        "running on NVIDIA H100 80GB HBM3 (sm_90), driver 580.159.04, torch 2.11.0+cu130"
    )
    monkeypatch.setattr(devices, "probe", lambda: replace(BLIND, driver="570.86.15"))
    device, sentence = select_device("auto")
    assert device.type == "cpu"
    assert sentence.startswith("running on the CPU: NVIDIA H100 80GB HBM3 with driver 570.86.15")
    with pytest.raises(InvalidRequest, match=r"device is 'cuda', but .* needs driver 580\.65"):
        select_device("cuda")
    assert select_device("cpu") == (torch.device("cpu"), "running on the CPU, as asked")
    with pytest.raises(InvalidRequest, match="device is 'tpu', want auto, cuda or cpu"):
        select_device("tpu")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 2023\nGCC",
            "535.54.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build",
            "580.159.04",
        ),
    ],
)
def test_driver_from_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, text: str, version: str
) -> None:
    file = tmp_path / "version"  # type: ignore[operator]
    file.write_text(text)
    monkeypatch.setattr(devices, "_PROC_VERSION", file)
    assert devices.probe().driver == version


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")

    def answer(code: int, text: str) -> None:
        done = subprocess.CompletedProcess([], code, stdout=text, stderr="")
        monkeypatch.setattr(devices.subprocess, "run", lambda *a, **k: done)

    answer(0, "NVIDIA A100, 580.65.06\nNVIDIA A100, 580.65.06\n")
    one = {"name": "NVIDIA A100", "driver_version": "580.65.06"}
    assert nvidia_smi("name", "driver_version") == [one, one]
    answer(9, "NVIDIA-SMI has failed")
    assert nvidia_smi("name", "driver_version") == []
    answer(0, "No devices were found\n")
    assert nvidia_smi("name", "driver_version") == []


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TORCH_INDEX_URL", "secret")
    facts = environment()
    assert torch.__version__.startswith(facts["torch"])
    assert facts["CUDA_VISIBLE_DEVICES"] == "3"
    assert facts["device"].startswith("running on ")
    assert "secret" not in facts.values()
