"""What `gunicorn wsgi:app` reads in this folder. The values, each with its reason, are in relay/gunicorn_conf.py."""

# The first statement, before anything can import urllib3: a TLS class picked up before gevent has patched it ends in
# a RecursionError at the first HTTPS request.
from gevent import monkey

monkey.patch_all()

from relay import gunicorn_conf  # noqa: E402

# A call and not `import *`: gunicorn runs this file again on SIGHUP, and a module only once.
globals().update(gunicorn_conf.configure())
