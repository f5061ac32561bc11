"""Jobs: work that is done later, in another process, and takes effect once.

A job is a row of the table `jobs`. The request that wants it creates the row in its own transaction
(`table.enqueue`). A worker (`python -m app.jobs_main`) starts it and calls the handler of its type.
Postgres hands out the jobs, or RabbitMQ does if `AMQP_URL` is set. In both cases the row decides.
"""
