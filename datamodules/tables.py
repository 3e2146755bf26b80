"""Read one of ISIC's tables: a file of unknown origin in, checked ids and numbers out."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rl4med_ddpo.foundation.errors import UserError, name_few

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
DOWNSAMPLED = "_downsampled"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?=.{{1,200}}$){_PART}(?:/{_PART})*")
"""Names of folders below the images' folder, and of the file: none leads up or out."""


def read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read the ids and some columns of a table that has an `image` column.

    Commas or semicolons, LF or CRLF, with or without a byte order mark.

    Args:
        path: A CSV file with a header line.
        columns: Names of further columns to read.

    Returns:
        One row for each row of the file, in its order: `line` (the line in the file), `stem` (the
        image file's name without its ending), `id` (the stem without `_downsampled`), and the
        columns as text.

    Raises:
        UserError: if the file is no such table, or if an id or a column is malformed or given
            twice.
    """
    header, lines, rows = _parse(path, _read_text(path))
    if twice := [name for name in ("image", *columns) if header.count(name) > 1]:
        raise UserError(
            f"{path} has several columns named {name_few(twice)}, and nothing says which one is "
            "meant.\n  Rename or remove all but one."
        )
    missing = [name for name in ("image", *columns) if name not in header]
    if missing:
        raise UserError(
            f"{path} has no column {name_few(missing)}.\n"
            f"  It has: {', '.join(name or '(unnamed)' for name in header)}\n"
            f"  Needed: {', '.join(('image', *columns))}\n"
            "  Is it the right file, in its original form?"
        )
    cells = {name: [row[header.index(name)] for row in rows] for name in ("image", *columns)}
    names = cells.pop("image")
    stems = [_stem(name) for name in names]
    malformed = [(i, n) for i, n, s in zip(lines, names, stems, strict=True) if not _is_id(s)]
    if malformed:
        shown = [f"{name[:100]!r} in line {line}" for line, name in malformed]
        raise UserError(
            f"{path}: {len(malformed):,} image id(s) are malformed: {name_few(shown)}.\n"
            "  An id is the file's name, after the folders below the images' folder if there are\n"
            "  any: like ISIC_0000000 or site-1/scan.001, at most 200 letters, digits, _, - and\n"
            "  dots, and no part of it begins with a dot or a hyphen.\n"
            "  Nothing was opened under these names. Correct or remove the lines."
        )
    ids = [stem.removesuffix(DOWNSAMPLED) for stem in stems]
    frame = pd.DataFrame({"line": lines, "stem": stems, "id": ids, **cells})
    twice = frame[frame["id"].duplicated(keep=False)].sort_values(["id", "line"])
    if len(twice):
        shown = [
            f"{i} in lines {', '.join(map(str, group))}" for i, group in twice.groupby("id")["line"]
        ]
        raise UserError(
            f"{path}: {len(shown):,} image id(s) are given twice (the ending {DOWNSAMPLED!r} does "
            f"not count): {name_few(shown)}.\n  Keep one line for each image."
        )
    return frame


def to_numbers(
    frame: pd.DataFrame, columns: Sequence[str], path: Path, labels_only: bool = False
) -> pd.DataFrame:
    """Turn text columns of `read_table` into numbers in [0, 1].

    Args:
        frame: What `read_table` returned for `path`.
        columns: The columns to turn.
        path: The table's file, for the error message.
        labels_only: Accept 0 and 1 only, and no probability in between.

    Raises:
        UserError: if a cell holds anything else, such as NaN or 1.2.
    """
    numbers = frame[list(columns)].apply(pd.to_numeric, errors="coerce")
    valid = numbers.isin([0, 1]) if labels_only else (numbers >= 0) & (numbers <= 1)
    bad = [
        f"{name} of {frame['id'][row]} is {frame[name][row]!r} in line {frame['line'][row]}"
        for name in columns
        for row in frame.index[~valid[name]]
    ]
    if bad:
        allowed = "labels (0 or 1)" if labels_only else "labels (0 or 1) or probabilities (0 to 1)"
        raise UserError(
            f"{path}: {len(bad):,} value(s) are not {allowed}: {name_few(bad)}.\n"
            "  Correct the values, or remove these lines."
        )
    return frame.assign(**{name: numbers[name].astype(float) for name in columns})


def _stem(name: str) -> str:
    suffix = next((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def _is_id(stem: str) -> bool:
    return _ID.fullmatch(stem) is not None and stem != DOWNSAMPLED


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise UserError(f"cannot read the table {path}: {cause.strerror}.") from cause
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(
            f"{path} is no CSV text: line {line} holds a null byte.\n"
            "  A spreadsheet or an archive? Save it as CSV in UTF-8."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise UserError(f"{path} is no UTF-8 text: {cause}.\n  Save it as CSV in UTF-8.") from cause
    if not text.strip():
        raise UserError(f"{path} is empty. Download it again.")
    if text.lstrip().startswith("<"):
        raise UserError(
            f"{path} is a web page (HTML) that was saved under the name of a table.\n"
            "  Download the file itself: log in where that is asked, or take the 'raw' link."
        )
    if text.startswith("version https://git-lfs"):
        raise UserError(
            f"{path} is a git-LFS pointer, not the table that it points to.\n"
            "  Run `git lfs pull` in the repository that it comes from, and copy it again."
        )
    return text


def _parse(path: Path, text: str) -> tuple[list[str], list[int], list[list[str]]]:
    first = text.lstrip().splitlines()[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=";" if first.count(";") > first.count(",") else ","
    )
    try:
        numbered = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as cause:
        raise UserError(f"{path}: line {reader.line_num} is no CSV: {cause}.") from cause
    if len(numbered) < 2:
        raise UserError(f"{path} is empty: it has no row below its header. Download it again.")
    (_, header), *body = numbered
    ragged = [f"line {line} has {len(row)}" for line, row in body if len(row) != len(header)]
    if ragged:
        raise UserError(
            f"{path}: {len(ragged):,} row(s) do not have the {len(header)} cells of the header: "
            f"{name_few(ragged)}.\n  Was the download cut off? Download it again."
        )
    return header, [line for line, _ in body], [row for _, row in body]
