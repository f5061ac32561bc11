"""The usual consumer: pika's blocking connection with a prefetch of 10.

`python seed_consumer.py MODE`, where MODE is one of

- `callback`: works in the callback, then acknowledges: one message at a time;
- `threads`: ten threads, which acknowledge over the channel, although it is not thread-safe;
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


class Consumer:
    """The callback of a channel, in one of the modes."""

    def __init__(self, connection: pika.BlockingConnection, channel: Any, mode: str) -> None:
        """`mode` is one of the three above."""
        self.connection = connection
        self.channel = channel
        self.mode = mode
        self.threads = ThreadPoolExecutor(PREFETCH)

    def receive(self, _: Any, method: Any, __: Any, body: bytes) -> None:
        """Work here, or in a thread."""
        if self.mode == "callback":
            work(body.decode())
            self.channel.basic_ack(method.delivery_tag)
        else:
            self.threads.submit(self.work_in_thread, method.delivery_tag, body.decode())

    def work_in_thread(self, tag: int, job_id: str) -> None:
        """Work, and acknowledge."""
        work(job_id)
        if self.mode == "threads":
            self.channel.basic_ack(tag)
        else:
            self.connection.add_callback_threadsafe(lambda: self.channel.basic_ack(tag))


def main() -> None:
    """Consume until the process is killed, or until it fails."""
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    channel.queue_declare("seed", durable=True)
    channel.basic_qos(prefetch_count=PREFETCH)
    channel.basic_consume("seed", Consumer(connection, channel, sys.argv[1]).receive)
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
