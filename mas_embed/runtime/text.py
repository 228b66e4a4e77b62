"""Text of unknown origin (file names, values of a config, messages of libraries) as one short line that is safe to print."""

from __future__ import annotations

import re

# Control characters, line separators, lone surrogates (bytes of a file name that are no UTF-8), and characters that change
# the direction of the text after them
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with characters that a terminal or a file cannot show, or would obey, as escapes such as `\x1b`.

    >>> print(printable("two" + chr(10) + "lines"))
    two\nlines
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, limit: int = 200) -> str:
    """The text, with its middle left out if it has more than `limit` characters.

    >>> shortened("0123456789" * 100, 15)
    '012345 ... 6789'
    """
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3 + 1
    return f"{text[: limit - 5 - tail]} ... {text[-tail:]}"
