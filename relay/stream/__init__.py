"""The life of one stream, the doctor's timed one, the drain that ends them, and how they wait.

Knows nothing of Flask. It may import `relay.gate`, `relay.upstream`, `relay.observe` and what stands below them.
"""
