"""The ready service around the blueprint: its app, the list of all workers' streams, the CPUs that it may use.

May import everything but `relay.cli`.
"""
