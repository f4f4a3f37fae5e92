"""`relay doctor`: looks at a chain of proxies from the client's end, and names the fault and the cure in words.

`probe` asks over a raw socket and times what arrives; `timeline` reads that; `findings` turns what was seen into
sentences and does no I/O; `examine` decides what is asked; `command` is the command line.
"""
