"""Where API keys come from, and that none is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError
from minivllm.flags import Parser
from minivllm.server.keys import ENVIRONMENT_VARIABLE, load_api_keys


def test_no_keys() -> None:
    assert load_api_keys(ServerConfig(), {}) is None


def test_all_places_together(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who: Ann\nfile-1\n\n  file-2  \n#file-3\n")
    environ = {ENVIRONMENT_VARIABLE: "env-1, env-2,", "HOME": "/"}
    keys = load_api_keys(ServerConfig(api_key=("flag-1", "flag-2"), api_key_file=str(path)), environ)
    assert keys is not None
    for key in ("flag-1", "flag-2", "file-1", "file-2", "env-1", "env-2"):
        assert keys.name_of(key.encode())
    for key in ("", "file-3", "#file-3", "# who: Ann", "env-1, env-2,", "env-1,env-2"):
        assert not keys.name_of(key.encode())
    assert environ == {"HOME": "/"}, "the engine process must not inherit it"


@pytest.mark.parametrize("key", ["", " ", "a b", "a,b", "a\tb", "schlüssel", "a\n", "a\x00", "🗝"])
def test_malformed_keys_are_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_api_keys(ServerConfig(api_key=("fine-secret", key)), {})
    assert "key 2 of --api-key" in str(error.value)
    assert "fine-secret" not in str(error.value)
    assert not key.strip() or key not in str(error.value)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_a_place_without_keys_does_not_open_the_server(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT_VARIABLE} holds no API key"):
        load_api_keys(ServerConfig(), {ENVIRONMENT_VARIABLE: text})
    path = tmp_path / "keys"
    path.write_text("# nothing yet\n" + text.replace(",", "") + "\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        load_api_keys(ServerConfig(api_key_file=str(path)), {})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read --api-key-file .*nowhere: No such file"):
        load_api_keys(ServerConfig(api_key_file=str(tmp_path / "nowhere")), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00secret")
    with pytest.raises(ConfigError, match="it is not text") as error:
        load_api_keys(ServerConfig(api_key_file=str(tmp_path / "binary")), {})
    assert "secret" not in str(error.value)


def test_several_keys_on_the_command_line_and_none_in_print(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("test", "")
    parser.add_config(ServerConfig, "server")
    parsed = parser.parse(["--api-key", "secret-1", "secret-2", "--api-key=secret-3", "--port", "1"])
    config = parser.make_config(ServerConfig, parsed)
    assert config == ServerConfig(api_key=("secret-1", "secret-2", "secret-3"), port=1)
    assert "secret" not in repr(config)
    keys = load_api_keys(config, {})
    assert "secret" not in repr(keys) + str(vars(keys))
    with pytest.raises(SystemExit):
        parser.parse(["--api-kye=secret-4"])
    with pytest.raises(SystemExit):
        parser.make_config(ServerConfig, parser.parse(["--api-key", "secret-5", "--port", "99999"]))
    assert "secret" not in capsys.readouterr().err
