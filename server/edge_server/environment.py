"""Flags from the environment: EDGE_SERVER_PORT is `--port`. A flag that is given wins, a name that nobody knows is an error."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edge_sdk.errors import SettingsError

PREFIX = "EDGE_SERVER_"
HELP = "A flag can come from the environment too, --port from EDGE_SERVER_PORT; one that is given here wins."
LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")
UNLINK = "it looks like one that Kubernetes sets for a service; give that another name, or set enableServiceLinks: false"
BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Each(argparse.Action):
    """A flag that may be given several times; the first takes the place of the default."""

    def __call__(self, parser: argparse.ArgumentParser, space: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        before = getattr(space, self.dest)
        setattr(space, self.dest, [value] if before is self.default else [*before, value])


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags of a parser by what they are called in the environment."""
    found = (action for action in parser._actions if action.option_strings and action.dest != "help")
    return {PREFIX + action.dest.upper(): action for action in found}


def apply(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Makes what the environment says the defaults of a parser's flags, which then need not be given.

    A flag without a value is `1` or `0`, one that may be given several times a list with colons, as PATH has it.

    Raises:
        SettingsError: no flag has such a name, or it cannot have such a value; the value is not repeated.
    """
    known = flags(parser)
    for name in sorted(environment):
        if not name.startswith(PREFIX):
            continue
        if name not in known and LINK.fullmatch(name):
            raise SettingsError(f"there is no setting {name}; {UNLINK}")
        if name not in known:
            raise SettingsError(f"there is no setting {name}; those are {', '.join(sorted(known))}. Unset it")
        known[name].default, known[name].required = _value(name, known[name], environment[name]), False


def _value(name: str, action: argparse.Action, text: str) -> Any:
    if action.nargs == 0:
        if text.lower() not in BOOLS:
            raise SettingsError(f"{name} is one of {', '.join(BOOLS)}")
        return BOOLS[text.lower()]
    if isinstance(action, Each):
        return [_one(name, action, part) for part in text.split(os.pathsep)]
    return _one(name, action, text)


def _one(name: str, action: argparse.Action, text: str) -> Any:
    make: Any = action.type or str
    try:
        value = make(text)
    except ValueError as error:
        do = UNLINK if "://" in text else "mend it, or unset it"
        raise SettingsError(f"{name} cannot be used as {', '.join(action.option_strings)}; {do}") from error
    choices: Sequence[Any] | None = None if action.choices is None else list(action.choices)
    if choices is not None and value not in choices:
        raise SettingsError(f"{name} is one of {', '.join(map(str, choices))}")
    return value
