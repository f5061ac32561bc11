"""The workers and connections of a pod, and checks that its settings agree."""
