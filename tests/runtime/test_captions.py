"""Captions are cleaned as the published model's were.

tests/golden/captions.json holds texts, what `clean_caption` of LlamaGen's language/t5.py makes of them, and
what `text_preprocessing` does, which is twice that. That class wrote it, run at commit 5a50452 without its
imports of torch and transformers, with ftfy 6.3.1 and beautifulsoup4 4.15.0. Each rule acts on a text there.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from ddexport.runtime import captions
from ddexport.runtime.captions import clean_caption
from ddexport.runtime.errors import BackendError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))


def test_the_published_results() -> None:
    assert len(GOLDEN) >= 30
    for text, once, twice in GOLDEN:
        assert clean_caption(text) == once, text
        assert clean_caption(once) == twice, text


@pytest.mark.parametrize("name", ["ADDRESSES", "PUNCTUATION", "WORDS"])
def test_each_rule_acts_on_one_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = getattr(captions, name)
    for left_out in rules:
        monkeypatch.setattr(captions, name, [rule for rule in rules if rule != left_out])
        assert any(clean_caption(text) != once for text, once, _ in GOLDEN), left_out


def test_a_prompt_that_looks_like_a_file_is_no_matter_for_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (clean_caption("/home/cats.html"), clean_caption("http://[")) == ("home cats. html", "")


@pytest.mark.parametrize("package", ["ftfy", "bs4"])
def test_what_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=package) as caught:
        clean_caption("a cat")
    assert 'pip install "ddexport[text]"' in caught.value.hint
