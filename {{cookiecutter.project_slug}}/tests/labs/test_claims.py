"""A lab proves something only if its claim holds and its control fails."""

import pytest

from labs.claims import Claims


def test_claim_and_control_hold() -> None:
    claims = Claims()
    claims.claim("0 lost", True)
    claims.control("30 lost", True)
    assert claims.hold
    assert claims.text == "claim held: 0 lost\ncontrol failed as it must: 30 lost"


@pytest.mark.parametrize(
    ("claim", "control", "text"),
    [(False, True, "CLAIM BROKEN: a"), (True, False, "CONTROL DID NOT FAIL: b")],
)
def test_broken_one_is_named(claim: bool, control: bool, text: str) -> None:
    claims = Claims()
    claims.claim("a", claim)
    claims.control("b", control)
    assert not claims.hold
    assert text in claims.lines


def test_claim_without_a_control_proves_nothing() -> None:
    claims = Claims()
    claims.claim("a", True)
    assert not claims.hold


def test_control_without_a_claim_proves_nothing() -> None:
    claims = Claims()
    claims.control("a", True)
    assert not claims.hold
