"""Who may call, what, and how much of it: addresses, origins, client keys, rates, slots.

Decides by a request's head and by what is counted; sends nothing and reads no body. It may import `relay.shared`,
`relay.observe` and `relay.settings`.
"""
