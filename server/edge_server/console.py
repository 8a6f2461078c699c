"""What an operator looks at: `edge-server status`, `devices`, `versions`, `export` and `config show`."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from edge_sdk.adapters import ADAPTER_FILE, CONFIG_FILE, peft_config
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import Manifest, Measurement, Status
from edge_sdk.transport import Api, HttpTransport
from edge_sdk.wire import encode
from edge_server import environment
from edge_server import settings as run_settings

ADMIN_TOKEN = "admin.token"  # noqa: S105  # the file's name
VERBS = ("status", "devices", "versions", "export")


def arguments(verbs: Any) -> None:
    status = verbs.add_parser("status", help="where a run stands")
    devices = verbs.add_parser("devices", help="who takes part in a run, and what they sent")
    versions = verbs.add_parser("versions", help="the versions of a run, newest last")
    export = verbs.add_parser("export", help="copy a version as a folder that PEFT loads")
    for each in (status, devices):
        each.add_argument("server", help="URL")
    versions.add_argument("server", metavar="run", help="URL of a server, or its data folder, whether it runs or not")
    export.add_argument("data", type=Path, help="the server's data folder")
    export.add_argument("version", type=int)
    export.add_argument("out", type=Path, help="folder that is not there yet")
    for each in (status, devices, versions):
        each.add_argument("--json", action="store_true")
        access(each)


def access(parser: argparse.ArgumentParser) -> None:
    """The flags of a verb that calls a server."""
    parser.add_argument("--ca", type=Path, help="file of the server's certificate, where the system does not trust it anyway")
    parser.add_argument("--admin-token-file", type=Path, help=f"{ADMIN_TOKEN} of the server's --data, if devices need tokens")


def transport(args: argparse.Namespace) -> HttpTransport:
    """The operator's way to a server. Raises: SettingsError: the admin token is none."""
    path: Path | None = args.admin_token_file
    return HttpTransport(args.server, ca=args.ca, bearer="" if path is None else admin_token(path, path.read_bytes()))


def admin_token(path: Path, body: bytes) -> str:
    """What the file holds. Raises: SettingsError: it is not one line of text."""
    token = body.decode(errors="replace").strip()
    if not token.isprintable() or "\N{REPLACEMENT CHARACTER}" in token:
        raise SettingsError(
            f"{path} holds no admin token, which is one line of text; name another file, or delete it where the server"
            " runs, which makes one when it starts"
        )
    return token


def run(args: argparse.Namespace) -> None:
    """Raises: SettingsError: there is no such version, or something is where the copy shall be."""
    match args.verb:
        case "status":
            status = asyncio.run(_status(args))
            print(encode(status).decode() if args.json else "\n".join(_standing(status)))
        case "devices":
            status = asyncio.run(_status(args))
            _print(({**msgspec.to_builtins(d), **_newest(status, d.id)} for d in status.devices), args.json)
        case "versions" if Path(args.server).is_dir():
            _print(_folders(Path(args.server)), args.json)
        case "versions":
            adapters = asyncio.run(_status(args)).adapters
            _print(({"version": number, "adapter": adapter} for number, adapter in enumerate(adapters)), args.json)
        case _:
            _export(args.data, args.version, args.out)
            print(f"version {args.version} is now in {args.out}")


async def _status(args: argparse.Namespace) -> Status:
    async with transport(args) as way:
        return await Api(way).status()


def _standing(status: Status) -> Iterator[str]:
    ended = ", finished" if status.finished else ""
    yield f"{status.system}: version {status.version}, {status.buffered} updates waiting{ended}"
    for number, sheet in enumerate(status.sheets):
        became = "not decided" if sheet.accepted < 0 else f"{sheet.accepted} accepted ({sheet.acceptance:.0%})"
        yield f"  sheet {number}: {sheet.written} texts, {sheet.judges} judges, {became}"
    for device in status.devices:
        newest = _newest(status, device.id)
        accuracy = f", accuracy {newest['accuracy']:.3f} at version {newest['version']}" if newest else ""
        yield f"  {device.name}: {device.updates} updates, {device.uploaded_bytes:,} bytes{accuracy}"


def _newest(status: Status, device: str) -> dict[str, float]:
    """A device's newest accuracy, and of which version; empty where it has told none."""
    told: list[Measurement] = [m for m in status.measurements if m.device == device and "accuracy" in m.metrics]
    if not told:
        return {}
    newest = max(told, key=lambda m: m.version)
    return {"accuracy": newest.metrics["accuracy"], "version": newest.version}


