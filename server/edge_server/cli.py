"""`edge-server`: serve a run, look at one, say who may take part, or simulate one."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import secrets
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from edge_sdk import bundle as bundles
from edge_sdk import conditions, corpus, files
from edge_sdk.errors import DataError, EdgeError, SettingsError
from edge_sdk.protocol import Line, Sample, Withdrawal
from edge_sdk.tasks import Example, Task
from edge_sdk.transport import Api
from edge_sdk.wire import encode, pack_lines
from edge_server import console, desk, environment, failpoints, forecast, logs
from edge_server import settings as run_settings
from edge_server.console import ADMIN_TOKEN
from edge_server.intake import LIMIT, Intake
from edge_server.knowledge.filters import Embed
from edge_server.llm.jobs import Slm
from edge_server.settings import SYSTEMS
from edge_server.systems import lpfl

if TYPE_CHECKING:
    from edge_server.guard import Guard

HEAD_SECONDS = 30.0  # a connection on which no request's head is complete by then is closed
LINGER_SECONDS = 3.0  # what a device goes on sending after a refusal is thrown away, so that it gets to read the refusal


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong settings or arguments, 1 anything else."""
    parser = argparse.ArgumentParser(prog="edge-server", description="The light asynchronous server of tandem-edge.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run one federated system until stopped", epilog=environment.HELP)
    _settings(serve)
    console.arguments(verbs)
    config = verbs.add_parser("config", help="the settings as `serve` would go by them: file, environment and flags")
    show = config.add_subparsers(dest="do", required=True).add_parser("show", epilog=environment.HELP)
    _settings(show, run=False)
    synthetic = verbs.add_parser("synthetic", help="the LLM's texts that devices judged good")
    synthetic.add_argument("do", choices=("list", "show", "withdraw", "export"))
    synthetic.add_argument("server", help="URL")
    synthetic.add_argument("what", nargs="?", default="", help="a sample's id (show, withdraw) or a file (export)")
    synthetic.add_argument("--json", action="store_true")
    console.access(synthetic)
    desk.arguments(verbs)
    simulate = verbs.add_parser("simulate", help="what a run's settings would do with thousands of devices, in virtual time")
    forecast.arguments(simulate)
    spoken = sys.argv[1:] if arguments is None else arguments
    try:
        for verb, flags in (("serve", serve), ("config", show)):
            if spoken[:1] == [verb]:
                environment.apply(flags, os.environ)
        args = parser.parse_args(spoken)
        if args.verb == "serve":
            logs.start(args.log, logging.INFO)
            asyncio.run(_serve(args))
            return 0
        logs.start()
        if args.verb in console.VERBS:
            console.run(args)
        elif args.verb == "config":
            console.show(args, show)
        elif args.verb == "synthetic":
            asyncio.run(_synthetic(args))
        elif args.verb == "simulate":
            forecast.run(args)
        else:
            desk.run(args)
    except ModuleNotFoundError as error:
        extra = "postgres" if error.name == "psycopg" else "server"
        print(f"edge-server: {error.name} is not installed; run: pip install 'tandem-edge[{extra}]'", file=sys.stderr)
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


def _settings(serve: argparse.ArgumentParser, run: bool = True) -> None:
    """The flags of `serve`; what only a run needs may be missing where there is none."""
    serve.add_argument("--config", type=Path, required=True, help="TOML file of the run, e.g. examples/minilm.toml")
    serve.add_argument(
        "--bundle",
        type=Path,
        required=run,
        action=environment.Each,
        help="folder made by `edge-export bundle`; with FedMKT again for each model, which devices choose by the folder's name",
    )
    serve.add_argument("--data", type=Path, required=run, help="folder of this run's events, blobs and versions")
    serve.add_argument("--state", default="", help="postgresql://user@host/database of events (default: a SQLite file in --data)")
    serve.add_argument("--snapshot-every", type=int, default=500, help="events between two snapshots (default: %(default)s)")
    serve.add_argument("--system", choices=SYSTEMS, help="another system than the file's, with its table of settings")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8440, help="0 for any free port (default: %(default)s)")
    serve.add_argument(
        "--max-in-flight-mb",
        type=float,
        default=LIMIT / 1e6,
        help="bodies that are received at once; further devices are asked to come again (default: %(default).0f)",
    )
    serve.add_argument(
        "--log", choices=logs.FORMS, default="text", help="how stderr tells of uploads and refusals (default: %(default)s)"
    )
    serve.add_argument(
        "--require-tokens",
        action="store_true",
        help="devices need a token and sign what they send; always so beyond this machine, and once a token was minted",
    )
    serve.add_argument("--admin-token-file", type=Path, help=f"made at the first start (default: {ADMIN_TOKEN} in --data)")
    serve.add_argument("--tls-cert", type=Path, help="PEM file of the server's certificate, and of those it comes from")
    serve.add_argument("--tls-key", type=Path, help="PEM file of its private key")
    serve.add_argument(
        "--plain-http", action="store_true", help="listen beyond this machine without TLS, behind a proxy that has it"
    )


