"""Flask's side: the extension, its routes and views, what a request asks for, CORS, one relay in one app.

The only package but `relay.service` that imports Flask. It may import everything but `relay.service` and
`relay.cli`.
"""
