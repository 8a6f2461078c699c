"""Texts as people write them down: JSON lines of text, label, truth and held_out; and what a task makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_sdk.errors import DataError
from edge_sdk.tasks import Example, Private, Task

Entry = tuple[str, str | None, str | None, bool]  # text, label, truth, held out


def rows(path: Path) -> Iterator[Entry]:
    """A file's lines. Raises: DataError: a line that is not such an object, with its number."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                unknown = row.keys() - {"text", "label", "truth", "held_out"}
                text, label, truth, held_out = row["text"], row.get("label"), row.get("truth"), row.get("held_out", False)
            except (ValueError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(f'{path}:{number}: not a JSON object with "text" ({error})') from error
            if unknown:
                raise DataError(
                    f"{path}:{number}: unknown keys {', '.join(sorted(unknown))}; allowed: text, label, truth, held_out"
                )
            strings = (label is None or isinstance(label, str)) and (truth is None or isinstance(truth, str))
            if not isinstance(text, str) or not strings or not isinstance(held_out, bool):
                raise DataError(f"{path}:{number}: text, label and truth are strings, held_out is true or false")
            try:
                "".join((text, label or "", truth or "")).encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{path}:{number}: this example is not valid Unicode (half a character)") from error
            if not text.strip() or (held_out and label is None):
                raise DataError(f"{path}:{number}: an example needs text, and a held-out one a label")
            yield text, label, truth, held_out


def private(rows: Sequence[Entry], task: Task) -> Private:
    """Texts by what they may be used for; what is kept as a label is a class index, or the answer where answers are texts.

    Raises:
        DataError: a label is not one of the task's.
    """
    if task.answer_tokens:
        return Private(
            labelled=tuple(Example(t, answer=label) for t, label, _, held_out in rows if label is not None and not held_out),
            unlabelled=tuple(t for t, label, _, held_out in rows if label is None and not held_out),
            truths=tuple(None for _, label, _, held_out in rows if label is None and not held_out),
            held_out=tuple(Example(t, answer=label) for t, label, _, held_out in rows if held_out),
        )
    labels = task.labels
    index: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    unknown = {name for row in rows for name in row[1:3] if name is not None and name not in index}
    if unknown:  # the label is told, the private text never
        known = ", ".join(labels)
        raise DataError(f"label {min(unknown)!r} is not one of this task's: {known}; add its texts again with one of these")
    training = [(text, label, truth) for text, label, truth, held_out in rows if not held_out]
    return Private(
        labelled=tuple(Example(text, index[label]) for text, label, _ in training if label is not None),
        unlabelled=tuple(text for text, label, _ in training if label is None),
        truths=tuple(index.get(truth) for _, label, truth in training if label is None),
        held_out=tuple(Example(text, index[label]) for text, label, _, held_out in rows if held_out),
    )
