"""What language models' APIs say: their events, their usage, the body of a chat request. Pure text and numbers.

No input or output. It may import `relay.errors` and `relay.wire`.
"""
