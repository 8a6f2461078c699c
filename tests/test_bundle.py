"""What `bundle.json` may say, and how a folder is compared with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from edge_sdk import bundle as bundles
from edge_sdk.adapters import Slot
from edge_sdk.bundle import Bundle, File
from edge_sdk.errors import AssetError, SettingsError
from tests import factories

LAYERS = tuple(Slot(f"model.layers.{i}.attn.{name}", 4, 4) for i in (0, 1, 10) for name in ("q_proj", "v_proj"))
POOLER = Slot("pooler.dense", 4, 4)


def with_files(*names: str) -> Bundle:
    return msgspec.structs.replace(factories.bundle(), files={name: File("0" * 64, 1) for name in names})


def modules(slots: tuple[Slot, ...]) -> list[str]:
    return [slot.module.removeprefix("model.layers.") for slot in slots]


# Reading --------------------------------------------------------------------------------------------------------------
def test_a_description_comes_back(tmp_path: Path) -> None:
    """What is written as bundle.json is read as the same value."""
    bundle = with_files("model.onnx", "tokenizer.json")
    bundles.write(tmp_path, bundle)

    assert bundles.read(tmp_path) == bundles.seal(bundle)


def test_a_changed_description_is_found(tmp_path: Path) -> None:
    """One changed letter, a licence say, no longer fits the description's own hash."""
    bundles.write(tmp_path, with_files("tokenizer.json"))
    body = (tmp_path / "bundle.json").read_bytes()
    (tmp_path / "bundle.json").write_bytes(body.replace(b'"unknown"', b'"unknowm"'))

    with pytest.raises(AssetError, match="do not fit their own hash"):
        bundles.read(tmp_path)


def test_a_newer_description_with_new_fields_says_its_schema(tmp_path: Path) -> None:
    """A description from the future is called that, whatever else it holds."""
    (tmp_path / "bundle.json").write_bytes(b'{"schema": 99, "something": "new"}')

    with pytest.raises(SettingsError, match="schema 99"):
        bundles.read(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"{", b"\xff\xfe", b'{"schema":"1"}'])
def test_a_folder_without_a_readable_description_is_no_bundle(tmp_path: Path, content: bytes | None) -> None:
    """Missing, garbled and foreign descriptions are an AssetError that says how to make a bundle."""
    if content is not None:
        (tmp_path / "bundle.json").write_bytes(content)

    with pytest.raises(AssetError, match=r"is not a bundle .* `edge-export bundle`"):
        bundles.read(tmp_path)


def test_another_schema_is_said_to_be_one(tmp_path: Path) -> None:
    """A description of another version asks for a new export."""
    body = msgspec.json.encode(factories.bundle()).replace(f'"schema":{bundles.SCHEMA}'.encode(), b'"schema":999')
    (tmp_path / "bundle.json").write_bytes(body)

    with pytest.raises(SettingsError, match=r"schema 999 is not \d+; export the bundle again"):
        bundles.read(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a/", "bundle.json"])
def test_file_names_that_leave_the_folder_are_refused(name: str) -> None:
    """A bundle writes plain files into its own folder, and never over its description."""
    with pytest.raises(SettingsError, match="must be a plain file name"):
        with_files(name)


def test_plain_file_names_are_fine() -> None:
    """Dots inside a name are no path."""
    assert set(with_files("model.int8.onnx", "..x", "a b").files) == {"model.int8.onnx", "..x", "a b"}


# Verifying ------------------------------------------------------------------------------------------------------------
def test_a_digest_is_hash_and_size(tmp_path: Path) -> None:
    """A file is known by its sha256 and its size."""
    (tmp_path / "f").write_bytes(b"abc")

    assert bundles.digest(tmp_path / "f") == File(hashlib.sha256(b"abc").hexdigest(), 3)


@pytest.mark.parametrize("content", [None, b"ab", b"abcd", b"abd", b""])
def test_a_folder_that_differs_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing, shorter, longer or changed file is an AssetError that names it; the right one passes."""
    bundle = msgspec.structs.replace(factories.bundle(), files={"f": File(hashlib.sha256(b"abc").hexdigest(), 3)})
    (tmp_path / "f").write_bytes(b"abc")
    bundles.verify(tmp_path, bundle.files)
    (tmp_path / "f").unlink()
    if content is not None:
        (tmp_path / "f").write_bytes(content)

    with pytest.raises(AssetError, match=f"{tmp_path / 'f'} is missing or damaged"):
        bundles.verify(tmp_path, bundle.files)


# Choosing slots -------------------------------------------------------------------------------------------------------
def test_naming_nothing_picks_every_slot() -> None:
    """Without names an adapter fills all slots."""
    assert factories.bundle(slots=LAYERS).pick(()) == LAYERS


def test_slots_are_picked_by_the_end_of_their_name() -> None:
    """A name is the last part of a module path, or several last parts."""
    bundle = factories.bundle(slots=LAYERS)

    assert modules(bundle.pick(("q_proj",))) == ["0.attn.q_proj", "1.attn.q_proj", "10.attn.q_proj"]
    assert modules(bundle.pick(("attn.v_proj", "10.attn.q_proj"))) == [
        "0.attn.v_proj",
        "1.attn.v_proj",
        "10.attn.q_proj",
        "10.attn.v_proj",
    ]


@pytest.mark.parametrize("name", ["proj", "k_proj", "", "attn"])
def test_a_name_that_is_no_layer_is_refused(name: str) -> None:
    """A name must be whole parts of a path; the refusal lists the names there are."""
    with pytest.raises(SettingsError, match=f"no layer named {name!r}; it has: q_proj, v_proj"):
        factories.bundle(slots=LAYERS).pick(("q_proj", name))


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (1, ["10.attn.q_proj"]),
        (9, ["10.attn.q_proj"]),
        (10, ["1.attn.q_proj", "10.attn.q_proj"]),
        (11, ["0.attn.q_proj", "1.attn.q_proj", "10.attn.q_proj"]),
        (99, ["0.attn.q_proj", "1.attn.q_proj", "10.attn.q_proj"]),
    ],
)
def test_top_layers_are_counted_from_the_output(top: int, expected: list[str]) -> None:
    """The layers nearest the output are those with the highest numbers, as numbers and not as text."""
    assert modules(factories.bundle(slots=LAYERS).pick(("q_proj",), top_layers=top)) == expected


def test_a_slot_outside_the_layers_is_no_top_layer() -> None:
    """A module path without a number is in no layer, so asking for top layers leaves it out and does not fail."""
    bundle = factories.bundle(slots=(*LAYERS, POOLER))

    assert POOLER not in bundle.pick((), top_layers=1)
    assert bundle.pick(("dense",)) == (POOLER,)
