"""The tables of app/jobs: jobs, and the schedules that create some of them."""

from alembic import op

revision = "0003_jobs"
down_revision = "0002b_outbox_traceparent"


def upgrade() -> None:
    """Create the tables."""
    # Space in each page: the renewal of a lease then changes no index.
    op.execute("""
        create table jobs (
            job_id uuid primary key default gen_random_uuid(),
            type text not null,
            key text,
            payload text not null,
            context text not null default '{}',
            status text not null default 'queued'
                check (status in ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
            attempts integer not null default 0,
            starts integer not null default 0,
            run_at timestamptz not null default now(),
            published_at timestamptz,
            started_at timestamptz,
            lease_until timestamptz,
            finished_at timestamptz,
            error text,
            result text,
            created_at timestamptz not null default now()
        ) with (fillfactor = 70)
    """)
    op.execute("create unique index jobs_key on jobs (type, key)")
    op.execute("create index jobs_due on jobs (run_at) where status = 'queued'")
    op.execute("""
        create index jobs_unpublished on jobs (run_at)
        where status = 'queued' and published_at is null
    """)
    op.execute("create index jobs_running on jobs (started_at) where status = 'running'")
    op.execute("create index jobs_failed on jobs (finished_at) where status = 'failed'")
    op.execute("""
        create index jobs_finished on jobs (finished_at)
        where status in ('succeeded', 'cancelled')
    """)
    op.execute("""
        create table schedules (
            name text primary key,
            expression text not null,
            zone text not null,
            next_at timestamptz not null
        )
    """)


def downgrade() -> None:
    """Drop the tables."""
    op.execute("drop table jobs, schedules")
