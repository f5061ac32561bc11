"""Documents, comments, docstrings and messages follow the style of CONTRIBUTING.md."""

import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT, SOURCE, tracked

MAX_WORDS = 35
DIRECTORIES = (
    f"{SOURCE}/app/",
    f"{SOURCE}/scripts/",
    f"{SOURCE}/labs/",
    "hooks/",
    "scripts/",
    "benchmarks/",
)
DOCUMENTS = [
    name
    for name in tracked()
    if re.fullmatch(r"((docs|benchmarks)/(workshop/)?)?[\w-]+\.md", name.removeprefix(f"{SOURCE}/"))
]
CODE = [
    *(name for name in tracked() if name.startswith(DIRECTORIES) and name.endswith(".py")),
    f"{SOURCE}/gunicorn.conf.py",
    f"{SOURCE}/Makefile",
    "Makefile",
]
#: Each pattern with the term to use instead, as in the glossary of CONTRIBUTING.md.
TERMS = {
    r"whoever": "callers, clients, operators",
    r"(any|every|some)body": "callers, clients, operators",
    r"anew": "again",
    r"beside": "alongside, next to, in the background",
    r"belongs? into": "belongs in",
    r"(is|are|was|were|be) told|told from": "is signaled, is notified; distinguished from",
    r"(says|tells) (so|why|how|what|which|whether)": "reports, shows",
    r"throw-?away": "temporary",
    r"stands? in(?! for)": "is in",
    r"(hold|holds|held) \w+( \w+)? against|held against": "validate against",
    r"mend(s|ed|ing)?": "fix",
    # `make parked` keeps its name.
    r"park(s|ing)?|(?<!make )(?<!PHONY: )(?<!scripts[./])parked(?!:)": "dead-letter",
    r"tried again": "retried",
    r"folders?": "directory",
    r"(is|are|was|were|goes|went) away": "unavailable, down",
    r"freezes|(a|the) frozen|frozen (server|process|pod|Postgres|Redis|one)": "hang, hung",
    r"quick end": "quick shutdown",
    r"heads|head and body|(request|response) head": "headers",
    r"for so (many|long)|so many (whole )?seconds": "a number, a duration",
    r"for ever": "forever",
    r"behaviour|colour|honour\w*|misspelt|\w+(organ|initial|serial|real|recogn)is(e|ed|es|ation)": (
        "American spelling"
    ),
}
#: Only messages: elsewhere something may take time.
MESSAGE_TERMS = {r"(?<=: )takes": "must be"}
#: Only the service: cookiecutter's questions have answers, and teams have people.
SERVICE_TERMS = {r"answer(s|ed|ing)?": "response", r"who(?! may call)": "that"}
#: The pages of the workshop have one heading that is a question; README.md has "Who may call".
HEADING = re.compile(r"\"\"\"(What|Who)\b|#+ (?!What the template does$|Who may call$)(What|Who)\b")


def prose(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of prose in a file: all but code, with their numbers."""
    if name.endswith(".py"):
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in kinds:
                for number, line in enumerate(token.string.split("\n"), token.start[0]):
                    yield number, re.sub(r"`[^`]*`", "`code`", line)
        return
    is_prose = True
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```") or re.fullmatch(r"<!-- prose: (on|off) -->", line):
            is_prose = not is_prose
        elif is_prose:
            shown = re.sub(r"<!--.*?-->|\]\([^)]*\)", "", line)
            yield number, re.sub(r"`[^`]*`", "`code`", shown)


def forbidden_words(name: str, text: str) -> Iterator[str]:
    """Yield each word that the glossary replaces."""
    terms = TERMS | (MESSAGE_TERMS if name.endswith(".py") else {})
    if name.startswith(SOURCE):
        terms |= SERVICE_TERMS
    for number, line in prose(name, text):
        for pattern, term in terms.items():
            for match in re.finditer(rf"\b({pattern})\b", line, re.IGNORECASE):
                yield f"{name}:{number}: {match.group()} -> {term}"
        if heading := HEADING.match(line):
            yield f"{name}:{number}: {heading.group()} -> a noun phrase or an imperative"


def blocks(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield paragraphs, list items and table cells with the numbers of their first lines."""
    start = 0
    block = ""
    for number, line in [*prose(name, text), (0, "")]:
        is_table = line.startswith("|")
        is_blank = not line.strip()
        if is_blank or is_table or re.match(r"\s*([-*]|\d+\.) |#", line):
            yield start, block
            block = ""
        if is_table:
            yield from ((number, cell) for cell in line.split("|"))
        elif not is_blank:
            start = start if block else number
            block += f" {line.strip()}"


def long_sentences(name: str, text: str) -> Iterator[str]:
    """Yield each sentence with too many words."""
    for number, block in blocks(name, text):
        for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"[*_)\"]+(?=\s|$)", "", block)):
            words = re.findall(r"\S*\w\S*", sentence)
            if len(words) > MAX_WORDS:
                yield f"{name}:{number}: {len(words)} words: {' '.join(words[:6])} ..."


@pytest.mark.parametrize("name", DOCUMENTS + CODE)
def test_glossary_terms_are_used(name: str) -> None:
    assert list(forbidden_words(name, (ROOT / name).read_text())) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short(name: str) -> None:
    assert list(long_sentences(name, (ROOT / name).read_text())) == []


def test_files_are_found() -> None:
    assert {"README.md", "docs/updating.md", f"{SOURCE}/docs/tuning.md"} <= set(DOCUMENTS)
    assert {f"{SOURCE}/app/web/limits.py", "hooks/pre_gen_project.py", "Makefile"} <= set(CODE)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.md", "One.\n\nIt is made anew.\n", "a.md:3: anew -> again"),
        ("a.md", "## What you get\n", "a.md:1: ## What -> a noun phrase or an imperative"),
        ("a.py", '"""Ports.\n\nWhoever asks.\n"""\n', "a.py:3: Whoever -> callers, clients, "),
        ("a.py", "x = 1\n# in a folder\n", "a.py:2: folder -> directory"),
        ("a.py", 'raise ValueError(f"{x}: takes {y}")\n', "a.py:1: takes -> must be"),
        (f"{SOURCE}/a.py", 'log("no answer")\n', f"{SOURCE}/a.py:1: answer -> response"),
    ],
)
def test_planted_word_is_found(name: str, text: str, found: str) -> None:
    (violation,) = forbidden_words(name, text)
    assert violation.startswith(found)


def test_code_is_no_prose() -> None:
    assert list(forbidden_words("a.md", "```sh\nanew\n```\n`folder` [x](folder.md)\n")) == []
    assert list(forbidden_words("a.py", "folder = beside\n# the function `anew`\n")) == []


@pytest.mark.parametrize("mark", ["", "- ", "1. ", "> "])
def test_planted_long_sentence_is_found(mark: str) -> None:
    words = mark + "word " * MAX_WORDS
    assert list(long_sentences("a.md", f"One.\n\n{words}\n\n{words}. New.\n")) == []
    (violation,) = long_sentences("a.md", f"One.\n\n{words}\n  word. Two.\n")
    assert violation.startswith("a.md:3: ")


def test_planted_long_cell_is_found() -> None:
    words = "word " * MAX_WORDS
    assert list(long_sentences("a.md", f"| {words} | {words} |\n")) == []
    assert list(long_sentences("a.md", f"| {words} word | {words} |\n")) != []
