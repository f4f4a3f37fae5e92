"""What crosses processes: the Redis that limits are counted in, and the reports of clients in files.

It may import `relay.observe` and what stands below it.
"""
