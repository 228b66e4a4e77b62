"""Lists of items in CSV, JSON Lines and Parquet files, read line by line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.libraries import require_library
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import shortened

MOST_CHARACTERS = 10_000  # of a value in a list


def read_lines(
    path: Path, columns: Sequence[str], *, most_characters: int = MOST_CHARACTERS
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields for every line its location, such as "line 3 of list.csv", and its values by column; an empty value is "".

    Args:
        path: a JSON Lines file if the name ends in .jsonl or .ndjson, a Parquet file if it ends in .parquet, otherwise a CSV
            file with a line of column names. The lines of a Parquet file are its rows, counted from 1.
        columns: the required columns. A CSV or Parquet file must name them even if it has no other line.
        most_characters: the largest number of characters of a value.

    Raises:
        UserError: the file cannot be read, or a line lacks a column or has a value of too many characters; the message names
            the line.
    """
    check_regular_file(path, "the list")
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise UserError(
            f"{path} is a JSON file; give CSV, or JSON Lines (one object a line, in a file that ends in .jsonl)"
        )
    read = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet_rows}.get(suffix, _csv_lines)
    kind = "row" if suffix == ".parquet" else "line"
    try:
        for number, values in read(path, columns):
            where = f"{kind} {number} of {path}"
            _check_columns(values, columns, where)
            texts = {name: str(value).strip() for name, value in values.items() if name}
            _check_lengths(texts, where, most_characters)
            yield where, texts
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file in UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None


def _check_columns(values: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if values.get(column) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(columns)}")


def _check_lengths(texts: Mapping[str, str], where: str, most_characters: int) -> None:
    for name, text in texts.items():
        if len(text) > most_characters:
            raise UserError(
                f"{where} has {len(text):,} characters in the column {shortened(repr(name))}, but at most "
                f"{most_characters:,} are accepted"
            )


def _csv_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the number and the values of every line of a CSV file after the line of column names."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(dict.fromkeys(reader.fieldnames, ""), columns, f"line 1 of {path}")
            for values in reader:
                yield reader.line_num, values
        except csv.Error as error:
            raise UserError(f"line {reader.reader.line_num} of {path} is not valid CSV: {error}") from None


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the number and the values of every line of a JSON Lines file that is not empty."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, an integer of thousands of digits, or nested too deeply
                values = None
            if not isinstance(values, dict) or not _are_plain(values):
                example = ", ".join(f"'{column}': ..." for column in columns)
                raise UserError(f"line {number} of {path} must be a JSON object of plain values such as {{{example}}}")
            yield number, _without_none(values)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the number and the values of every row of a Parquet file."""
    pyarrow = require_library("pyarrow", extra="parquet")
    parquet = require_library("pyarrow.parquet", extra="parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(dict.fromkeys(file.schema_arrow.names, ""), columns, str(path))
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    if not _are_plain(values):
                        raise UserError(f"row {number} of {path} must have plain values, no lists and no structures")
                    yield number, _without_none(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {reason_of(error)}") from None


def _are_plain(values: Mapping[str, Any]) -> bool:
    return not any(isinstance(value, list | dict) for value in values.values())


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in values.items()}
