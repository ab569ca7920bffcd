"""Captions as the published text-to-image model was trained on them.

The rules are those of LlamaGen's `language/t5.py`, which has them from PixArt and DeepFloyd, in its order,
where neighbours are one if that changes nothing. They were made for captions from web pages, and take some
words of prompts too, such as Chinese ones. Their results count, not their sense: the model knows no others.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from urllib.parse import unquote_plus

from ddexport.runtime.errors import BackendError

Rules = Sequence[tuple[str, str]]

FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DOMAIN = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"

ADDRESSES: Rules = (
    ("<person>", "person"),  # a name that the data set hides; the next stage would take it for a tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),  # no more than a scheme and a domain
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),  # domains that the rule before has put together
)
PUNCTUATION: Rules = (
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters, and the blocks before them from the strokes on
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
     r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),  # dashes of all scripts
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # ends of article numbers
    (r"\\n", " "),  # a backslash and an n, not a line break
    (r"#(?:\d{1,3}|\d{5,})\b", ""),  # numbers behind #, but for those of four digits
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILE_TYPES})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)  # fmt: skip
WORDS: Rules = (
    # Article numbers: ab123, a1b, 1a2.
    (r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b", ""),
    # What shops and picture sites write.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # longer article numbers: 1a2b3c
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # Both ends. A blank there is stripped only behind these rules, and so can hide a mark from them.
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """The caption in lower case, without addresses, tags, file names and the like; it may become empty.

    The published code applies it twice: the second call finds what the first has uncovered. Raises
    BackendError if ftfy or Beautiful Soup are not installed.
    """
    text = _replaced(unquote_plus(text).strip().lower(), ADDRESSES)
    text = _replaced(_without_tags(text), PUNCTUATION)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(needed("ftfy").fix_text(text))).strip()
    return _replaced(text, WORDS).strip()


def needed(package: str) -> Any:
    """A module of the extra [text]. Raises BackendError if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(f"prompts need the package {package}", 'pip install "ddexport[text]"') from error


def _replaced(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_tags(text: str) -> str:
    comment = "" if "<" in text else "<!---->"  # else Beautiful Soup warns of what may be a file's name
    return str(needed("bs4").BeautifulSoup(comment + text, features="html.parser").text)
