"""What operators see of a process: the log and the metrics.

Decides nothing. It may import `relay.errors`, `relay.record` and what stands below them.
"""
