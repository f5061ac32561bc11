"""A live view of a running service on a local page: `make watch`.

It sees only the public faces of the service: its probes, its metrics, and its log lines if they are
piped to it. It changes nothing, and needs no network of its own.

    exposition.py   the metrics of one scrape
    sample.py       the numbers of the page, from two scrapes
    changes.py      the events: what is different now
    polling.py      asks the probes and the metrics, at a rate that the service does not feel
    lines.py        the newest log lines of stdin
    view.py         the bounded history, from which each open page is fed
    server.py       the page and its server-sent events
    watch.html      the page
"""
