"""A test of the contract of data sets."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mas_embed.data import FIRST_FREE_ID, Part, Split, check_splits
from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.seeding import seeded
from mas_embed.training import training_batches

Factory = Callable[..., Sequence[Split]]
PARTS = ("train", "query", "gallery")
_BATCH_SIZE = 4


def check_dataset(factory: Factory, *, has_duplicates: bool = False) -> None:
    """Raises `AssertionError` if a data set violates the contract of data sets; the message names the violated rule.

    Reads every item several times, so give a small copy of large data. The rules:

    - It returns splits that `check_splits` accepts, with labels >= 0.
    - The same options give the same splits, whatever the state of the global random generators.
    - The clean view of a part is the same each time that it is read. Its items, and those of the training view if there is one,
      can be put together in batches, also by a worker process, which gives the same batches; parts can be pickled.
    - An id stands for one input. No held-out item is trained on, in any split.
    - With an option `held_out`: "test" and "validation" give splits of the same names, and held-out items that differ. No test
      item is trained on under "validation". (Published protocols train on the validation items under "test".) Any other word is
      refused.

    Items are compared by ids where the data set gives any, and by their values.

    Args:
        factory: `(**options) -> splits`: the function that is registered, or `functools.partial(image_folder, root=...)`. All
            its options but `held_out` must have values.
        has_duplicates: whether different items may have equal values, so that only their ids are compared.

    Examples:
        >>> from mas_embed import digits
        >>> check_dataset(digits)
    """
    splits = _made(factory)
    for split in splits:
        for name in PARTS:
            _check_views(getattr(split, name), f"{name} of split '{split.name}'")
    _check_is_deterministic(factory, splits)
    for split in splits:
        _check_batches(split.train, f"train of split '{split.name}'")
    described = _describe(splits)
    _check_ids(described)
    _check_is_held_out(described, described, has_duplicates, "held-out items must not be trained on")
    if "held_out" in inspect.signature(factory).parameters:
        _check_held_out_parts(factory, has_duplicates)


def _made(factory: Factory, **options: Any) -> Sequence[Split]:
    splits = factory(**options)
    try:
        check_splits(splits)
    except UserError as error:
        raise AssertionError(f"a data set must return splits that can be trained on: {error}") from None
    for split in splits:
        for name in PARTS:
            smallest = int(getattr(split, name).labels.min())
            assert smallest >= 0, f"labels must be at least 0, but {name} of split '{split.name}' has {smallest}"
    return splits


def _check_is_deterministic(factory: Factory, splits: Sequence[Split]) -> None:
    with seeded(1):
        again = _made(factory)
    names = [split.name for split in splits]
    assert names == [split.name for split in again], (
        "the same options must give splits of the same names in the same order"
    )
    for one, other in zip(splits, again, strict=True):
        for name in PARTS:
            first, second = getattr(one, name), getattr(other, name)
            is_same = torch.equal(first.labels, second.labels) and _hashes(first.inputs) == _hashes(second.inputs)
            has_ids = int(first.ids.min()) < FIRST_FREE_ID
            assert is_same and (not has_ids or torch.equal(first.ids, second.ids)), (
                f"the same options must give the same items, whatever the state of the global random generators; {name} of split "
                f"'{one.name}' differs"
            )


def _check_views(part: Part, where: str) -> None:
    assert _hashes(part.inputs) == _hashes(part.inputs), (
        f"the clean view must be the same each time it is read, but {where} changes; give random changes as Part(augmented=...)"
    )
    for index in (0, len(part) - 1):
        item, label = part[index]
        is_item = label == int(part.labels[index]) and _hash(item) == _hash(part.inputs[index])
        assert is_item, f"item i of a part must be (inputs[i], labels[i]), but item {index} of {where} is not"


def _check_batches(part: Part, where: str) -> None:
    """Batches of both views, of this process and of a worker."""
    for view in ("clean", "training"):
        batches = {}
        for num_workers in (0, 1):
            try:
                batches[num_workers] = _batches(part, view, num_workers)
            except Exception as error:
                by_worker = " by a worker process" if num_workers else ""
                raise AssertionError(
                    f"the items of a part must be put together in batches{by_worker}, but those of the {view} view of {where} "
                    f"are not: {reason_of(error)}"
                ) from error
        assert batches[0] == batches[1], (
            f"a worker process must give the same batches, but those of the {view} view of {where} differ; draw from the global "
            "generators of Python, NumPy and torch only"
        )
    try:
        copied = pickle.loads(pickle.dumps(part))  # noqa: S301  (its own bytes)
    except Exception as error:
        raise AssertionError(
            f"a part must be picklable, for worker processes that are not forked, but {where} is not: {reason_of(error)}"
        ) from error
    assert _hashes(copied.inputs) == _hashes(part.inputs), (
        f"a pickled part must have the same inputs, but {where} changes"
    )


def _batches(part: Part, view: Any, num_workers: int) -> list[str]:
    with seeded(0):
        generator = torch.Generator().manual_seed(0)
        loader = training_batches(part, batch_size=_BATCH_SIZE, view=view, num_workers=num_workers, generator=generator)
        return [_hash(batch) for batch in loader]


_Items = dict[str, tuple[list[int], list[str]]]  # ids (empty if none were given) and hashes of "train" and "held out"


def _describe(splits: Sequence[Split]) -> _Items:
    described = {}
    for kind, names in {"train": ("train",), "held out": ("query", "gallery")}.items():
        parts = [getattr(split, name) for split in splits for name in names]
        ids = [number for part in parts for number in part.ids.tolist()]
        described[kind] = (ids, [value for part in parts for value in _hashes(part.inputs)])
    return described


def _check_ids(described: _Items) -> None:
    values: dict[int, str] = {}
    for ids, hashes in described.values():
        for number, value in zip(ids, hashes, strict=True):
            assert values.setdefault(number, value) == value, (
                f"an id must stand for one input in all parts, but id {number} stands for two; number the items of the whole "
                "data set, or give no ids"
            )


def _check_is_held_out(one: _Items, other: _Items, has_duplicates: bool, rule: str, kind: str = "train") -> None:
    """The items that `one` holds out are none of a kind of items of `other`."""
    (ids, hashes), (other_ids, other_hashes) = one["held out"], other[kind]
    # With its values, as another option may number the items otherwise
    items = {(number, value) for number, value in zip(ids, hashes, strict=True) if number < FIRST_FREE_ID}
    shared = items & set(zip(other_ids, other_hashes, strict=True))
    assert not shared, f"{rule}, but {len(shared)} are, such as that with id {min(shared, default=(0, ''))[0]}"
    num_equal = 0 if has_duplicates else len(set(hashes) & set(other_hashes))
    assert not num_equal, (
        f"{rule}, but {num_equal} have the values of such an item; if the data holds equal items, give each an id and pass "
        "has_duplicates=True"
    )


def _check_held_out_parts(factory: Factory, has_duplicates: bool) -> None:
    splits = {word: _made(factory, held_out=word) for word in ("test", "validation")}
    names = {word: [split.name for split in made] for word, made in splits.items()}
    assert names["test"] == names["validation"], "held_out must not change the names and the order of the splits"
    described = {word: _describe(made) for word, made in splits.items()}
    test, validation = described["test"], described["validation"]
    rule = "what is held out for testing must not be held out for validation"
    _check_is_held_out(test, validation, has_duplicates, rule, kind="held out")
    _check_is_held_out(
        test, validation, has_duplicates, "test items must not be trained on under held_out='validation'"
    )
    try:
        factory(held_out="neither")
    except ValueError:
        return
    raise AssertionError("held_out must be 'test' or 'validation', but another word is accepted; raise a UserError")


def _hashes(inputs: Any) -> list[str]:
    return [_hash(inputs[index]) for index in range(len(inputs))]


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """The bytes that a value is made of, with types and shapes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield f"{key}:".encode()
            yield from _pieces(value[key])
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for inner in value:
            yield from _pieces(inner)
    else:
        yield f"{value!r};".encode(errors="surrogatepass")
