"""An application that a team wraps in another, on the real server.

The ASGI specification: an application is a callable with `scope`, `receive` and `send`. It has no
other attribute, and does not have to be a coroutine function.
"""

import pytest

from tests.service_process import DEADLINE_SECONDS, eventually, serving


def test_wrapped_application_is_served_and_shuts_down() -> None:
    """python-socketio's documentation: `app = socketio.ASGIApp(sio, other_asgi_app)`."""
    with serving("tests.fault_routes:wrapped", WEB_CONCURRENCY="1") as service:
        service.wait("/health/live")
        response = service.get("/nowhere")
        assert response.status_code == 404
        request_id = response.headers["x-request-id"]
        eventually(lambda: request_id in service.text)
        assert service.get("/health/ready").json()["status"] == "not_ready"
        assert service.stop() == 0
        assert "atexit ran" in service.messages


@pytest.mark.parametrize("name", ["broken", "logger"])
def test_application_that_cannot_start_ends_the_service(name: str) -> None:
    """The ASGI specification, "Lifespan Protocol": a failed start may end the server."""
    with serving(f"tests.fault_routes:{name}", WEB_CONCURRENCY="1") as service:
        assert service.process.wait(DEADLINE_SECONDS) != 0
        started = [each for each in service.text.splitlines() if "Booting worker" in each]
        assert len(started) <= 1


def test_wrapper_that_keeps_the_lifespan_ends_the_service() -> None:
    """The ASGI specification, "Lifespan State": without it there is no database, nor readiness."""
    with serving("tests.fault_routes:separate", WEB_CONCURRENCY="1") as service:
        assert service.process.wait(DEADLINE_SECONDS) != 0
        expected = "lifespan did not run: what wraps the service must pass `lifespan` on"
        assert service.messages.count(expected) == 1
        assert "Traceback" not in service.text
