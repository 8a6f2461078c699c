"""`edge-agent`: keep examples, take part as a daemon, predict, and measure what learning alone would give."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_sdk import corpus
from edge_sdk.assets import cache_folder
from edge_sdk.device import EdgeDevice, Prediction, predictions
from edge_sdk.eligibility import Policy
from edge_sdk.engines import open_bundle
from edge_sdk.errors import DataError, EdgeError, MissingRuntime, SettingsError
from edge_sdk.store import NAME, Store
from edge_sdk.training.depth import Limits

T = TypeVar("T", bound=msgspec.Struct)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done or told to stop (SIGTERM), 1 an error said on stderr, 2 wrong settings or arguments, 130 Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.call(args)
    except (SettingsError, MissingRuntime) as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 2
    except (EdgeError, OSError) as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent", description="One device of a tandem-edge fleet.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, call: Any, help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help)
        made.add_argument("--home", type=Path, required=True, help="folder of the device's private store")
        made.set_defaults(call=call)
        return made

    def with_server(made: argparse.ArgumentParser) -> None:
        made.add_argument("--server", required=True, help="URL, e.g. http://127.0.0.1:8440")
        made.add_argument("--token", default="", help="from the server's operator, for the first contact, if it wants one")
        made.add_argument("--ca", type=Path, help="file of the server's certificate, where the system does not trust it anyway")
        made.add_argument(
            "--name", default=os.uname().nodename[:64] or "device", help="shown to the operator (default: %(default)s)"
        )
        made.add_argument("--threads", type=int, default=1, help="for inference and training (default: %(default)s)")
        made.add_argument("--variant", default="", help="of the bundle: int8, q8_0, ... (default: the one it recommends)")
        made.add_argument("--model", default="", help="which bundle, where the run has several (default: the first)")
        made.add_argument("--cache", type=Path, default=cache_folder(), help="folder for model files (default: %(default)s)")

    add = verb("add", _add, "keep private examples from JSON lines: text, and label, truth, held_out where known")
    add.add_argument("files", type=Path, nargs="+")
    verb("status", _status, "what the device keeps").add_argument("--json", action="store_true")
    with_server(verb("join", _join, "meet the server once, with a token where it wants one, and do nothing else"))
    run = verb("run", _run, "take part until the run is over")
    with_server(run)
    run.add_argument(
        "--only-secure", action="store_true", help="share what it learned in secure averaging only, whatever the server says"
    )
    limits, policy = Limits(), Policy()
    costs = run.add_argument_group("what training may cost (docs/training.md)")
    for name, default, text in (
        ("layers", limits.layers, "how many layers nearest the output to train; 0 for what memory and speed allow"),
        ("rank", limits.rank, "how many LoRA components to train; 0 for all"),
        ("memory-mb", limits.memory_mb, "of the whole process; 0 for no limit"),
        ("step-seconds", limits.step_seconds, "length of one small step, after which training is kept on disk"),
        ("cache-mb", limits.cache_mb, "disk for what the frozen layers computed"),
        ("micro-tokens", limits.micro_tokens, "tokens in memory at a time"),
    ):
        costs.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")
    when = run.add_argument_group("when training may run")
    for name, default, text in (
        ("min-battery", policy.min_battery, "charge, 0 to 1, below which it waits unless charging"),
        ("max-celsius", policy.max_celsius, "temperature above which it waits"),
        ("max-load", policy.max_load, "load of a core above which it waits; 0 for any"),
        ("min-free-mb", policy.min_free_mb, "memory that must be free"),
        ("wait-seconds", policy.wait_seconds, "how long it waits before it looks again"),
    ):
        when.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default: %(default)s)")
    alone = verb("baseline", _baseline, "what this device's labels give without federation; keeps and sends nothing")
    with_server(alone)
    alone.add_argument(
        "--steps", type=int, required=True, help="optimizer steps, for a fair comparison versions * steps of the run"
    )
    alone.add_argument("--batch-size", type=int, default=16)
    alone.add_argument("--learning-rate", type=float, default=1e-3)
    alone.add_argument("--dropout", type=float, default=0.1)
    alone.add_argument("--seed", type=int, default=0)
    predict = verbs.add_parser("predict", help="label texts with a device's newest adapter, or with a bundle as it is")
    predict.set_defaults(call=_predict)
    model = predict.add_mutually_exclusive_group(required=True)
    model.add_argument("--home", type=Path, help="folder of the device's private store")
    model.add_argument("--bundle", type=Path, help="a bundle folder; no device and no server needed")
    predict.add_argument("texts", nargs="+")
    predict.add_argument("--server", help="URL; only needed before the first contact")
    predict.add_argument("--ca", type=Path, help="file of the server's certificate, where the system does not trust it anyway")
    predict.add_argument("--variant", default="", help="of the bundle: int8, q8_0, ... (default: the one it recommends)")
    predict.add_argument("--cache", type=Path, default=cache_folder())
    predict.add_argument("--json", action="store_true")
    return parser


def _add(args: argparse.Namespace) -> int:
    store = Store(args.home)
    print(f"kept {sum(store.add_all(corpus.rows(path)) for path in args.files)} examples in {args.home}")
    return 0


def _status(args: argparse.Namespace) -> int:
    if not (args.home / NAME).exists():
        raise DataError(f"there is no device in {args.home}; make one with `edge-agent add` or `edge-agent run`")
    store = Store(args.home)
    facts = {
        "device": store.device_id,
        **store.counts(),
        "pending": store.pending() is not None,
        "version": store.fact("version"),
    }
    print(json.dumps(facts) if args.json else "\n".join(f"{name}: {value}" for name, value in facts.items()))
    return 0


def _join(args: argparse.Namespace) -> int:
    from edge_sdk.agent import Agent
    from edge_sdk.signed import signing
    from edge_sdk.transport import HttpTransport

    store = Store(args.home)

    async def join() -> None:
        async with HttpTransport(args.server, ca=args.ca) as transport:
            way = signing(store, transport, args.token)
            await Agent(store, way, args.cache, args.name, model=args.model, token=args.token).join()

    asyncio.run(join())
    print(f"joined {args.server} as {store.device_id}; go on with: edge-agent run --home {args.home} --server {args.server}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from edge_sdk.agent import Agent
    from edge_sdk.signed import signing
    from edge_sdk.transport import HttpTransport

    limits, policy = _settings(Limits, args), _settings(Policy, args)
    signals: list[int] = []

    def stop(number: int, task: asyncio.Task[int]) -> None:
        signals.append(number)
        task.cancel()

    async def run() -> int | None:
        store = Store(args.home)
        async with HttpTransport(args.server, ca=args.ca) as transport:
            agent = Agent(
                store,
                signing(store, transport, args.token),
                args.cache,
                args.name,
                args.threads,
                args.variant,
                limits,
                policy,
                say=_say,
                model=args.model,
                token=args.token,
                only_secure=args.only_secure,
            )
            task = asyncio.ensure_future(agent.run())
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop, number, task)
            try:
                return await task
            except asyncio.CancelledError:
                return None

    loop = asyncio.new_event_loop()
    version = loop.run_until_complete(run())
    if version is None:
        _say("stopped")
        sys.stdout.flush()
        os._exit(
            130 if signal.SIGINT in signals else 0
        )  # a training step may hold the worker thread for seconds; all that matters is on disk
    _say(f"finished at version {version}")
    return 0


def _settings(kind: type[T], args: argparse.Namespace) -> T:
    """A settings struct from the arguments of the same names. Raises: SettingsError: a value is out of bounds."""
    return msgspec.convert({name: getattr(args, name) for name in kind.__struct_fields__}, kind)


def _baseline(args: argparse.Namespace) -> int:
    from edge_sdk import verbs
    from edge_sdk.adapters import add
    from edge_sdk.agent import HIDDEN, Agent
    from edge_sdk.signed import signing
    from edge_sdk.training.batches import Training
    from edge_sdk.transport import HttpTransport

    store = Store(args.home)

    async def run() -> dict[str, float]:
        async with HttpTransport(args.server, ca=args.ca) as transport:
            way, said = signing(store, transport, args.token), _complain
            agent = Agent(
                store, way, args.cache, args.name, args.threads, args.variant, say=said, model=args.model, token=args.token
            )
            models = await agent.models(training=True)
        manifest = models.manifest
        private = store.private(manifest.task)
        training = Training(args.steps, args.batch_size, args.learning_rate, dropout=args.dropout)
        start = manifest.adapter.start(args.seed)
        with tempfile.TemporaryDirectory(prefix="edge-baseline-") as folder:
            prepared = verbs.prepare(0, start, manifest.adapter, private, training, None, args.seed, models.engine)
            states = models.states(manifest.adapter, start, Limits(), Path(folder) / HIDDEN, _complain)
            learned = prepared.learned(*models.learner(manifest.adapter, states, Limits()).fit(prepared.job))
        count, metrics = verbs.evaluate(add(start, learned.delta), manifest.adapter, private, models.engine)
        return {"test_examples": count, **metrics}

    print(json.dumps(asyncio.run(run())))
    return 0


def _predict(args: argparse.Namespace) -> int:

    if args.bundle is not None:
        _show(predictions(open_bundle(args.bundle, variant=args.variant), args.texts), args.json)
        return 0
    if args.server is None and not (args.home / NAME).exists():
        raise DataError(f"there is no device in {args.home}; name its server once: --server http://HOST:8440")
    _show(EdgeDevice(args.home, args.server, variant=args.variant, cache=args.cache, ca=args.ca).predict(args.texts), args.json)
    return 0


def _show(found: Sequence[Prediction], as_json: bool) -> None:
    for p in found:
        if as_json:
            print(json.dumps({"text": p.text, "label": p.label, "probabilities": p.probabilities}))
        else:
            print(f"{p.label} ({p.probabilities[p.label]:.2f}): {p.text}")


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
