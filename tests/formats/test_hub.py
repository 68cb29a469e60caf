"""Names to directories: paths, the cache before the network, and the licence named once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lfm2_gpu.errors import InvalidRequest, MissingExtra, ModelFileError
from lfm2_gpu.formats.hub import resolve


class FakeHub:
    """Stands for huggingface_hub: a cache, a network, and a record of what was asked."""

    def __init__(self, cached: Path | None = None, remote: Path | Exception | None = None) -> None:
        self.cached, self.remote = cached, remote
        self.calls: list[tuple[str, str | None, bool]] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_patterns: list[str],
    ) -> str:
        assert "*.bin" not in allow_patterns
        self.calls.append((repo_id, revision, local_files_only))
        found = self.cached if local_files_only else self.remote
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise NotCached("not cached")
        return str(found)


class NotCached(FileNotFoundError):
    pass


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], FakeHub]:
    def put(hub: FakeHub) -> FakeHub:
        module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
        errors.LocalEntryNotFoundError = NotCached  # type: ignore[attr-defined]
        module.snapshot_download = hub.snapshot_download  # type: ignore[attr-defined]
        module.errors = errors  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
        return hub

    return put


def snapshot(path: Path, *names: str, index: list[str] | None = None) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    if index is not None:
        weight_map = {str(i): shard for i, shard in enumerate(index)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(InvalidRequest, match="revision is 'main', want none"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["no/such/path", "nothing", "../x/y", "a b/c", "https://x/y"])
def test_neither_path_nor_id(name: str) -> None:
    with pytest.raises(ModelFileError, match="no such path, and not a hub id"):
        resolve(name)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lfm2-gpu\[hub\]'"):
        resolve("LiquidAI/LFM2-350M")


def test_a_complete_snapshot_needs_no_network(tmp_path: Path, install: Any) -> None:
    cached = snapshot(tmp_path / "c", "config.json", "model.safetensors")
    hub = install(FakeHub(cached))
    told: list[str] = []
    assert resolve("LiquidAI/LFM2-350M", revision="abc", notify=told.append) == cached
    assert hub.calls == [("LiquidAI/LFM2-350M", "abc", True)]
    assert told == []


def test_a_complete_sharded_snapshot_needs_no_network(tmp_path: Path, install: Any) -> None:
    cached = snapshot(
        tmp_path / "c", "config.json", "a.safetensors", index=["a.safetensors", "a.safetensors"]
    )
    install(FakeHub(cached))
    assert resolve("LiquidAI/LFM2-350M", notify=pytest.fail) == cached


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (("config.json",), None),
        (("model.safetensors",), None),
        (("config.json", "a.safetensors"), ["a.safetensors", "b.safetensors"]),
    ],
)
def test_an_incomplete_snapshot_is_downloaded(
    tmp_path: Path, install: Any, names: tuple[str, ...], index: list[str] | None
) -> None:
    cached = snapshot(tmp_path / "c", *names, index=index)
    remote = snapshot(tmp_path / "r", "config.json", "model.safetensors")
    hub = install(FakeHub(cached, remote))
    assert resolve("LiquidAI/LFM2-350M", notify=lambda _: None) == remote
    assert [local for _, _, local in hub.calls] == [True, False]


@pytest.mark.parametrize(
    ("repo", "card", "named"),
    [
        ("LiquidAI/LFM2-350M", None, "LFM Open License v1.0"),
        ("LiquidAI/LFM2-350M", "license: other\nlicense_name: lfm1.0\n", "LFM Open License v1.0"),
        ("me/finetune", "license: other\nlicense_name: lfm1.0\n", "LFM Open License v1.0"),
        ("me/finetune", "license: apache-2.0\n", "'apache-2.0'"),
        ("me/finetune", "# hello\n", "does not name"),
    ],
)
def test_the_licence_is_named_once(
    tmp_path: Path, install: Any, repo: str, card: str | None, named: str
) -> None:
    remote = snapshot(tmp_path / "r", "config.json", "model.safetensors")
    if card is not None:
        (remote / "README.md").write_text(f"---\n{card}---\n")
    install(FakeHub(None, remote))
    told: list[str] = []
    resolve(repo, notify=told.append)
    assert len(told) == 1
    assert repo in told[0]
    assert named in told[0]


def test_a_failed_download_names_the_model(install: Any) -> None:
    install(FakeHub(None, ConnectionError("no route\nto host")))
    with pytest.raises(
        ModelFileError, match=r"LiquidAI/LFM2 at revision v2: cannot be downloaded: no route$"
    ):
        resolve("LiquidAI/LFM2", revision="v2")
