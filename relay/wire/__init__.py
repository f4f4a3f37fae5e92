"""What goes over the wire, as bytes and text: SSE, HTTP/1.1 heads and framing, header lists, request targets.

No input or output, no clock, no setting. It may import `relay.errors` alone.
"""
