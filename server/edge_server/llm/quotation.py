"""Where a text ends that was written into an open quotation; pure."""

from __future__ import annotations

CLOSING = '"'  # prompts open a quotation; a text ends where it is closed
WHOLE = (".", "!", "?", "…")  # how sentences end


def inside(text: str) -> str:
    """What stands before the closing quote or the line's end; of a text cut short its whole sentences, if it has any."""
    found = text.split(CLOSING)[0].split("\n")[0].strip()
    if CLOSING in text or "\n" in text:
        return found
    return found[: at + 1] if (at := max(found.rfind(f"{end} ") for end in WHOLE)) > 0 else found
