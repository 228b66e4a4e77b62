import warnings

import pytest

from mas_embed.runtime.shown_warnings import warnings_as_sentences


def test_every_text_is_shown_once_and_other_categories_as_before(monkeypatch):
    shown, others = [], []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *args, **kwargs: others.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with warnings_as_sentences(shown.append):
            for _ in range(2):
                warnings.warn("a folder is empty", UserWarning, stacklevel=1)
            warnings.warn("another is too", UserWarning, stacklevel=1)
            warnings.warn("for programmers", FutureWarning, stacklevel=1)
        warnings.warn("afterwards", UserWarning, stacklevel=1)
    assert shown == ["a folder is empty", "another is too"] and others == ["for programmers", "afterwards"]


def test_warnings_that_are_errors_stay_errors():
    with pytest.raises(UserWarning, match="a folder"), warnings_as_sentences(print):
        warnings.warn("a folder is empty", UserWarning, stacklevel=1)
