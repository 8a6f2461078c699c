"""The main job, whole and real: one server process with its LLM, four device processes with private text, learning mutually.

    python -m examples.demo [--slm minilm|smollm2] [--out runs/demo]

Each device has one domain of real sentences (movie, amazon, tweets, nyt): 16 with labels, 240 without, and 100 with labels that
it never trains on but chooses by. Both sides are measured on other text. The LLM writes, devices judge,
both learn from that (CrossLM-style), and then the devices average what they learn (LP-FL); with smollm2 only the latter.
Leaves report.json and report.html behind; every process is stopped at the end, on an error, and on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import msgspec
from rich.console import Console
from rich.live import Live

from bench import fleet, lpfl
from edge_sdk import bundle as bundles
from edge_sdk import verbs
from edge_sdk.agent import kept_adapter
from edge_sdk.assets import MODELS, resolve
from edge_sdk.engines import open_engine
from edge_sdk.errors import EdgeError
from edge_sdk.protocol import Status
from edge_sdk.store import Store
from edge_sdk.tasks import Private
from edge_server import settings as run_settings
from edge_server.systems.lpfl import LpFl
from examples import icwsm, report, story

LABELLED, UNLABELLED, HELD_OUT, TESTED = 16, 240, 100, 300
LLM_TESTED = 25  # of a device's test texts are put to the LLM
CONFIG = {"minilm": "demo", "smollm2": "smollm2"}
MARK = ".tandem-demo"  # in every folder that a demo made and may empty
DEADLINE = 3600.0  # seconds for the federated part: a stuck run must end


class Failed(Exception):
    """A process ended badly; the text says which one and what it said last."""


@dataclass(frozen=True)
class Device:
    name: str
    home: Path
    process: subprocess.Popen[bytes]
    log: Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slm", choices=("minilm", "smollm2"), default="minilm", help="encoder (default) or decoder (slower)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="which sentences the devices own")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that `finally` stops the processes
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console()
    try:
        run(args.slm, args.out, args.seed, console)
    except (EdgeError, Failed) as error:
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; no process is left running")
        return 130
    return 0


def run(slm: str, out: Path, seed: int, console: Console) -> None:
    """Assets, data, baselines, federation, report; in that order."""
    began = time.monotonic()
    config = fleet.CONFIGS / f"{CONFIG[slm]}.toml"
    settings = run_settings.load(config)
    with console.status("fetching text and model (cached after the first time)"):
        domains = icwsm.load(resolve(icwsm.ASSET))
        bundle = fleet.bundle_of(slm)
        if settings.system == "crosslm" and settings.crosslm is not None:
            resolve(MODELS[settings.crosslm.llm.model])
    console.print(f"assets ready after {time.monotonic() - began:.0f} s")
    started = time.monotonic()
    clear(out)
    homes = {name: out / "devices" / name for name in domains}
    tests = dict(zip(domains, fleet.devices("by-domain", LABELLED, UNLABELLED, TESTED, "test", seed), strict=True))
    own = fleet.devices("by-domain", LABELLED, UNLABELLED, HELD_OUT, "validation", seed)
    for name, private in zip(domains, own, strict=True):
        device = uuid.uuid4().hex  # one device in two homes: it takes part in one, and learns alone in the other
        fill(homes[name], private, device)  # with nothing that its result is measured by
        fill(out / "alone" / name, tests[name], device)
    (out / "logs").mkdir(parents=True)
    with processes() as started_processes:
        server, address = start_server(config, bundle, out, started_processes)
        with console.status("local-only baselines: each device trains on its own labels"):
            best = run_settings.load(fleet.CONFIGS / f"{slm}.toml").lpfl
            best = lpfl.settings_of(lpfl.Cell(slm, "by-domain", LABELLED, seed, "local_only"), best)
            alone = baselines({name: out / "alone" / name for name in domains}, address, best, out, started_processes)
        devices = [start_agent(name, home, address, out, started_processes) for name, home in homes.items()]
        status = watch(address, devices, server, out, versions_of(settings), console)
    with console.status("measuring both sides on test text"):
        measured = {name: {"local_only": alone[name], **measure(bundle, settings, homes[name], tests[name])} for name in homes}
        asked = [example for private in tests.values() for example in private.held_out[:LLM_TESTED]]
        told = story.read(out / "server", settings, asked) if settings.system == "crosslm" else None
    seconds = time.monotonic() - started
    result = report.summarize(status, measured, TESTED, bundle, seconds, told)
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write_html(out / "report.html", result, status, slm, told)
    console.print(report.table(result))
    console.print(f"{seconds:.0f} s; {out / 'report.json'} and {out / 'report.html'} tell the whole story")


def versions_of(settings: run_settings.RunSettings) -> int:
    """Of the whole run."""
    if (llm := settings.crosslm) is None or settings.system != "crosslm":
        return settings.lpfl.versions
    return llm.versions + (llm.federated.versions if llm.federated is not None else 0)


def measure(bundle: Path, settings: run_settings.RunSettings, home: Path, private: Private) -> dict[str, float]:
    """Accuracy of the base and of what a device ended with, in the engine that devices use."""
    opened = bundles.read(bundle)
    engine, manifest = open_engine(bundle, opened, settings.task), run_settings.manifest(settings, opened)
    with contextlib.closing(Store(home)) as store:
        ended_with = kept_adapter(store, manifest)
    found = {"zero_shot": manifest.adapter.start(0), "federated": ended_with or manifest.adapter.start(0)}
    return {name: verbs.evaluate(arrays, manifest.adapter, private, engine)[1]["accuracy"] for name, arrays in found.items()}


def clear(out: Path) -> None:
    """Empties the folder of an earlier demo. Raises: Failed: it holds something else."""
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise Failed(f"{out} holds other files; choose a new or an empty folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


def fill(home: Path, private: Private, device: str) -> None:
    """Puts one device's private text into its store; the truths only measure soft labels."""
    labels = icwsm.LABELS
    store = Store(home)
    store.set_fact("device", device)
    store.add_all((e.text, labels[e.label or 0], None, False) for e in private.labelled)
    store.add_all((text, None, labels[t or 0], False) for text, t in zip(private.unlabelled, private.truths, strict=True))
    store.add_all((e.text, labels[e.label or 0], None, True) for e in private.held_out)
    store.close()


