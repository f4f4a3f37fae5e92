"""What went wrong on the way to the upstream, as an error for the client: which part, and what to do about it.

No address, key or password in a message.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import TYPE_CHECKING

from relay import errors
from relay.upstream.connect import OfTheProxy, ProxyRefused

if TYPE_CHECKING:
    from relay.wire.http1 import Head

PROXY = "the proxy (RELAY_UPSTREAM_PROXY)"
_REACHED_NOBODY = re.compile(
    r"error=(dns_error|dns_timeout|destination_(unavailable|not_found|ip_unroutable)|connection_(refused|timeout))\b"
    r"|ERR_(DNS_FAIL|CONNECT_FAIL|CANNOT_FORWARD)\b"
)
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH; then those of a chain that leads to nobody known.
_OTHER_NAME = {62, 64}
_NO_ISSUER = {2, 18, 19, 20, 21}


def not_connected(error: BaseException, seconds: float) -> errors.RelayError:
    """No connection came about within `seconds`, or one failed before the request was sent."""
    of_proxy = isinstance(error, OfTheProxy)
    cause: BaseException = error.error if isinstance(error, OfTheProxy) else error
    if isinstance(cause, ProxyRefused):
        return _refused_by_proxy(cause.status)
    cause.__traceback__ = error.__traceback__ = None  # their frames hold the exchange, which holds this error
    who = PROXY if of_proxy else "the upstream"
    if isinstance(cause, TimeoutError):
        return errors.ConnectTimeout(f"no connection to {who} within {seconds:g} s (RELAY_CONNECT_TIMEOUT)")
    if isinstance(cause, ssl.SSLCertVerificationError):
        where = "RELAY_UPSTREAM_PROXY" if of_proxy else "RELAY_UPSTREAM_URL"
        if cause.verify_code in _OTHER_NAME:
            hint = f"; it is for another host than {where} names"
        elif cause.verify_code in _NO_ISSUER:
            hint = "; for a private authority set RELAY_UPSTREAM_CA"
        else:  # expired, not valid yet, revoked: no setting helps
            hint = ""
        return errors.UpstreamUnreachable(
            f"the certificate of {who} is not trusted ({cause.verify_message}){hint}",
            code="upstream_certificate",
        )
    if isinstance(cause, ssl.SSLError):
        return (None if of_proxy else tls(cause)) or errors.UpstreamUnreachable(
            f"{who} does not speak TLS as it should; check its scheme"
        )
    if isinstance(cause, socket.gaierror):
        return errors.UpstreamUnreachable(f"the host name of {who} cannot be resolved")
    detail = f": {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else ""
    return errors.UpstreamUnreachable(f"{who} cannot be reached{detail}")


def tls(error: BaseException) -> errors.UpstreamUnreachable | None:
    """The error if the upstream refused the relay's certificate, or its not having one; else None.

    In TLS 1.3 that is told after the handshake, in place of an answer (RFC 8446 section 4.4.2.4).
    """
    reason = getattr(error, "reason", None) or ""
    if "CERTIFICATE_REQUIRED" in reason:
        why = "wants a client certificate; set RELAY_UPSTREAM_CERT"
    elif any(word in reason for word in ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "ACCESS_DENIED")):
        why = "does not accept the client certificate (RELAY_UPSTREAM_CERT)"
    elif "CERTIFICATE_EXPIRED" in reason or "CERTIFICATE_REVOKED" in reason:
        why = "does not accept the client certificate (RELAY_UPSTREAM_CERT): it has expired or was revoked"
    elif "HANDSHAKE_FAILURE" in reason:
        why = "refused the TLS handshake; it may want a client certificate (RELAY_UPSTREAM_CERT)"
    else:
        return None
    return errors.UpstreamUnreachable(f"the upstream {why}", code="upstream_certificate")


def _refused_by_proxy(status: int) -> errors.UpstreamUnreachable:
    if status == 407:
        why = "wants a login (407); write its user and password into RELAY_UPSTREAM_PROXY"
    elif status:
        why = f"opens no connection to the upstream: it answered {status}"
    else:
        why = "opens no connection to the upstream, and did not answer in HTTP"
    return errors.UpstreamUnreachable(f"{PROXY} {why}")


def of_proxy(head: Head) -> errors.UpstreamUnreachable | None:
    """The error if a proxy answered a plain request that it should have passed on; None: the upstream did.

    A 407 is always the proxy's. Of other statuses it is known only where the proxy says that it reached nobody: in
    Proxy-Status (RFC 9209 section 2.3) and, from Squid, in X-Squid-Error.
    """
    if head.status == 407:
        return _refused_by_proxy(407)
    if head.status < 500:
        return None
    said = f"{head.fields.get('proxy-status', '')};{head.fields.get('x-squid-error', '')}"
    return _refused_by_proxy(head.status) if _REACHED_NOBODY.search(said) else None
