"""`edge-server token` and `edge-server device`: the operator's part of `admission.py`, whether a server runs or not."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edge_sdk.errors import SettingsError
from edge_server.admission import NAME, Admission

UNITS = {"m": 60, "h": 3600, "d": 86400}
LONGEST = 366 * 86400


def arguments(verbs: Any) -> None:
    token = verbs.add_parser("token", help="what admits a device, once: mint, list, revoke")
    do = token.add_subparsers(dest="do", required=True)
    mint = do.add_parser("mint", help="make one, and print it; it is shown only here")
    mint.add_argument("--expires", default="7d", help="minutes, hours or days: 30m, 12h, 7d (default: %(default)s)")
    mint.add_argument("--label", default="", help="for whom it is")
    revoke = do.add_parser("revoke", help="let one that is not used admit nobody")
    revoke.add_argument("id")
    device = verbs.add_parser("device", help="the devices that were admitted: list, revoke")
    then = device.add_subparsers(dest="do", required=True)
    out = then.add_parser("revoke", help="shut one out")
    out.add_argument("id", help="or how it begins")
    lists = do.add_parser("list", help="all tokens, and what became of them"), then.add_parser("list", help="all devices")
    for each in lists:
        each.add_argument("--json", action="store_true")
    for each in (mint, revoke, out, *lists):
        each.add_argument("--data", type=Path, required=True, help="the server's data folder")


def run(args: argparse.Namespace) -> None:
    """Raises: SettingsError: there is no such token or device, or the time is none."""
    now, lasts = time.time(), 0
    if (args.verb, args.do) == ("token", "mint"):
        lasts = _seconds(args.expires)
        if len(args.label) > 64 or not (args.label or "-").isprintable():
            raise SettingsError("--label is at most 64 printable characters")
    elif not args.data.is_dir():
        raise SettingsError(f"there is no data folder {args.data}")
    elif not (args.data / NAME).exists():  # else one would be made
        raise SettingsError(f"{args.data} has no {NAME}: no token was ever minted for it; `edge-server token mint` makes one")
    admission = Admission(args.data)
    try:
        match args.verb, args.do:
            case "token", "mint":
                token, text = admission.mint(args.label, now + lasts, now)
                print(text)
                _hint(f"token {token.id} admits one device until {_date(token.expires)}; on the device:")
                _hint(f"edge-agent join --home HOME --server URL --token {text}")
            case "token", "revoke":
                token = admission.revoke_token(args.id)
                stays = f"; it was used: `edge-server device revoke {token.device[:12]}` shuts its device out"
                print(f"revoked: token {token.id}{stays if token.device else ''}")
            case "token", "list":
                for token in admission.tokens():
                    row = {"id": token.id, "state": token.state(now), "label": token.label, "device": token.device}
                    print(json.dumps({**row, "expires": token.expires}) if args.json else _row(row, token.expires))
            case "device", "revoke":
                print(f"revoked: device {admission.revoke_device(args.id)}; it is refused from its next request on")
            case _:
                for id, revoked in admission.devices().items():
                    row = {"id": id, "state": "revoked" if revoked else "admitted"}
                    print(json.dumps(row) if args.json else "  ".join(row.values()))
    finally:
        admission.close()


def _seconds(text: str) -> int:
    """Raises: SettingsError."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if found is None or (seconds := int(found[1]) * UNITS[found[2]]) > LONGEST:
        raise SettingsError(f"--expires {text}: say minutes, hours or days, at most 366 days: 30m, 12h, 7d")
    return seconds


def _row(row: dict[str, str], expires: float) -> str:
    until = f"until {_date(expires)}" if row["state"] == "open" else row["device"]
    return f"{row['id']}  {row['state']:<7}  {row['label']:<20}  {until}".rstrip()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _hint(line: str) -> None:
    print(line, file=sys.stderr)
