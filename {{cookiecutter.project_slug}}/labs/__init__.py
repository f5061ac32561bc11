"""The labs of docs/workshop: each breaks something, shows it, and proves what cures it.

__main__.py        `python -m labs NAME`
stage.py           starts and stops the processes of a lab
picture.py         a picture, as SVG and as PNG
claims.py          what a lab proves, with the control that must fail
balancer.py        requests to several instances, as a balancer sends them

Every other module is a lab: `NUMBER`, `TITLE`, and `run(stage)`.
"""
