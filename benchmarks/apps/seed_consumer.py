"""The usual consumer: pika's blocking connection with a prefetch of 10.

`python seed_consumer.py MODE`, where MODE is one of

- `callback`: works in the callback, then acknowledges. One message at a time, whatever the prefetch.
- `threads`: ten threads, which acknowledge over the channel. pika's channels are not thread-safe.
- `threadsafe`: ten threads, which acknowledge by `add_callback_threadsafe`.

It has the work of job_handler.py, and needs pika and psycopg.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import job_work
import pika
import psycopg

PREFETCH = 10
WAIT_SECONDS = float(os.environ["WAIT_SECONDS"])
STEPS = int(os.environ["STEPS"])
START = "update jobs set status = 'running', started_at = now() where job_id = %s"
STORE = "insert into effects (job_id) values (%s)"
END = "update jobs set status = 'succeeded', finished_at = now() where job_id = %s"
local = threading.local()


def work(job_id: str) -> None:
    """Start the row, wait, compute, store."""
    if not hasattr(local, "database"):
        local.database = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    local.database.execute(START, (job_id,))
    time.sleep(WAIT_SECONDS)
    job_work.compute(STEPS)
    with local.database.transaction():
        local.database.execute(STORE, (job_id,))
        local.database.execute(END, (job_id,))


def main() -> None:
    """Consume until the process is killed, or until it fails."""
    mode = sys.argv[1]
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    channel.queue_declare("seed", durable=True)
    channel.basic_qos(prefetch_count=PREFETCH)
    threads = ThreadPoolExecutor(PREFETCH)

    def acknowledge(tag: int) -> None:
        channel.basic_ack(tag)

    def work_in_thread(tag: int, job_id: str) -> None:
        work(job_id)
        if mode == "threads":
            acknowledge(tag)
        else:
            connection.add_callback_threadsafe(lambda: acknowledge(tag))

    def receive(_: Any, method: Any, __: Any, body: bytes) -> None:
        if mode == "callback":
            work(body.decode())
            acknowledge(method.delivery_tag)
        else:
            threads.submit(work_in_thread, method.delivery_tag, body.decode())

    channel.basic_consume("seed", receive)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        channel.start_consuming()
    except BaseException as error:
        sys.stdout.write(f"died: {error!r}\n")
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
