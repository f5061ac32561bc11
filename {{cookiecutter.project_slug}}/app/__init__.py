"""The service.

main.py              create_app(settings): middleware, error handlers, routes
lifespan.py          resources of the API process: opened in order, closed in reverse
settings.py          every setting, validated and frozen
errors.py            the errors that clients see
tasks.py             background tasks: of a request, of the process
jobs_main.py         the worker that does jobs  # jobs
process.py           runs a process without routes: probes, metrics, shutdown
lifecycle.py         the server's shutdown state; independence of forked children
setting_types.py     validated types for settings
payments/            a feature: what a team writes  # example
    router.py  service.py  repository.py  schemas.py  # example
    events.py  gateway.py  consumer.py  # example
conversations/       a feature with a job  # conversations
    router.py  service.py  repository.py  schemas.py  errors.py  # conversations
    jobs.py  scores.py  # conversations
patterns/            building blocks to copy  # example
    idempotency.py  pagination.py  rate_limit.py  cache_aside.py  fail_open.py  # example
    outbox.py  inbox.py  periodic.py  schedule.py  # example
    stream_consumer.py  stream_handler.py  stream_group.py  # example
jobs/                work that is done later, by workers  # jobs
    table.py  handlers.py  runner.py  outcomes.py  alone.py  starts.py  # jobs
    dispatcher.py  postgres_dispatcher.py  worker.py  job_metrics.py  router.py  # jobs
    rabbitmq_dispatcher.py  broker.py  relay.py  consume.py  # jobs
    schedules.py  purge.py  report.py  # jobs
process_pool/        CPU-heavy work in other processes
    pool.py  process.py  child.py
auth/                the caller of a request, by its bearer token
    dependencies.py  principal.py  errors.py
    authenticator.py  tokens.py  keys.py  shared_keys.py  jwks.py
web/                 around every request
    application.py  middleware.py  limits.py  headers.py  proxies.py  threads.py
    problems.py  health.py  routes.py  cors.py  head.py  sse.py  body_limit.py
    directory.py  quick_route.py  quick_plan.py  document.py
outbound/            calls of other services
    http_client.py  circuit_breaker.py  client_credentials.py
storage/             Postgres and Redis
    pool.py  postgres.py  postgres_errors.py  query_log.py  redis.py
    traced_postgres.py  traced_redis.py  replica.py
telemetry/           logs, metrics, traces
    logs.py  gcp_logs.py  access_log.py  stdout.py  context.py
    tracing.py  trace_setup.py  trace_export.py  span_encoding.py  exemplars.py
    http_metrics.py  process_metrics.py  metric_files.py  multiprocess.py
    pod_metrics.py  control_group.py
    metrics_directory.py  metrics_server.py  metrics_prefix.py  scrape_server.py
sizing/              workers and connections for this machine; `make doctor`
    resources.py  plan.py  checks.py
network/             how the service connects to others
    connection_urls.py  event_loop.py
serving/             the gunicorn runtime: nothing imports it, a team rarely opens it
    gunicorn_worker.py  server.py  http_protocol.py  http_response.py  websocket_protocol.py
    arbiter.py  shared_flags.py  state.py  listener.py  memory.py  healthcheck.py

Start with main.py, then lifespan.py. An import goes down only; `make lint` checks that.
"""

import os

# Before any metric is made, in a child process too that imports one module only.
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    import app.telemetry.metric_files  # noqa: F401
