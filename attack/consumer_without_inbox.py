"""The control: a consumer without an inbox or a check of the status settles some twice."""

from typing import Any

from app.payments import consumer, repository

get = repository.get


async def get_as_pending(*arguments: Any) -> Any:
    """Return a payment as it was when it was created."""
    found = await get(*arguments)
    if found is None:
        return None
    payment, request_id = found
    return payment.model_copy(update={"status": "pending"}), request_id


# A message is settled whether or not it was recorded before.
settle = repository._SETTLE.replace(" and exists (select from claimed)", "")
assert settle != repository._SETTLE
repository._SETTLE = settle
repository.get = get_as_pending  # type: ignore[assignment]

if __name__ == "__main__":
    consumer.main()
