"""The contract of a deployment: what is read (deployed.py), and the rules that it keeps.

No linter of manifests knows these rules: whether two numbers agree, and whether a name, a path or a port is one of this
service. tests/deploy/test_deploy.py holds every overlay to them.
"""
