"""Small Flask apps that were there before the relay was, each with habits that a relay has to live with.

They run in servers of their own and are told by the environment where their upstreams are (`SHOP_…`).
"""
