"""`edge-server`: serve a run, or look at one."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
import sys
from pathlib import Path

from aiohttp import web

from edge_sdk import bundle as bundles
from edge_sdk import corpus, files
from edge_sdk.errors import DataError, EdgeError, SettingsError
from edge_sdk.protocol import Line, Sample, Withdrawal
from edge_sdk.tasks import Example, Task
from edge_sdk.transport import Api, HttpTransport
from edge_sdk.wire import encode, pack_lines
from edge_server import settings as run_settings
from edge_server.knowledge.filters import Embed
from edge_server.llm.jobs import Slm
from edge_server.settings import SYSTEMS


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong settings or arguments, 1 anything else."""
    parser = argparse.ArgumentParser(prog="edge-server", description="The light asynchronous server of tandem-edge.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run one federated system until stopped")
    serve.add_argument("--config", type=Path, required=True, help="TOML file of the run, e.g. examples/minilm.toml")
    serve.add_argument(
        "--bundle",
        type=Path,
        required=True,
        action="append",
        help="folder made by `edge-export bundle`; with FedMKT again for each model, which devices choose by the folder's name",
    )
    serve.add_argument("--data", type=Path, required=True, help="folder of this run's events, blobs and versions")
    serve.add_argument("--system", choices=SYSTEMS, help="another system than the file's, with its table of settings")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8440, help="0 for any free port (default: %(default)s)")
    serve.add_argument(
        "--trust-network", action="store_true", help="listen beyond this machine although devices are not yet authenticated"
    )
    status = verbs.add_parser("status", help="where a run stands")
    status.add_argument("server", help="URL")
    status.add_argument("--json", action="store_true")
    synthetic = verbs.add_parser("synthetic", help="the LLM's texts that devices judged good")
    synthetic.add_argument("do", choices=("list", "show", "withdraw", "export"))
    synthetic.add_argument("server", help="URL")
    synthetic.add_argument("what", nargs="?", default="", help="a sample's id (show, withdraw) or a file (export)")
    synthetic.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if args.verb == "serve":
            asyncio.run(_serve(args))
        elif args.verb == "synthetic":
            asyncio.run(_synthetic(args))
        else:
            asyncio.run(_status(args))
    except ModuleNotFoundError as error:
        print(f"edge-server: {error.name} is not installed; run: pip install 'tandem-edge[server]'", file=sys.stderr)
        return 1
    except SettingsError as error:
        print(f"edge-server: {error}", file=sys.stderr)
        return 2
    except (EdgeError, OSError) as error:
        print(f"edge-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(args: argparse.Namespace) -> None:
    from edge_server.app import create_app  # here, so that `status` needs no SQLAlchemy
    from edge_server.compute import LocalCompute
    from edge_server.ledger import Ledger

    if not args.trust_network and not _is_local(args.host):
        raise SettingsError(
            f"{args.host} is reachable from other machines and devices are not authenticated yet; --trust-network does it"
        )
    settings = run_settings.load(args.config, args.system)
    if len(args.bundle) > 1 and settings.system != "fedmkt":
        raise SettingsError(f"{settings.system} averages one model's adapters: give one --bundle; several models need fedmkt")
    names = {folder: folder.absolute().name for folder in args.bundle}
    if len(set(names.values())) < len(args.bundle):
        raise SettingsError("devices choose a bundle by its folder's name: each --bundle needs another one")
    found = {folder: bundles.read(folder) for folder in args.bundle}
    for folder, bundle in found.items():
        bundles.verify(folder, bundle.files)
    folder, *_ = args.bundle
    embed = _embedder(folder, found[folder]) if settings.system == "crosslm" else None
    manifest, compute, auxiliary = run_settings.manifest(settings, found[folder]), None, None
    if settings.system == "fedcollm" and (both := settings.fedcollm):
        compute = LocalCompute(both.llm, settings.task, Slm(str(folder), manifest.adapter))
        auxiliary = _labelled(args.config.parent / both.auxiliary, settings.task, "fedcollm.auxiliary")
    if settings.system == "fedmkt" and (public := settings.fedmkt):
        compute = LocalCompute(public.llm, settings.task)
        auxiliary = _labelled(args.config.parent / public.public, settings.task, "fedmkt.public")
    others = {names[each]: run_settings.manifest(settings, bundle) for each, bundle in found.items() if len(found) > 1}
    ledger = Ledger(settings, manifest, args.data, _say, compute, embed, auxiliary=auxiliary or (), others=others)
    for each, bundle in found.items():
        for name, file in bundle.files.items():
            ledger.blobs.adopt(each / name, file.sha256)
    runner = web.AppRunner(create_app(ledger), access_log=None, handle_signals=False, shutdown_timeout=5)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        site = web.TCPSite(runner, args.host, args.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        _say(f"listening on http://{at}, {settings.system} at version {ledger.state.version}")
        await stop.wait()
    finally:
        await runner.cleanup()
    _say("stopped")


async def _status(args: argparse.Namespace) -> None:
    async with HttpTransport(args.server) as transport:
        status = await Api(transport).status()
    if args.json:
        print(encode(status).decode())
        return
    print(
        f"{status.system}: version {status.version}, {status.buffered} updates waiting{', finished' if status.finished else ''}"
    )
    for number, sheet in enumerate(status.sheets):
        became = "not decided" if sheet.accepted < 0 else f"{sheet.accepted} accepted ({sheet.acceptance:.0%})"
        print(f"  sheet {number}: {sheet.written} texts, {sheet.judges} judges, {became}")
    for device in status.devices:
        newest = max(
            (m for m in status.measurements if m.device == device.id and "accuracy" in m.metrics),
            key=lambda m: m.version,
            default=None,
        )
        accuracy = f", accuracy {newest.metrics['accuracy']:.3f} at version {newest.version}" if newest else ""
        print(f"  {device.name}: {device.updates} updates, {device.uploaded_bytes:,} bytes{accuracy}")


def _labelled(path: Path, task: Task, setting: str) -> tuple[Example, ...]:
    """The server's own labelled texts. Raises: SettingsError: there are none in this file, or something else."""
    try:
        found = corpus.private(list(corpus.rows(path)), task).labelled
    except (DataError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{setting}: {path} cannot be used; mend it, or name another file: {said}") from error
    if not found:
        raise SettingsError(f"{setting}: {path} has no text with a label that is not held out; add some")
    return found


def _embedder(folder: Path, bundle: bundles.Bundle) -> Embed | None:
    """An encoder bundle finds texts that resemble each other; a decoder's vectors do not, and words are compared."""
    if bundle.kind != "encoder":
        return None
    from edge_sdk.engines import open_engine

    engine = open_engine(folder, bundle)
    return engine.embed


async def _synthetic(args: argparse.Namespace) -> None:
    if args.do != "list" and not args.what:
        raise SettingsError(
            f"`edge-server synthetic {args.do} URL` needs {'a file' if args.do == 'export' else 'the id of a sample'}"
        )
    async with HttpTransport(args.server) as transport:
        api = Api(transport)
        if args.do == "withdraw":
            await api.withdraw(args.what)
            print(f"withdrawn: {args.what}; devices drop it at their next contact")
            return
        lines: list[Line] = []
        while page := await api.synthetic(len(lines), 1000):
            lines += page
    gone = {line.id for line in lines if isinstance(line, Withdrawal)}
    samples = [line for line in lines if isinstance(line, Sample) and line.id not in gone]
    if args.do == "export":
        files.write(Path(args.what), pack_lines(samples))
        print(f"{len(samples)} samples written to {args.what}")
        return
    some = [sample for sample in samples if args.do == "list" or sample.id == args.what]
    if args.do == "show" and not some:
        raise SettingsError(f"there is no sample {args.what}, or it was withdrawn")
    for sample in some:
        if args.json or args.do == "show":
            print(encode(sample).decode())
        else:
            print(f"{sample.id}  {sample.label:<10} {sample.quality:.2f}  {sample.text}")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
