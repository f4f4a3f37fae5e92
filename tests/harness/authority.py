"""A certificate authority of the tests' own."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """A certificate authority of our own, made by the openssl program."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            raise AssertionError("these tests need openssl (apt-get install openssl): it is not installed")
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._openssl(
            *("req", "-x509", "-subj", "/CN=relay tests", "-days", "2", "-out", "ca.pem", "-keyout", "ca.key"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    def _openssl(self, *args: str) -> None:
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"] if args[0] == "req" else []
        subprocess.run(["openssl", *args, *new_key], cwd=self.folder, check=True, capture_output=True, timeout=30)

    def issue(self, name: str, names: str, *, days: int = 1) -> ssl.SSLContext:
        """A server's context with a certificate for `names`, as OpenSSL writes them: DNS:localhost,IP:127.0.0.1."""
        self._openssl("req", "-subj", "/CN=server", "-out", f"{name}.csr", "-keyout", f"{name}.key")
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
        self._openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-extfile", f"{name}.ext", "-days", str(days), "-out", f"{name}.pem"),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return context
