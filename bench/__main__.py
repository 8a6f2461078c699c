"""`python -m bench NAME [--json OUT] [--full]`: runs one bench, prints its table, writes its JSON."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.report import show

BENCHES = {
    "lpfl": "LP-FL against its baselines",
    "crosslm": "mutual learning with the LLM against its baselines and without its parts",
    "fedcollm": "LLM and SLM distil each other, against every control",
    "fedmkt": "the LLM and devices' models of several kinds teach each other, against every control",
    "async_vs_sync": "asynchronous averaging against synchronous rounds, in virtual time: hours and uploads to an accuracy",
    "secure": "secure averaging against plain averaging: server CPU, bytes, error",
    "lora_push": "what the server costs: seconds a round, CPU, memory, bytes, with real devices' processes",
    "uploads": "what rounding updates to fp16 and int8 costs in accuracy",
    "lpfl_settings": "how LP-FL's settings were chosen, on validation text",
    "training": "split training against PEFT and the Trainer: seconds, memory, disk, accuracy",
    "training_settings": "how the rates of training were chosen, on validation text",
    "engines": "quantized bundles against transformers fp32: agreement, speed, size, swaps",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", epilog="; ".join(f"{k}: {v}" for k, v in BENCHES.items()))
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--json", type=Path, help="file for the rows and the summary")
    parser.add_argument("--full", action="store_true", help="every setting and seed, however long it takes")
    parser.add_argument("--peer", type=Path, help="lora_push: file with a line of JSON for each run of another system")
    args = parser.parse_args()
    if args.peer and args.name != "lora_push":
        parser.error("--peer is for lora_push")
    more = {"peers": args.peer} if args.peer else {}
    show(importlib.import_module(f"bench.{args.name}").run(args.full, **more), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
