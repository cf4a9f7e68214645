"""What a checkpoint says beside its tensors, proven by hashes: of each file, and of what it says itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightwork.checkpoint.folder import MANIFEST

FORMAT = 4

#: Entries of the manifest: the hashes of the other files by name, and that of all that stands before it.
HASHES, OWN_HASH = "sha256_of_files", "sha256"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write it, with its own hash. Raises: OSError."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**manifest, OWN_HASH: hash_of(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def hash_of(manifest: Mapping[str, Any]) -> str:
    """Return the hash of what a manifest says, without its own."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
