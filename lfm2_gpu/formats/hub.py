"""From a model's name to a local directory: a path, a cached snapshot, or a download."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lfm2_gpu.errors import InvalidRequest, MissingExtra, ModelFileError
from lfm2_gpu.formats.safetensors import INDEX_NAME, SINGLE_NAME

__all__ = ["resolve"]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "LICENSE*", "README.md"]
_LFM_LICENCE = "the LFM Open License v1.0 (no commercial use above US$10 million annual revenue)"


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    notify: Callable[[str], None] = logger.warning,
) -> Path:
    """The directory of a checkpoint, downloaded if need be.

    A path that exists wins over a hub id of the same spelling. The local cache is tried before the
    network, which a complete cached snapshot never touches.

    Args:
        path_or_id: A directory, or ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub; the cache answers for it too.
        notify: Told the weights' licence, once, when they are downloaded.

    Raises:
        InvalidRequest: ``revision`` was given with a path.
        MissingExtra: A download is needed and huggingface_hub is not installed.
        ModelFileError: There is no such path or repository, or the download failed.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise InvalidRequest(
                f"revision is {revision!r}, want none: {name} is a local path",
                param="revision",
            )
        return path
    if not _HUB_ID.fullmatch(name):
        raise ModelFileError(f"{name}: no such path, and not a hub id (owner/name)")
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    return _cached(huggingface_hub, name, revision) or _download(
        huggingface_hub, name, revision, notify
    )


def _cached(hub: ModuleType, repo_id: str, revision: str | None) -> Path | None:
    """The cached snapshot, if every file that loading needs is there."""
    try:
        found = Path(
            hub.snapshot_download(
                repo_id, revision=revision, local_files_only=True, allow_patterns=_PATTERNS
            )
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    if not (found / "config.json").exists():
        return None
    if (found / SINGLE_NAME).exists():
        return found
    try:
        shards = set(json.loads((found / INDEX_NAME).read_text())["weight_map"].values())
        complete = all((found / str(shard)).exists() for shard in shards)
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return found if complete else None


def _download(
    hub: ModuleType, repo_id: str, revision: str | None, notify: Callable[[str], None]
) -> Path:
    try:
        found = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        reason = str(error).strip().partition("\n")[0]
        raise ModelFileError(f"{repo_id}{at}: cannot be downloaded: {reason}") from error
    notify(f"{repo_id}: the weights are under {_licence(found, repo_id)}")
    return found


def _licence(found: Path, repo_id: str) -> str:
    """What the model card's front matter says of the licence."""
    try:
        card = (found / "README.md").read_text(encoding="utf-8", errors="replace")[:8192]
    except OSError:
        card = ""
    named = dict(re.findall(r"^(license|license_name):[ \t]*([\w.\-]+)[ \t]*$", card, re.MULTILINE))
    name = named.get("license_name", named.get("license"))
    if name == "lfm1.0" or (name is None and repo_id.startswith("LiquidAI/")):
        return _LFM_LICENCE
    return "a licence that its card does not name" if name is None else f"the licence {name!r}"
