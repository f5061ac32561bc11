"""Log lines with the special fields of Google Cloud Logging: `LOG_FORMAT=gcp`.

The agents of Cloud Run and GKE have no mapping: without `severity` each line is DEFAULT.
"""

import os
from typing import Any

#: Cloud Logging, "LogSeverity": the names that are Python's as well. Others are DEFAULT.
_SEVERITIES = frozenset({"debug", "info", "warning", "error", "critical"})
#: The fields of a request, and their names in Cloud Logging's `HttpRequest`.
_REQUEST = {
    "method": "requestMethod",
    "path": "requestUrl",
    "status": "status",
    "response_bytes": "responseSize",
    "client": "remoteIp",
}


def convert(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a line with Cloud Logging's names. Other fields keep theirs, such as `request_id`."""
    fields = dict(entry)
    level = fields.pop("level")
    fields["severity"] = level.upper() if level in _SEVERITIES else "DEFAULT"
    fields["time"] = fields.pop("timestamp")
    trace_id = fields.pop("trace_id", None)
    if trace_id:
        fields["logging.googleapis.com/trace"] = _trace_name(trace_id)
    span_id = fields.pop("span_id", None)
    if span_id:
        fields["logging.googleapis.com/spanId"] = span_id
    trace_flags = fields.pop("trace_flags", None)
    if trace_flags:
        fields["logging.googleapis.com/trace_sampled"] = trace_flags == "01"
    exception = fields.get("exception")
    if isinstance(exception, dict) and "traceback" in exception:
        # Error Reporting groups by it.
        fields["stack_trace"] = exception["traceback"]
    if fields.get("logger") == "access" and "duration_ms" in fields:
        fields["httpRequest"] = _request(fields)
    return fields


def _trace_name(trace_id: str) -> str:
    project = os.environ.get("GOOGLE_CLOUD_PROJECT")
    return f"projects/{project}/traces/{trace_id}" if project else trace_id


def _request(fields: dict[str, Any]) -> dict[str, Any]:
    """Move the fields of a request into an `HttpRequest`, whose sizes are texts."""
    request = {
        name: fields.pop(field) for field, name in _REQUEST.items() if fields.get(field) is not None
    }
    if "responseSize" in request:
        request["responseSize"] = str(request["responseSize"])
    request["latency"] = f"{fields['duration_ms'] / 1000:.6f}s"
    return request
