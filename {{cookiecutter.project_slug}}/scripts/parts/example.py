"""The payments example: what `make remove-example` removes, or edits."""

#: Its name in messages.
TITLE = "the example"
#: The parts that need this one, and are removed with it.
ALONG = ()
#: The directories that have no files but these.
DIRECTORIES = [
    "app/patterns",
    "app/payments",
    "deploy/k8s/components/consumer",
    "deploy/k8s/components/gateway-egress",
    "tests/patterns",
    "tests/payments",
]
PATHS = [
    "app/patterns/__init__.py",
    "app/patterns/cache_aside.py",
    "app/patterns/circuit_breaker.py",
    "app/patterns/fail_open.py",
    "app/patterns/http_client.py",
    "app/patterns/idempotency.py",
    "app/patterns/inbox.py",
    "app/patterns/outbox.py",
    "app/patterns/pagination.py",
    "app/patterns/periodic.py",
    "app/patterns/rate_limit.py",
    "app/patterns/schedule.py",
    "app/patterns/stream_consumer.py",
    "app/patterns/stream_group.py",
    "app/patterns/stream_handler.py",
    "app/payments/__init__.py",
    "app/payments/consumer.py",
    "app/payments/events.py",
    "app/payments/gateway.py",
    "app/payments/repository.py",
    "app/payments/router.py",
    "app/payments/schemas.py",
    "app/payments/service.py",
    "deploy/k8s/components/consumer/deployment.yaml",
    "deploy/k8s/components/consumer/kustomization.yaml",
    "deploy/k8s/components/consumer/service.yaml",
    "deploy/k8s/components/gateway-egress/kustomization.yaml",
    "deploy/k8s/components/gateway-egress/networkpolicy.yaml",
    "deploy/k8s/components/prometheusrule/payments.yaml",
    "deploy/observe/grafana/dashboards/payments.json",
    "deploy/observe/prometheus/rules/payments.yaml",
    "deploy/observe/prometheus/tests/payments.yaml",
    "migrations/versions/0001_payments.py",
    "migrations/versions/0002_patterns.py",
    "migrations/versions/0002b_outbox_traceparent.py",
    "scripts/dev_consumer.py",
    "scripts/fake_gateway.py",
    "scripts/quiet_http.py",
    "scripts/tail_events.py",
    "tests/patterns/__init__.py",
    "tests/patterns/conftest.py",
    "tests/patterns/test_cache_aside.py",
    "tests/patterns/test_circuit_breaker.py",
    "tests/patterns/test_fail_open.py",
    "tests/patterns/test_http_client.py",
    "tests/patterns/test_idempotency.py",
    "tests/patterns/test_inbox.py",
    "tests/patterns/test_outbox.py",
    "tests/patterns/test_pagination.py",
    "tests/patterns/test_periodic.py",
    "tests/patterns/test_rate_limit.py",
    "tests/patterns/test_schedule.py",
    "tests/patterns/test_stream.py",
    "tests/payments/__init__.py",
    "tests/payments/conftest.py",
    "tests/payments/test_consumer.py",
    "tests/payments/test_gateway_tls.py",
    "tests/payments/test_payments.py",
    "tests/payments/test_redis.py",
    "tests/payments/test_trace.py",
]
#: The files that move to docs/patterns, where `make pattern` finds them.
MOVED = (
    "app/patterns/",
    "migrations/versions/0002_patterns.py",
    "migrations/versions/0002b_outbox_traceparent.py",
    "scripts/quiet_http.py",
    "tests/patterns/",
)
#: The tables that its migrations create.
TABLES = ["payments", "idempotency_keys", "outbox", "inbox", "schedule"]
#: Files with blocks between `example: begin` and `example: end`, or with marked rows of tables.
FILES_WITH_BLOCKS = [
    ".env.example",
    "Makefile",
    "README.md",
    "app/setting_types.py",
    "app/settings.py",
    "compose.yaml",
    "deploy/observe/prometheus/prometheus.yaml",
    "docs/alerts.md",
    "docs/patterns.md",
    "docs/runbook.md",
    "scripts/seed.py",
]
#: The marked lines of code. Other lines that end in `# example` are the team's.
LINES = {
    "Makefile": ["PARTS += consumer gateway # example"],
    "app/__init__.py": [
        "payments/            a feature: what a team writes  # example",
        "    router.py  service.py  repository.py  schemas.py  # example",
        "    events.py  gateway.py  consumer.py  # example",
        "patterns/            building blocks to copy  # example",
        "    idempotency.py  pagination.py  rate_limit.py  cache_aside.py  fail_open.py  # example",
        "    outbox.py  inbox.py  periodic.py  schedule.py  # example",
        "    stream_consumer.py  stream_handler.py  stream_group.py  # example",
        "    http_client.py  circuit_breaker.py  # example",
    ],
    "app/lifespan.py": [
        "from app.payments.service import Payments, open_payments  # example",
        "    payments: Payments  # example",
        "        payments = await enter(open_payments(settings, storage))  # example",
        '            "payments": payments,  # example',
    ],
    "app/main.py": [
        "from app.payments.router import router as payments_router  # example",
        "    app.include_router(payments_router)  # example",
    ],
    "app/settings.py": ["    HttpUrl,  # example"],
    "deploy/k8s/components/prometheusrule/kustomization.yaml": ["  - payments.yaml # example"],
    "deploy/observe/grafana/dashboards/kustomization.yaml": ["      - payments.json # example"],
    "pyproject.toml": [
        '    "httpx>=0.28,<1", # example',
        '    "stamina>=26,<27", # example',
        '    "hypothesis>=6,<7", # example',
        '    "(payments)", # example',
        '    "(patterns)", # example',
    ],
    "scripts/dev.py": [
        "from scripts.dev_consumer import consuming  # example",
        "        stack.enter_context(consuming())  # example",
    ],
    "scripts/seed.py": ["    (CREATE_PAYMENT, PAYMENTS)  # example"],
    "tests/serving/test_addresses.py": [
        'COMMANDS += [("app.payments.consumer", False)]  # example'
    ],
    "tests/serving/test_processes.py": [
        '        payment = {"amount": 1, "currency": "EUR", "reference": "a"}  # example',
        '        headers = {"Idempotency-Key": "a"}  # example',
        '        created = service.http.post("/payments", json=payment, headers=headers)'
        "  # example",
        '        assert created.headers["location"].startswith("/api/payments/")  # example',
    ],
}
