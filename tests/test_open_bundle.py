"""A bundle and the base install are enough to classify; what is missing or damaged is named."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import msgspec
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import open_bundle
from edge_sdk.bundle import Variant
from edge_sdk.cli import main
from edge_sdk.errors import AssetError, SettingsError
from tests.test_architecture import ROOT, python


def test_a_folder_is_all_it_takes(decoder_bundle: Path) -> None:
    """`open_bundle` answers the bundle's own task."""
    engine = open_bundle(decoder_bundle)

    assert engine.encoder.labels == ("negative", "positive")
    assert engine.score(["a lovely film"]).shape == (1, 2)


def test_predicting_from_the_command_line(encoder_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`edge-agent predict --bundle` labels each text, for people and for scripts, without a device or a server."""
    assert main(["predict", "--bundle", str(encoder_bundle), "a film", "grim"]) == 0
    assert re.fullmatch(r"((nega|posi)tive \(0\.\d\d\): (a film|grim)\n){2}", capsys.readouterr().out)
    assert main(["predict", "--bundle", str(encoder_bundle), "--json", "a film"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == "a film"
    assert sum(said["probabilities"].values()) == pytest.approx(1)


def test_a_home_or_a_bundle_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither or both is a wrong command line."""
    for arguments in (["predict", "a"], ["predict", "--home", "h", "--bundle", "b", "a"]):
        with pytest.raises(SystemExit):
            main(arguments)


def test_one_flipped_bit_is_refused(decoder_bundle: Path, tmp_path: Path) -> None:
    """A damaged model is found before it answers anything."""
    copy = Path(shutil.copytree(decoder_bundle, tmp_path / "copy"))
    body = bytearray((copy / "model.fp32.onnx").read_bytes())
    body[len(body) // 2] ^= 1
    (copy / "model.fp32.onnx").write_bytes(body)
    with pytest.raises(AssetError, match="missing or damaged"):
        open_bundle(copy)


def test_files_a_device_does_not_run_may_be_missing(decoder_bundle: Path, tmp_path: Path) -> None:
    """A device that fetched one variant has a working bundle."""
    for name in ("bundle.json", *bundles.read(decoder_bundle).needs()):
        shutil.copyfile(decoder_bundle / name, tmp_path / name)

    assert open_bundle(tmp_path).score(["a film"]).shape == (1, 2)


def test_a_variant_that_is_not_there_is_named(decoder_bundle: Path) -> None:
    """The refusal lists what the bundle has."""
    with pytest.raises(SettingsError, match="no variant 'q8_0'; it has: fp32"):
        open_bundle(decoder_bundle, variant="q8_0")


def test_a_variant_without_its_file_is_no_bundle(decoder_bundle: Path) -> None:
    """A description whose variant names a file it does not list is refused."""
    with pytest.raises(SettingsError, match=r"names 'model\.x', which is not a file of the bundle"):
        msgspec.structs.replace(bundles.read(decoder_bundle), variants=(Variant("x", "onnxruntime", "1.23", "model.x", 1, 0),))


WITHOUT = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"llama_cpp", "torch", "transformers", "huggingface_hub", "onnx"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import msgspec
from edge_sdk import MissingRuntime, bundle as bundles, open_bundle
from edge_sdk.bundle import Variant
from edge_sdk.engines import open_engine
from pathlib import Path
folder = Path(FOLDER)
shape = open_bundle(folder).score(["a film"]).shape
bundle = bundles.read(folder)
variant = msgspec.structs.replace(bundle.variants[0], name="q8_0", runtime="llama.cpp")
try:
    open_engine(folder, msgspec.structs.replace(bundle, variants=(variant,)))
    said = ""
except MissingRuntime as error:
    said = str(error)
print(json.dumps([list(shape), said]))
"""


def test_without_extras_it_classifies_and_says_how_to_get_llama_cpp(decoder_bundle: Path) -> None:
    """Where torch, transformers, llama.cpp and the hub's client are absent, ONNX works, and GGUF names its extra."""
    shape, said = python(WITHOUT.replace("FOLDER", repr(str(decoder_bundle))))

    assert shape == [1, 2]
    assert "pip install 'tandem-edge[gguf]'" in said


def test_the_device_requirements_are_complete() -> None:
    """`requirements-device.txt` is what the base install needs, all the way down, but for the model hub's client."""
    listed = {
        name for line in (ROOT / "requirements-device.txt").read_text().splitlines() if (name := line.split("#")[0].strip())
    }
    needed: set[str] = set()
    queue = _needs("tandem-edge")
    while queue:
        name = queue.pop()
        if name not in needed and name != "huggingface-hub":
            needed.add(name)
            queue |= _needs(name)

    assert {_plain(name) for name in listed} == needed


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needs(name: str) -> set[str]:
    """What a package needs on this Python, extras aside."""
    found = [r for r in requires(name) or [] if "extra ==" not in r and 'python_version < "3.11"' not in r]
    return {_plain(match[0]) for r in found if (match := re.match(r"[\w.-]+", r))}
