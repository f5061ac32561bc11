"""Jobs: what `make remove-jobs` removes, or edits."""

#: Its name in messages.
TITLE = "jobs"
#: The parts that need this one, and are removed with it.
ALONG = ["conversations"]
#: The directories that have no files but these.
DIRECTORIES = [
    "app/jobs",
    "deploy/k8s/components/jobs",
    "deploy/k8s/components/jobs-keda",
    "deploy/k8s/components/jobs-rabbitmq",
    "scripts/tune",
    "tests/jobs",
]
PATHS = [
    "app/jobs/__init__.py",
    "app/jobs/alone.py",
    "app/jobs/broker.py",
    "app/jobs/consume.py",
    "app/jobs/dispatcher.py",
    "app/jobs/handlers.py",
    "app/jobs/job_metrics.py",
    "app/jobs/outcomes.py",
    "app/jobs/postgres_dispatcher.py",
    "app/jobs/purge.py",
    "app/jobs/rabbitmq_dispatcher.py",
    "app/jobs/relay.py",
    "app/jobs/report.py",
    "app/jobs/router.py",
    "app/jobs/runner.py",
    "app/jobs/schedules.py",
    "app/jobs/starts.py",
    "app/jobs/table.py",
    "app/jobs/worker.py",
    "app/jobs_main.py",
    "compose.rabbitmq.yaml",
    "deploy/compose/rabbitmq.conf",
    "deploy/k8s/components/jobs-keda/kustomization.yaml",
    "deploy/k8s/components/jobs-keda/scaledobject.yaml",
    "deploy/k8s/components/jobs-keda/triggerauthentication.yaml",
    "deploy/k8s/components/jobs-rabbitmq/kustomization.yaml",
    "deploy/k8s/components/jobs-rabbitmq/networkpolicy.yaml",
    "deploy/k8s/components/jobs/deployment.yaml",
    "deploy/k8s/components/jobs/kustomization.yaml",
    "deploy/k8s/components/jobs/service.yaml",
    "deploy/k8s/components/prometheusrule/jobs.yaml",
    "deploy/observe/grafana/dashboards/jobs.json",
    "deploy/observe/prometheus/rules/jobs.yaml",
    "deploy/observe/prometheus/tests/jobs.yaml",
    "docs/jobs.md",
    "migrations/versions/0003_jobs.py",
    "scripts/dev_rabbitmq.py",
    "scripts/dev_worker.py",
    "scripts/parked.py",
    "scripts/tune/__init__.py",
    "scripts/tune/__main__.py",
    "scripts/tune/advice.py",
    "scripts/tune/plot.py",
    "scripts/tune/point.py",
    "scripts/tune/recipe.py",
    "scripts/tune/servers.py",
    "scripts/tune/table.py",
    "scripts/tune/users.py",
    "tests/deploy/rules/jobs.py",
    "tests/deploy/test_jobs.py",
    "tests/jobs/__init__.py",
    "tests/jobs/broker_server.py",
    "tests/jobs/conftest.py",
    "tests/jobs/test_amqp_url.py",
    "tests/jobs/test_consume.py",
    "tests/jobs/test_dev_rabbitmq.py",
    "tests/jobs/test_dev_worker.py",
    "tests/jobs/test_guards.py",
    "tests/jobs/test_purge_and_report.py",
    "tests/jobs/test_rabbitmq.py",
    "tests/jobs/test_router.py",
    "tests/jobs/test_runner.py",
    "tests/jobs/test_scheduled_jobs.py",
    "tests/jobs/test_schedules.py",
    "tests/jobs/test_trace.py",
    "tests/jobs/test_workers.py",
    "tests/jobs/work.py",
    "tests/jobs/worker.py",
    "tests/run_jobs.py",
    "tests/scripts/test_parked.py",
    "tests/scripts/test_tune.py",
]
#: The files of other parts that need this one as well, and are removed with it.
DEPENDENTS = [
    "docs/workshop/9-prefetch.md",
    "docs/workshop/prefetch.svg",
    "labs/computation.py",
    "labs/prefetch.py",
    "labs/prefetch_worker.py",
    "labs/prefetching_consumer.py",
    "tests/labs/test_prefetch.py",
]
#: The files that move to docs/patterns, where `make pattern` finds them.
MOVED = ()
#: The tables that its migrations create.
TABLES = ["jobs", "schedules"]
#: Files with blocks between `jobs: begin` and `jobs: end`, or with marked rows of tables.
FILES_WITH_BLOCKS = [
    ".env.example",
    "Makefile",
    "README.md",
    "app/network/connection_urls.py",
    "app/setting_types.py",
    "app/settings.py",
    "compose.yaml",
    "deploy/observe/prometheus/prometheus.yaml",
    "docs/alerts.md",
    "docs/first-feature.md",
    "docs/runbook.md",
    "docs/tuning.md",
    "docs/workshop/README.md",
    "scripts/compose_secrets.py",
    "tests/conftest.py",
]
#: The marked lines of code. Other lines that end in `# jobs` are the team's.
LINES = {
    ".github/workflows/ci.yml": [
        "      - run: sudo apt-get install -qq --yes --no-install-recommends rabbitmq-server # jobs"
    ],
    ".gitlab-ci.yml": [
        "    - apt-get install -qq --yes --no-install-recommends rabbitmq-server # jobs"
    ],
    "Makefile": [
        "PARTS += jobs $(if $(RABBITMQ),rabbitmq) # jobs",
        "# RABBITMQ=1 adds RabbitMQ, which then hands out the jobs. # jobs",
        "OVERRIDES += $(if $(RABBITMQ),--file compose.rabbitmq.yaml) # jobs",
        "down: RABBITMQ := 1 # jobs",
    ],
    "app/__init__.py": [
        "jobs_main.py         the worker that does jobs  # jobs",
        "jobs/                work that is done later, by workers  # jobs",
        "    table.py  handlers.py  runner.py  outcomes.py  alone.py  starts.py  # jobs",
        "    dispatcher.py  postgres_dispatcher.py  worker.py  job_metrics.py  router.py  # jobs",
        "    rabbitmq_dispatcher.py  broker.py  relay.py  consume.py  # jobs",
        "    schedules.py  purge.py  report.py  # jobs",
    ],
    "app/main.py": [
        "from app.jobs.router import router as jobs_router  # jobs",
        "    app.include_router(jobs_router)  # jobs",
    ],
    "app/network/connection_urls.py": [
        'AMQP_FORM = "must be amqp://user:password@host:port/vhost"  # jobs'
    ],
    "app/setting_types.py": [
        "import zoneinfo  # jobs",
        'OWN_LOG_FIELDS |= {"job_id", "job_type", "attempts"}  # jobs',
    ],
    "app/settings.py": ["    AmqpUrl,  # jobs", "    TimeZone,  # jobs"],
    "deploy/k8s/components/prometheusrule/kustomization.yaml": ["  - jobs.yaml # jobs"],
    "deploy/observe/grafana/dashboards/kustomization.yaml": ["      - jobs.json # jobs"],
    "pyproject.toml": [
        '    "aio-pika>=10.2,<11", # jobs',
        '    "cronsim>=2.8,<3", # jobs',
        '    "(jobs_main)", # jobs',
        '    "(jobs)", # jobs',
    ],
    "scripts/compose_secrets.py": ["    _create_rabbitmq_secrets(directory)  # jobs"],
    "scripts/dev.py": [
        "from scripts.dev_worker import working  # jobs",
        '        stack.enter_context(working(is_reloading="--no-reload" not in sys.argv))  # jobs',
    ],
    "tests/conftest.py": ["from tests.run_jobs import RunJobs  # jobs", '    "jobs",  # jobs'],
    "tests/deploy/rules/__init__.py": ["    jobs,  # jobs", "MODULES += [jobs]  # jobs"],
    "tests/deploy/rules/network.py": ['SECRET_URLS["amqp_url"] = "amqps://rabbitmq"  # jobs'],
    "tests/deploy/rules/secrets.py": ['NEEDED_BY["jobs"] = {"database_url"}  # jobs'],
}
