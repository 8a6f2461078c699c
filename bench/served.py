"""A real `edge-server` process in a folder of its own, around a bundle without a model, and what it costs while it runs.

Numbers come from /proc (Linux): CPU seconds and the highest resident memory of the server and whatever it has started.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edge_sdk import bundle as bundles
from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.bundle import Bundle
from edge_sdk.tasks import Task
from edge_server.admission import Admission
from edge_server.systems.lpfl import LpFl

Tier = Literal["bare", "production"]
TASK = Task(("bad", "good"), "{text}", (("bad",), ("good",)))
HOUR = 3600.0


@dataclass(frozen=True)
class Moment:
    """When a version was there: seconds of a clock that never goes back, and the server's CPU seconds until then."""

    seconds: float
    cpu: float


@dataclass
class Served:
    """A server that listens.

    Args:
        ca: the certificate that it shows; None for plain HTTP.
        moments: of its versions, from version 1 on; complete once it has stopped.
    """

    pid: int
    url: str
    ca: Path | None
    data: Path
    spec: AdapterSpec
    moments: list[Moment] = field(default_factory=list)

    def tokens(self, count: int) -> list[str]:
        """One a device; empty ones where the server admits everybody."""
        if self.ca is None:
            return [""] * count
        with contextlib.closing(Admission(self.data)) as admission:
            return [admission.mint("bench", time.time() + HOUR, time.time())[1] for _ in range(count)]

    def adapter(self, version: int) -> dict[str, Array]:
        """As it is on disk."""
        body = (self.data / "versions" / f"{version:04d}" / "adapter_model.safetensors").read_bytes()
        return wire.unpack_adapter(body, self.spec.shapes())

    def cpu_seconds(self) -> float:
        return sum(_cpu_seconds(pid) for pid in _tree(self.pid))

    def peak_mb(self) -> float:
        """The highest memory there was until now, in units of 10^6 bytes."""
        return sum(_peak_mb(pid) for pid in _tree(self.pid))


@contextlib.contextmanager
def serve(folder: Path, tier: Tier, spec: AdapterSpec, run: LpFl) -> Iterator[Served]:
    """A server of this run, stopped at the end.

    Args:
        folder: empty, on the disk that is to be measured.
        tier: `bare`: plain HTTP, and whoever comes is let in; `production`: TLS, tokens, signed requests. In both everything is
            checked and on disk before it is acknowledged: a server cannot do without.

    Raises:
        RuntimeError: it does not start.
    """
    data, secured = folder / "data", tier == "production"
    (folder / "run.toml").write_text(_config(spec, run))
    (folder / "bundle").mkdir()
    bundles.write(folder / "bundle", _bundle(spec))
    cert, key = certificate(folder)
    command = [sys.executable, "-m", "edge_server.cli", "serve", "--port", "0", "--data", str(data)]
    command += ["--config", str(folder / "run.toml"), "--bundle", str(folder / "bundle")]
    command += ["--require-tokens", "--tls-cert", str(cert), "--tls-key", str(key)] if secured else []
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            said = process.stdout.readline() if process.stdout else ""
            if not said.startswith("listening on "):
                raise RuntimeError(f"the server did not start: {said}{(folder / 'stderr').read_text()}")
            url = said.removeprefix("listening on ").split(",")[0]
            served = Served(process.pid, url, cert if secured else None, data, spec)
            reader = threading.Thread(target=_follow, args=(process, served))
            reader.start()
            yield served
            process.terminate()
            reader.join()
        finally:
            process.kill()


def _follow(process: subprocess.Popen[str], served: Served) -> None:
    """Notes when versions were there, by the line that the server says of each."""
    for line in process.stdout or ():
        if line.startswith("version "):
            served.moments.append(Moment(time.monotonic(), served.cpu_seconds()))


def certificate(folder: Path) -> tuple[Path, Path]:
    """PEM files of a certificate for 127.0.0.1 that vouches for itself, and of its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
    builder = builder.add_extension(here, critical=False).add_extension(x509.BasicConstraints(True, 0), critical=True)
    cert, private = folder / "tls.pem", folder / "tls.key"
    cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert, private


def _config(spec: AdapterSpec, run: LpFl) -> str:
    """The run's TOML file."""
    task = f"[task]\nlabels = {list(TASK.labels)}\npattern = '{TASK.pattern}'\nverbalizer = {[list(v) for v in TASK.verbalizer]}"
    adapter = f"[adapter]\nrank = {spec.rank}\nalpha = {spec.alpha}\nfreeze_a = {str(spec.freeze_a).lower()}"
    keys = ("versions", "buffer_size", "max_staleness", "wait_seconds", "evaluate_every", "upload")
    return "\n".join([task, adapter, "[lpfl]", *(f"{key} = {getattr(run, key)!r}" for key in keys)]) + "\n"


def _bundle(spec: AdapterSpec) -> Bundle:
    """A description with the adapter's slots, and nothing to run."""
    layers = 1 + max(slot.layer for slot in spec.slots)
    sizes = {"parameters": 494_032_768, "width": 896, "layers": layers, "positions": 32_768}
    ids = {"prefix": (), "suffix": (), "end": (), "label_ids": ((0,), (1,))}
    about = {"kind": "decoder", "base": "nowhere", "base_sha256": None, "license": "unknown"}
    return Bundle(bundles.SCHEMA, **about, **sizes, **ids, slots=spec.slots, task=TASK, variants=(), files={})  # type: ignore[arg-type]  # a dict forgets which is which


def _tree(pid: int) -> list[int]:
    """A process and all that it has started and that still runs."""
    below = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(each for child in below for each in _tree(child))]


def _cpu_seconds(pid: int) -> float:
    """User and system time, with that of children that have ended (man 5 proc)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))
