"""The service as a WSGI application.

In this folder `gunicorn wsgi:app` serves it: gunicorn reads gunicorn.conf.py by itself, and both read the environment
and the file .env. `flask --app wsgi run` works for a quick look, with Flask's own threaded server. Every setting is
in .env.example; without any, the relay relays from the demo upstream that it brings along.
"""

from relay.service.app import create_app

app = create_app()
