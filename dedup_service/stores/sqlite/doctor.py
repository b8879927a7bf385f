"""Examines an embedded store's path by the file system alone, without creating or opening the file."""

import os
import shutil
from pathlib import Path

from dedup_service.claims import Finding, Severity

_LOW_BYTES = 100 * 1024 * 1024


def examine_sqlite(path: Path) -> list[Finding]:
    """Return the findings on the store's file, which may not exist yet."""
    findings = [
        Finding(
            "scope",
            Severity.INFO,
            "Only this host sees these claims: an instance on another host would answer CLAIMED as well.",
            "with several hosts: DEDUP_STORE_URL=redis://host:6379/0",
        )
    ]
    # The store creates its folder, so the nearest existing parent decides.
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    findings.append(_writable(path, folder))
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        findings.append(Finding("disk_space", Severity.INFO, f"The free space of {folder} could not be read: {error}"))
        return findings
    measured = f"The file system of {folder} has {free // (1024 * 1024):,} MiB left"
    if free < _LOW_BYTES:
        findings.append(
            Finding(
                "disk_space",
                Severity.WARNING,
                f"{measured}: once it is full, every claim is refused.",
                f"free some space there: df -h {folder}",
            )
        )
    else:
        findings.append(Finding("disk_space", Severity.OK, f"{measured}."))
    return findings


def _writable(path: Path, folder: Path) -> Finding:
    for place in (path, folder) if path.exists() else (folder,):
        wrong_kind = place.is_dir() if place == path else not place.is_dir()
        if wrong_kind or not os.access(place, os.W_OK):
            why = f"is not a {'file' if place == path else 'folder'}" if wrong_kind else "cannot be written"
            return Finding(
                "writable",
                Severity.CRITICAL,
                f"{place} {why}: every claim is refused.",
                "choose another path in DEDUP_STORE_URL" if wrong_kind else f"chown or chmod u+w {place}",
            )
    # SQLite keeps its log beside the file.
    return Finding("writable", Severity.OK, f"{path} and its folder can be written.")
