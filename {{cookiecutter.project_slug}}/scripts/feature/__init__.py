"""`make feature N=orders`: a new feature, copied from `widgets` under its own name.

`widgets` and `migration.py` here, and their tests in `tests/scripts/widgets`, are a feature as it
stands. Change them to change the features that are made from now on.
"""
