"""`relay doctor`: looks at a chain of proxies from the client's end, and names the fault and the cure in words.

`probe` asks over a raw socket and times what arrives; `timeline` reads that; `observations` is all that was seen;
`findings` turns it into sentences and does no I/O; `hops` knows the programs that may stand on the way; `examine`
decides what is asked; `command` is the command line.
"""