Running = list[subprocess.Popen[bytes]]


@contextmanager
def processes() -> Iterator[Running]:
    """Collects child processes; on the way out all of them are asked to stop, then made to."""
    running: Running = []
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(arguments: Sequence[str], log: Path, running: Running) -> subprocess.Popen[bytes]:
    """Starts one of our programs in a session of its own, so that Ctrl-C reaches it through us, once."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # more processes than cores: nobody waits by spinning
    environment = {**os.environ, **threads, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    running.append(process)
    return process


def start_server(config: Path, bundle: Path, out: Path, running: Running) -> tuple[subprocess.Popen[bytes], str]:
    log = out / "logs" / "server.log"
    arguments = ["edge_server.cli", "serve", "--config", str(config), "--bundle", str(bundle)]
    process = start([*arguments, "--data", str(out / "server"), "--port", "0"], log, running)
    while "listening on " not in log.read_text():
        ended(process, "edge-server", log)
        time.sleep(0.05)
    return process, log.read_text().split("listening on ")[1].split(",")[0]


def start_agent(name: str, home: Path, address: str, out: Path, running: Running) -> Device:
    log = out / "logs" / f"{name}.log"
    arguments = ["edge_sdk.cli", "run", "--home", str(home), "--server", address, "--name", name]
    return Device(name, home, start(arguments, log, running), log)


def baselines(homes: dict[str, Path], address: str, settings: LpFl, out: Path, running: Running) -> dict[str, float]:
    """Accuracy of each device learning alone, with as many steps as LP-FL takes and its own best settings."""
    training = settings.training
    options = ["--steps", settings.versions * training.steps, "--batch-size", training.batch_size]
    options += ["--learning-rate", training.learning_rate, "--dropout", training.dropout]
    logs = {name: out / "logs" / f"{name}-baseline.log" for name in homes}
    waiting, working = list(homes), dict[str, subprocess.Popen[bytes]]()
    while waiting or working:
        while waiting and len(working) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            arguments = ["edge_sdk.cli", "baseline", "--home", str(homes[name]), "--server", address, "--name", name]
            working[name] = start([*arguments, *map(str, options)], logs[name], running)
        for name, process in list(working.items()):
            if process.poll() is not None and working.pop(name).returncode != 0:
                ended(process, f"edge-agent baseline of {name}", logs[name])
        time.sleep(0.1)
    return {name: float(json.loads(log.read_text().splitlines()[-1])["accuracy"]) for name, log in logs.items()}


def watch(
    address: str, devices: Sequence[Device], server: subprocess.Popen[bytes], out: Path, versions: int, console: Console
) -> Status:
    """Shows the run as it goes, until every device has measured the last version and gone home, and the LLM has learned."""
    deadline = time.monotonic() + DEADLINE
    shown = -1
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            ended(server, "edge-server", out / "logs" / "server.log")
            status = ask(address)
            if console.is_terminal:
                live.update(report.progress(status, versions))
            elif status.version > shown:
                shown = status.version
                console.print(f"version {shown} of {versions}")
            if all(device.process.poll() == 0 for device in devices) and status.finished:
                return status
            for device in devices:
                if device.process.poll() not in (None, 0):
                    ended(device.process, f"edge-agent {device.name}", device.log)
            if time.monotonic() > deadline:
                raise Failed(f"not finished after {DEADLINE:.0f} s; see {out / 'logs'}")
            time.sleep(0.5)


def ask(address: str) -> Status:
    with urlopen(f"{address}/v1/status", timeout=30) as answer:  # noqa: S310  # our own server's address
        return msgspec.json.decode(answer.read(), type=Status)


def ended(process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Raises: Failed: the process has ended."""
    if (code := process.poll()) is not None:
        raise Failed(f"{name} ended with {code}:\n{log.read_text()[-1500:]}")


if __name__ == "__main__":
    sys.exit(main())
