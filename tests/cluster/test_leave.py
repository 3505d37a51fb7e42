"""A spot instance's notice, from a stand-in for the metadata service of AWS; Ray itself is in the fault tests."""

from __future__ import annotations

import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Metadata(BaseHTTPRequestHandler):
    """Gives notice at the third look."""

    looks = 0

    def do_PUT(self) -> None:
        self.answer(200 if self.path == "/latest/api/token" else 404, b"secret")

    def do_GET(self) -> None:
        known = self.path == "/latest/meta-data/spot/instance-action"
        Metadata.looks += known and self.headers["X-aws-ec2-metadata-token"] == "secret"
        self.answer(200 if known and Metadata.looks == 3 else 404, b"{}")

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_ray_is_told_as_soon_as_a_spot_instance_is_to_end(tmp_path: Path) -> None:
    told = tmp_path / "told"
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    ray.chmod(0o755)
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LEAVE_POLL": "0.1",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }  # fmt: skip
    subprocess.run([ROOT / "cluster/leave.sh", "--spot", "1", "ab12"], env=env, check=True, timeout=60)
    server.shutdown()
    assert Metadata.looks == 3
    assert told.read_text().startswith("drain-node --node-id ab12 --reason DRAIN_NODE_REASON_PREEMPTION")
