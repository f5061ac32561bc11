"""The names of a feature: plural and singular, valid in Python, in Postgres and in a URL."""

import keyword
import re
from typing import NamedTuple

RULE = "must be lower-case words joined by underscores, for example orders or line_items"
#: The names of constraints fit the 63 bytes of Postgres, and lines of code fit 100 columns.
MAX_CHARACTERS = 30
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
#: Paths of the application itself, and the root of its modules.
TAKEN = frozenset(["app", "docs", "health", "redoc"])
#: Plurals that do not follow the rules below.
IRREGULAR = {
    "aliases": "alias",
    "bonuses": "bonus",
    "caches": "cache",
    "children": "child",
    "cookies": "cookie",
    "movies": "movie",
    "people": "person",
    "statuses": "status",
}
#: Reserved words of Postgres 18: `select word from pg_get_keywords() where catcode in ('R', 'T')`.
_RESERVED = """
all analyse analyze and any array as asc asymmetric authorization binary both case cast check
collate collation column concurrently constraint create cross current_catalog current_date
current_role current_schema current_time current_timestamp current_user default deferrable desc
distinct do else end except false fetch for foreign freeze from full grant group having ilike in
initially inner intersect into is isnull join lateral leading left like limit localtime
localtimestamp natural not notnull null offset on only or order outer overlaps placing primary
references returning right select session_user similar some symmetric system_user table
tablesample then to trailing true union unique user using variadic verbose when where window
with
"""
POSTGRES_RESERVED = frozenset(_RESERVED.split())


class InvalidNameError(ValueError):
    """A name that no feature can have. The message is one line, with the name."""


class Names(NamedTuple):
    """The names of a feature."""

    plural: str
    singular: str

    @property
    def class_name(self) -> str:
        """The singular as the name of a class."""
        return "".join(word.capitalize() for word in self.singular.split("_"))


def parse(plural: str, singular: str = "") -> Names:
    """Return the names of a feature. Raises `InvalidNameError`."""
    _check("N", plural)
    if plural in TAKEN:
        _reject("N", plural, "is a name of the application itself; choose another one")
    if keyword.iskeyword(plural):
        _reject("N", plural, "is a keyword of Python; choose another one")
    if plural in POSTGRES_RESERVED:
        _reject("N", plural, "is reserved in Postgres; choose another one")
    if singular:
        _check("S", singular)
    else:
        singular = _singular(plural)
    names = Names(plural, singular)
    if keyword.iskeyword(names.class_name):
        _reject("S", singular, "is a keyword of Python; choose another one")
    return names


def _check(variable: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        _reject(variable, name, RULE)
    if len(name) > MAX_CHARACTERS:
        limit = f"at most {MAX_CHARACTERS}, for the names of constraints in Postgres"
        _reject(variable, name, f"has {len(name)} characters, must have {limit}")


def _reject(variable: str, name: str, problem: str) -> None:
    raise InvalidNameError(f"{variable}={ascii(name)[1:-1]}: {problem}")


def _singular(plural: str) -> str:
    """Return the singular by the rules of English. Raises `InvalidNameError` if none applies."""
    start, separator, word = plural.rpartition("_")
    return start + separator + _singular_word(word, plural)


def _singular_word(word: str, plural: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 1:
        return word[:-1]
    problem = f"its singular is not known; add it, for example make feature N={plural} S=person"
    raise InvalidNameError(f"N={plural}: {problem}")
