"""A server that takes the status of a TrainJob over TLS, as Kubeflow Trainer's does, and keeps what it took.

It follows the server of Kubeflow Trainer 2.3 (pkg/statusserver) and the schema of `status.trainerStatus` in
the TrainJob's CustomResourceDefinition.
"""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jsonschema
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/imagenet/status"
TOKEN_FILE, CA_FILE = "token", "ca.crt"
_SHORT = {"type": "string", "minLength": 1, "maxLength": 64}
SCHEMA = {
    "type": "object",
    "required": ["lastUpdatedTime"],
    "additionalProperties": False,  # the server would ignore others
    "properties": {
        "progressPercentage": {"type": "integer", "minimum": 0, "maximum": 100},
        "estimatedRemainingSeconds": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "metrics": {
            "type": "array",
            "maxItems": 256,
            "items": {
                "type": "object",
                "required": ["name", "value"],
                "additionalProperties": False,
                "properties": {"name": _SHORT, "value": _SHORT},
            },
        },
        "lastUpdatedTime": {
            "type": "string",
            "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$",
        },
    },
}


class StatusServer(ThreadingHTTPServer):
    """The server, which is used as a context.

    taken: the statuses that were valid. refused: the messages to requests that were not. failures: number of
    requests to answer with HTTP 500 first.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.taken, self.refused = folder, list[dict[str, Any]](), list[str]()
        self.failures = 0
        self.is_hanging = False
        (folder / TOKEN_FILE).write_text("first\n")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*_certificate(folder))
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def environment(self) -> dict[str, str]:
        """Return the variables that the operator would set."""
        return {
            "KUBEFLOW_TRAINER_SERVER_URL": f"https://127.0.0.1:{self.server_port}{PATH}",
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(self.folder / TOKEN_FILE),
            "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(self.folder / CA_FILE),
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing if a client hangs up, as one does that does not trust the certificate."""


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.is_hanging:
            threading.Event().wait(60)
        code, message = self._check(content)
        if code == 200:
            self.server.taken.append(json.loads(content)["trainerStatus"])
            answer = content
        else:
            self.server.refused.append(message)
            answer = json.dumps({"status": "Failure", "message": message, "code": code}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _check(self, content: bytes) -> tuple[int, str]:
        if self.server.failures > len(self.server.refused):
            return 500, "Internal error"
        if self.path != PATH:
            return 404, "Not found"
        if len(content) > 1 << 16:
            return 413, "Payload too large"
        token = (self.server.folder / TOKEN_FILE).read_text().strip()
        if self.headers["Authorization"] != f"Bearer {token}":
            return 403, "Forbidden"
        try:
            jsonschema.validate(json.loads(content)["trainerStatus"], SCHEMA)
        except (ValueError, KeyError, jsonschema.ValidationError) as error:
            return 422, f"Invalid payload: {error}"
        return 200, ""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def status_server(folder: Path) -> Iterator[StatusServer]:
    """Serve with a certificate, its authority and a token in the folder until the context ends."""
    with StatusServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate of 127.0.0.1, which is its own authority, and its key. Returns both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "status server")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / CA_FILE, folder / "tls.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths
