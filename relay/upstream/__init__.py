"""The way to the upstream: its address and key, its connections, one request and its answer, how it is, the demo.

Knows nothing of Flask, of clients and of a stream's clocks. It may import `relay.wire`, `relay.settings` and
`relay.observe`.
"""