def _folders(data: Path) -> Iterator[dict[str, Any]]:
    """The versions of a data folder. Raises: SettingsError: it is none."""
    updates = _updates(data)
    for number, folder in sorted(_versions(data).items()):
        adapter = folder / ADAPTER_FILE
        if not adapter.is_file():  # is being made, or a crash tore it
            continue
        row: dict[str, Any] = {"version": number, "adapter": _sha256(adapter), "made": _date(adapter.stat().st_mtime)}
        yield {**row, **({"updates": updates[number]} if number in updates else {}), "folder": str(folder)}


def _versions(data: Path) -> dict[int, Path]:
    """Raises: SettingsError: this is no data folder."""
    if not (data / "run.json").is_file():
        raise SettingsError(f"{data} is not the data folder of a server; it has no run.json")
    return {int(path.name): path for path in (data / "versions").glob("*") if path.name.isdecimal() and path.is_dir()}


def _updates(data: Path) -> dict[int, int]:
    """How many updates each version was made of; empty where the events are in PostgreSQL, and 0 where they were masked."""
    from edge_server import storage  # here, so that what only calls a server needs no SQLAlchemy
    from edge_server.coordinator import Event, Published

    path = data / "events.sqlite"
    events = (msgspec.json.decode(body, type=Event) for body in storage.bodies(path)) if path.is_file() else ()
    return {event.version: event.folded for event in events if isinstance(event, Published)}


def _export(data: Path, version: int, out: Path) -> None:
    folders = _versions(data)
    if version not in folders:
        there = ", ".join(map(str, sorted(folders))) or "none"
        raise SettingsError(f"{data} has no folder of version {version}; there is {there}")
    if out.exists() or out.is_symlink():
        raise SettingsError(f"{out} is there already; name a folder that is not")
    config, aside = _config(data), out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(folders[version], aside)
    try:
        is_whole = (aside / CONFIG_FILE).read_bytes() == config and (data / "blobs" / _sha256(aside / ADAPTER_FILE)).is_file()
    except FileNotFoundError:
        is_whole = False
    if not is_whole:
        shutil.rmtree(aside)
        raise SettingsError(
            f"version {version} is being made or damaged; if it stays so, delete {folders[version]}, and the server makes it"
            " again when it starts"
        )
    aside.rename(out)


def _config(data: Path) -> bytes:
    """What the folder of each version has beside its adapter. Raises: SettingsError: `run.json` is damaged."""
    try:
        run = msgspec.json.decode((data / "run.json").read_bytes(), type=dict[str, msgspec.Raw])
        manifest = msgspec.json.decode(run["manifest"], type=Manifest)
    except (msgspec.DecodeError, KeyError) as error:
        raise SettingsError(f"{data / 'run.json'} is damaged ({error}); restore it from a backup") from error
    return peft_config(manifest.adapter, manifest.bundle.base)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _print(rows: Iterator[dict[str, Any]], as_json: bool) -> None:
    """One row a line: JSON, or columns with the names above them, in which ids are cut short."""
    found = list(rows)
    if as_json:
        for row in found:
            print(json.dumps(row))
        return
    names = list(dict.fromkeys(name for row in found for name in row))
    cells = [names, *([_cell(name, row.get(name, "")) for name in names] for row in found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells if found else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(name: str, value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text[:12] if name in ("id", "adapter") else text


# `config show` --------------------------------------------------------------------------------------------------------
def show(args: argparse.Namespace, serve: argparse.ArgumentParser) -> None:
    """Prints what `serve` would go by, as a file that --config takes; its flags are comments in it. Passwords are left out."""
    for name, action in environment.flags(serve).items():
        value = getattr(args, action.dest)
        told = _shown(_without_password(value) if action.dest == "state" else value)
        print(f"# {max(action.option_strings, key=len)} {told}  ({name})")
    for key, value in _flat("", msgspec.to_builtins(run_settings.load(args.config, args.system))):
        print(f"{key} = {json.dumps(value, ensure_ascii=False)}")


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold; what is None is left out, for TOML has no word for it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    elif value is not None:
        yield prefix, value


def _shown(value: Any) -> str:
    return json.dumps(
        [str(each) for each in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    )


def _without_password(url: str) -> str:
    """A URL with *** in the place of every password, also one in the query."""
    try:
        parts = urlsplit(url)
        query = urlencode(
            [(name, "***" if "pass" in name.lower() else value) for name, value in parse_qsl(parts.query)], safe="*"
        )
        user, at, host = parts.netloc.rpartition("@")
        name, colon, _ = user.partition(":")
    except ValueError:
        return "***"
    return parts._replace(netloc=f"{name}{colon and ':***'}{at}{host}", query=query).geturl()
