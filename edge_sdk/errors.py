"""Every exception this distribution raises on purpose, by what the caller can do about it.

EdgeError
├── SettingsError     a setting is unknown, missing or out of bounds: change the setting
├── MissingRuntime    what runs a model is not installed, or too old: install it, or choose another variant
├── DataError         private examples or a model's files do not fit the task: change the data
├── AssetError        a model or data set could not be had, or its bytes are not the expected ones: fetch again
├── WireError         bytes from the other side break the protocol: never retried, always reported
└── ServerError       the server refused or could not be reached
    ├── Unreachable   no answer: try again later, nothing is lost
    └── Refused       an RFC 9457 problem document: `code` says which rule, `retry_after` when to return
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of all errors; its text says what happened and what to do next."""


class SettingsError(EdgeError):
    """A setting is unknown, missing or out of bounds."""


class MissingRuntime(EdgeError):
    """ONNX Runtime or llama.cpp is missing or too old for a variant."""


class DataError(EdgeError):
    """Examples, labels or model files do not fit the task."""


class AssetError(EdgeError):
    """An asset could not be fetched, or is not what it should be."""


class WireError(EdgeError):
    """Bytes that break the protocol.

    Args:
        code: stable problem code, listed in `docs/protocol.md`.
        detail: one sentence for a person.
        status: HTTP status a server answers with.
        retry_after: seconds after which the same may be taken; None where it never will.
    """

    def __init__(self, code: str, detail: str, status: int = 400, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = status
        self.retry_after = retry_after


class ServerError(EdgeError):
    """The server refused, or could not be reached."""


class Unreachable(ServerError):
    """No usable answer came back; the request may be repeated."""


class Refused(ServerError):
    """The server answered with a problem document.

    Args:
        code: stable problem code.
        detail: the server's sentence.
        status: HTTP status.
        retry_after: seconds after which a repeat may succeed; None where it never will.
    """

    def __init__(self, code: str, detail: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = status
        self.retry_after = retry_after
