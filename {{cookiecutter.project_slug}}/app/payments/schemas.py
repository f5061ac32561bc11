"""Request and response bodies of the payments routes."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

#: ISO 4217, list one: active currencies, funds and precious metals, and the codes for tests.
_ISO_4217 = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD
CDF CHE CHF CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL
GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW
KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD
NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP
SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS
VED VES VND VUV WST XAD XAF XAG XAU XBA XBB XBC XBD XCD XCG XDR XOF XPD XPF XPT XSU XTS XUA XXX YER
ZAR ZMW ZWG
"""
CURRENCIES = frozenset(_ISO_4217.split())


def _check_currency(value: str) -> str:
    if value not in CURRENCIES:
        msg = "must be an ISO 4217 code, for example EUR"
        raise ValueError(msg)
    return value


def _check_printable(value: str) -> str:
    if not value.isprintable():
        msg = "must consist of printable characters"
        raise ValueError(msg)
    return value


#: In the minor unit of the currency, such as cents. It fits a bigint.
Amount = Annotated[int, Field(strict=True, gt=0, lt=2**63, examples=[1250])]
Currency = Annotated[
    str, Field(json_schema_extra={"enum": sorted(CURRENCIES)}), AfterValidator(_check_currency)
]
Reference = Annotated[
    str, Field(min_length=1, max_length=64, examples=["order-1"]), AfterValidator(_check_printable)
]


class NewPayment(BaseModel):
    """A requested payment. `amount` is in the minor unit of the currency."""

    model_config = ConfigDict(extra="forbid")

    amount: Amount
    currency: Currency
    reference: Reference


class Payment(BaseModel):
    """A stored payment."""

    payment_id: UUID
    amount: int
    currency: str
    reference: str
    status: Literal["pending", "settled"]
    created_at: datetime


class Total(BaseModel):
    """Payments of one currency and status: their number, and their sum in the minor unit."""

    currency: str
    status: Literal["pending", "settled"]
    payments: int
    amount: int


class Totals(BaseModel):
    """The payments of the last 24 hours."""

    items: list[Total]


class Page(BaseModel):
    """Payments, newest first. `next_cursor` is null on the last page."""

    items: list[Payment]
    next_cursor: str | None
