"""The deployment rules: the manifests, the image and compose.yaml agree with the service.

`deployed.py` reads a deployment, `checking.py` has the helpers of a rule, `rules/` has the rules by
subject, and `test_deploy.py` checks every overlay. Linters of manifests do not cover these rules:
whether numbers agree, and whether a name, a path or a port is one of this service.
"""
