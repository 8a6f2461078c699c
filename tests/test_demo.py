"""`python -m examples.demo` with the real model: the whole story, and Ctrl-C in the middle of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_end_to_end import ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start_demo(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.demo", "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children_of(out: Path) -> list[str]:
    """Processes of ours whose command line names the demo's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(out) in command and "examples.demo" not in command:
            found.append(command)
    return found


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    """It exits 0, leaves a complete report, and the federation is better than the base model and than learning alone."""
    out = tmp_path / "demo"
    demo = start_demo(out)
    said, _ = demo.communicate(timeout=800)

    assert demo.returncode == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report.keys() == {
        *("system", "versions", "devices", "mean", "upload_fraction", "seconds"),
        *("llm", "synthetic"),
    }
    assert report["system"] == "crosslm"
    assert [d["name"] for d in report["devices"]] == ["movie", "amazon", "tweets", "nyt"]
    keys = {"name", "zero_shot", "local_only", "federated", "test_examples", "uploaded_bytes"}
    assert all(device.keys() == keys for device in report["devices"])
    assert report["mean"]["federated"] > report["mean"]["zero_shot"]
    assert report["mean"]["federated"] > report["mean"]["local_only"]
    assert 0 < report["upload_fraction"] < 0.005
    assert report["llm"]["after"] > report["llm"]["before"]
    assert report["synthetic"]["written"] > 60
    assert 0 < report["synthetic"]["accepted_first"] < 1
    assert 0 < report["synthetic"]["accepted_last"] <= 1
    assert report["seconds"] < 600  # 300 on two quiet cores
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("accepted</td>") + page.count("refused</td>") == 8
    assert "<script" not in page
    assert "<link" not in page
    assert not children_of(out)


def test_ctrl_c_stops_every_process(tmp_path: Path) -> None:
    """An interrupt while agents are at work leaves no process behind."""
    out = tmp_path / "demo"
    demo = start_demo(out)
    until(lambda: any("edge_sdk.cli" in command for command in children_of(out)), seconds=600)
    demo.send_signal(signal.SIGINT)
    said, _ = demo.communicate(timeout=60)

    assert demo.returncode == 130, said
    assert "no process is left" in said
    until(lambda: not children_of(out), seconds=10)
