"""A stream as text: reads an upstream's event stream and gives the server events of plain text in its place.

`view` is the WSGI iterable and says when something is sent, `events` what, and `head` under which head. What the
upstream's events mean is known to `relay.llm.answer`.
"""

from __future__ import annotations

from relay.textview.head import Head
from relay.textview.view import TextView

__all__ = ["Head", "TextView"]