async def _serve(args: argparse.Namespace) -> None:
    from edge_server.app import create_app  # here, so that `status` needs no SQLAlchemy
    from edge_server.compute import LocalCompute
    from edge_server.ledger import Ledger

    conditions.share_heap()  # updates are opened in several threads
    tls = _tls(args.tls_cert, args.tls_key)
    if tls is None and not args.plain_http and not _is_local(args.host):
        raise SettingsError(
            f"{args.host} is reachable from other machines: give --tls-cert and --tls-key, or, behind a proxy, --plain-http"
        )
    if args.snapshot_every < 1:
        raise SettingsError("--snapshot-every is a number of events, at least 1")
    reached = failpoints.of(os.environ.get("EDGE_FAILPOINT"))
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
    kept = {"state": args.state, "snapshot_every": args.snapshot_every, "reached": reached}
    ledger = Ledger(settings, manifest, args.data, _say, compute, embed, auxiliary=auxiliary or (), others=others, **kept)
    for each, bundle in found.items():
        for name, file in bundle.files.items():
            ledger.blobs.adopt(each / name, file.sha256)
    guard = _guard(args, reached)
    app = create_app(ledger, guard, _intake(args.max_in_flight_mb, max(ledger.body_limit, ledger.judgment_limit)))
    runner = _runner(app)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        site = web.TCPSite(runner, args.host, args.port, ssl_context=tls)
        await site.start()
        host, port = runner.addresses[0][:2]
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        _say(f"listening on {'http' if tls is None else 'https'}://{at}, {settings.system} at version {ledger.state.version}")
        if guard is not None:
            _say(f"devices need a token: edge-server token mint --data {args.data}")
        if settings.averaged is not None and lpfl.uncut(settings.averaged):
            _say("versions may be made of fewer than 3 updates, of which none is cut: one device can then destroy the adapter")
        ends = [asyncio.create_task(event.wait()) for event in (stop, ledger.lost)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await runner.cleanup()
    if ledger.lost.is_set():
        raise DataError("the connection to the database is lost; what was on its way is not acknowledged. Start the server again")
    _say("stopped")


def _runner(app: web.Application, head_seconds: float = HEAD_SECONDS) -> web.AppRunner:
    """What serves an application, and how long it bears with those that are slow."""
    slow: dict[str, Any] = {"keepalive_timeout": head_seconds, "lingering_time": LINGER_SECONDS}
    return web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=5, **slow)


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer; None where there is no certificate. Raises: SettingsError: one file is missing, or they do not fit."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise SettingsError("TLS needs both --tls-cert and --tls-key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # an SSLError is one
        raise SettingsError(f"{cert} and {key} are no certificate and its key ({error.strerror or error})") from error
    return context


def _intake(megabytes: float, largest: int) -> Intake:
    """Raises: SettingsError: the largest body of this run would never be let in."""
    if not largest <= megabytes * 1e6 < math.inf:
        raise SettingsError(
            f"--max-in-flight-mb must be at least {math.ceil(largest / 1e6)}: so large may one upload of this run be"
        )
    return Intake(int(megabytes * 1e6))


def _guard(args: argparse.Namespace, reached: failpoints.Reached) -> Guard | None:
    """Who may call what; None where only this machine can, and no token was ever minted."""
    from edge_server.admission import Admission, in_use
    from edge_server.gate import Gate
    from edge_server.guard import Guard

    if _is_local(args.host) and not args.require_tokens and not in_use(args.data):
        return None
    path = args.admin_token_file or args.data / ADMIN_TOKEN
    admin = console.admin_token(path, files.secret(path, lambda: secrets.token_hex(16).encode()))
    if len(admin) < 16:
        raise SettingsError(f"the admin token in {path} has fewer than 16 characters; delete it, and the server makes another")
    reached("admin-written")
    start = time.time() - time.monotonic()  # a clock that never goes back: what is forgotten stays refused
    return Guard(Admission(args.data, reached), Gate(secrets.token_hex(8)), admin, lambda: start + time.monotonic())


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
    async with console.transport(args) as transport:
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
        try:
            files.write(Path(args.what), pack_lines(samples))
        except OSError as error:
            raise SettingsError(f"cannot write {args.what}: {error.strerror}; name a file in a folder that is there") from error
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
