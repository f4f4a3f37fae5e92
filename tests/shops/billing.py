"""A shop that bills its streams: each record that `on_end` gets is a line of the file BILLS; for one model it fails."""

import dataclasses
import json
import os
from pathlib import Path

from flask import Flask, g, request

from relay import Relay
from relay.record import Record

app = Flask(__name__)
app.config["RELAY_UPSTREAM_URL"] = os.environ["UPSTREAM"]


def bill(record: Record) -> None:
    if record.model == "of-the-wrong-kind":
        raise RuntimeError("the shop's own mistake")
    with Path(os.environ["BILLS"]).open("a") as bills:
        bills.write(json.dumps(dataclasses.asdict(record)) + "\n")


relay = Relay(app, url_prefix="/ai", on_end=bill)


@relay.before_request
def whose() -> None:
    tenant = request.headers.get("X-Tenant")
    if tenant is not None:
        g.relay_tenant = int(tenant) if tenant.isdecimal() else tenant
