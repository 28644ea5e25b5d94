"""Whether the TLS files can be used, told at start-up in a line; uvicorn loads them when it listens."""

from __future__ import annotations

import ssl

from minivllm.config import ServerConfig, flag
from minivllm.errors import ConfigError


def check_tls(config: ServerConfig) -> None:
    """Try the files of ``--ssl-certfile``, ``--ssl-keyfile`` and ``--ssl-ca-certs``, where they are given.

    Raises:
        ConfigError: one is missing or malformed, the key is encrypted, or it isn't the certificate's.
    """
    if config.ssl_certfile is None:
        return
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        try:
            if path is not None:
                open(path, "rb").close()
        except OSError as error:
            raise ConfigError(f"can't read {flag(name)} {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With a password of one's own OpenSSL doesn't ask for one in the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        key = config.ssl_keyfile or config.ssl_certfile
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            problem = f"{key} holds the private key of another certificate"
        else:
            problem = f"{config.ssl_certfile} must hold a PEM certificate, and {key} its unencrypted PEM key"
        raise ConfigError(f"can't serve HTTPS with these --ssl files: {problem}") from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError:
            raise ConfigError(f"--ssl-ca-certs {config.ssl_ca_certs} holds no PEM certificate") from None
