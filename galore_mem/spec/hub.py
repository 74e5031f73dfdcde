"""Models that the Hugging Face hub's client has downloaded before. Nothing is downloaded, no network is used.

Layout: `<cache>/models--<org>--<name>/refs/main` holds a revision, `snapshots/<revision>/` its files. Source:
huggingface_hub, "Understand caching", and its `constants.py` for the environment variables.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from galore_mem.errors import InputError
from galore_mem.spec.files import is_file, is_folder, list_folder, read_file, shown_path

# Environment variables that move the cache, the first that is set, and the folder below it.
_CACHE_VARIABLES = (
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?\Z", re.ASCII)
_REVISION = re.compile(r"[\w-][\w.-]{0,127}\Z", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Could this be the id of a model on the hub: `name` or `org/name`?"""
    return _REPO_ID.match(text) is not None and ".." not in text and "--" not in text


def cache_folder() -> Path:
    """The cache that the hub's client uses in this environment."""
    for variable, below in _CACHE_VARIABLES:
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable]), below)
    return Path(os.path.expanduser("~/.cache/huggingface/hub"))


def cached_folder(repo_id: str) -> Path | None:
    """The folder with the files of a model's main branch; None when it is not in the cache.

    Without a `main` branch the only snapshot is meant. Raises `InputError` for a cache that cannot be read or
    that has several snapshots to choose from.
    """
    repo = cache_folder() / ("models--" + repo_id.replace("/", "--"))
    if not is_folder(repo):
        return None
    main = repo / "refs" / "main"
    snapshots = repo / "snapshots"
    if is_file(main):
        revision = read_file(main, 4096).decode("ascii", "replace").strip()
        if not _REVISION.match(revision):
            raise InputError(f"{shown_path(main)} does not hold a revision")
        return snapshots / revision if is_folder(snapshots / revision) else None
    present = [p for p in list_folder(snapshots) if is_folder(p)] if is_folder(snapshots) else []
    if len(present) > 1:
        raise InputError(f"{shown_path(snapshots)} holds {len(present)} snapshots and no main; give the path of one")
    return present[0] if present else None
