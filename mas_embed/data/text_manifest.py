"""Lists of labelled texts as a sequence of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mas_embed.data.learned import LearnedSplits
from mas_embed.data.manifest_lines import ManifestLine, check_ids, group_by_split, read_manifest, shown
from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import DATASETS, Part, Split, SplitSequence, missing_split
from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number

MOST_CHARACTERS = 100_000  # of a text


@DATASETS.register("text_manifest")
def text_manifest(
    *,
    path: str | Path,
    splits: list[str] | None = None,
    held_out: HeldOut = "test",
    seed: int = 0,
    learned: LearnedSplits | None = None,
) -> SplitSequence:
    """Labelled texts from a CSV, JSON Lines or Parquet file with one text on each line.

    The format is recognised by the end of the name: .jsonl or .ndjson, .parquet (with the extra `parquet`), and CSV for all
    others. Columns with other names than these are ignored:

    - `text` and `label`, required. Texts with the same label are of one class, also in different splits.
    - `split`: the name of the split of the text. Without this column, all texts are in one split with the name "all".
    - `part`: "train", "validation" or "test". Without this column, a quarter of the texts of every class of a split is drawn
      for testing, and a fifth of the others for validation.
    - `id`: identifies a text that is listed in several splits, so that as a query it does not find itself. Lines with the same
      id must be in different splits, and in the same part.

    The held-out texts are both queries and gallery.

    Args:
        path: of the file.
        splits: the names of the splits in the order in which they are learned; splits that are not named are left out. None
            takes all splits in the order of their first lines.
        held_out: the texts on which the splits are evaluated: "test" for reported results, "validation" for choosing options.
            The other ones are not used.
        seed: of the random division of texts without a part.
        learned: splits that were learned before and whose data may be gone, see `LearnedSplits`; a run that is resumed gives it.

    Returns:
        The splits. The inputs are lists of str. Labels are numbered from 0 in the order of their first lines, split by split,
        and `label_names` has their names.

    Raises:
        UserError: the file cannot be read, a line lacks a value or has one that is not accepted (the message names the line),
            or a split does not exist, or has no text to train on or to hold out.
    """
    path = Path(path)
    check_held_out(held_out)
    seed = as_whole_number("seed", seed, 0)
    learned = LearnedSplits() if learned is None else learned
    lines_by_split = group_by_split(
        read_manifest(path, "text", most_characters=MOST_CHARACTERS), splits, path, learned.names
    )
    check_ids(line for lines in lines_by_split.values() for line in lines)
    labels: dict[str, int] = learned.numbers()
    ids: dict[str, int] = {}
    sequence = []
    for name, lines in lines_by_split.items():
        if not lines:
            sequence.append(missing_split(name))
            continue
        label_numbers = torch.tensor([labels.setdefault(line.label, len(labels)) for line in lines])
        # A location that ends with a space equals no id
        id_numbers = torch.tensor([ids.setdefault(line.id or f"{line.where} ", len(ids)) for line in lines])
        train, evaluated = _divide(lines, label_numbers, held_out, seed)
        for part, positions in (("train", train), (held_out, evaluated)):
            if len(positions) == 0:
                raise UserError(f"{path} has no text of the part '{part}' in the split '{shown(name)}'; add some")
        texts = [line.value for line in lines]
        held = _select(texts, label_numbers, id_numbers, evaluated)
        sequence.append(Split(name, _select(texts, label_numbers, id_numbers, train), query=held, gallery=held))
    return SplitSequence(sequence, label_names={name: [number] for name, number in labels.items()})


def _divide(lines: Sequence[ManifestLine], labels: Tensor, held_out: HeldOut, seed: int) -> tuple[Tensor, Tensor]:
    """The positions of the training texts and of the held-out texts of a split."""
    if not lines[0].part:
        return partition(labels, held_out, seed)
    train, evaluated = (
        torch.tensor([position for position, line in enumerate(lines) if line.part == part], dtype=torch.long)
        for part in ("train", held_out)
    )
    return train, evaluated


def _select(texts: Sequence[str], labels: Tensor, ids: Tensor, positions: Tensor) -> Part:
    return Part([texts[position] for position in positions.tolist()], labels[positions], ids[positions])
