"""HTTPS: a round trip, client certificates, and files that can't be used."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from pathlib import Path

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError
from minivllm.server.keys import ApiKeys
from minivllm.server.tls import check_tls

from .certificates import Certificate, make_certificate
from .fakes import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Certificate:
    return make_certificate(folder, "server")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Certificate:
    return make_certificate(folder, "client")


def test_round_trip(ours: Certificate) -> None:
    config = ServerConfig(ssl_certfile=ours.cert, ssl_keyfile=ours.key)
    check_tls(config)
    trust = ssl.create_default_context(cafile=ours.cert)
    with served(config, ApiKeys(["key"])) as port:
        url = f"https://127.0.0.1:{port}"
        with httpx.Client(base_url=url, verify=trust, headers={"Authorization": "Bearer key"}) as client:
            assert client.get("/version").status_code == 200
            stream = client.post("/v1/completions", json={"prompt": "x", "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")
            large = client.post("/v1/completions", content=b"x" * 9_000_000)
            assert large.status_code == 413
        assert httpx.get(f"{url}/v1/models", verify=trust).status_code == 401
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)  # this machine's authorities don't know the certificate
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in plain.recv(1000)


def test_client_certificates(ours: Certificate, theirs: Certificate) -> None:
    config = ServerConfig(ssl_certfile=ours.cert, ssl_keyfile=ours.key, ssl_ca_certs=theirs.cert)
    check_tls(config)
    with served(config) as port:
        url = f"https://127.0.0.1:{port}/version"
        trust = ssl.create_default_context(cafile=ours.cert)
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=trust)
        trust.load_cert_chain(ours.cert, ours.key)  # signed by nobody whom the server trusts
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=trust)
        trust.load_cert_chain(theirs.cert, theirs.key)
        assert httpx.get(url, verify=trust).status_code == 200


def test_one_file_for_both(ours: Certificate, folder: Path) -> None:
    both = folder / "both.pem"
    both.write_text(Path(ours.key).read_text() + Path(ours.cert).read_text())
    check_tls(ServerConfig(ssl_certfile=str(both)))


def refused(words: str, **files: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_tls(ServerConfig(**files))


def test_files_that_cannot_be_used(ours: Certificate, theirs: Certificate, folder: Path) -> None:
    missing, text = str(folder / "missing.pem"), str(folder / "text.pem")
    Path(text).write_text("not a certificate")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        files = {"ssl_certfile": ours.cert, "ssl_keyfile": ours.key, name: missing}
        flag = "--" + name.replace("_", "-")
        refused(f"can't read {flag} {missing}: No such file", **files)
        refused(f"can't read {flag} {folder}: Is a directory", **{**files, name: str(folder)})
    refused(f"{theirs.key} holds the private key of another", ssl_certfile=ours.cert, ssl_keyfile=theirs.key)
    refused("PEM certificate", ssl_certfile=text, ssl_keyfile=ours.key)
    refused("unencrypted PEM key", ssl_certfile=ours.cert, ssl_keyfile=text)
    refused("unencrypted PEM key", ssl_certfile=ours.cert)  # where the key isn't in the same file
    refused("no PEM certificate", ssl_certfile=ours.cert, ssl_keyfile=ours.key, ssl_ca_certs=text)
    locked = make_certificate(folder, "locked", "-passout", "pass:secret")
    refused("unencrypted PEM key", ssl_certfile=locked.cert, ssl_keyfile=locked.key)


def test_files_that_make_no_sense_alone() -> None:
    for name in ("ssl_keyfile", "ssl_ca_certs"):
        with pytest.raises(ConfigError, match="needs --ssl-certfile"):
            ServerConfig(**{name: "x"})
