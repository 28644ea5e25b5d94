"""Flags, help and errors of the commands; what they do is tested elsewhere."""

from __future__ import annotations

import dataclasses
import importlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minivllm import cli
from minivllm.config import EngineConfig, ServerConfig, flag
from minivllm.flags import Parser
from minivllm_bench import cli as bench
from tests.tiny_model import write_tiny_model


def engine_config(*argv: str) -> EngineConfig:
    parser = Parser("test", "")
    parser.add_config(EngineConfig, "engine")
    parser.add_preset()
    return parser.make_config(EngineConfig, parser.parse(argv))


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_no_flags_are_the_defaults() -> None:
    assert engine_config() == EngineConfig()


def test_every_kind_of_flag() -> None:
    assert engine_config(
        "--model", "a/b", "--max-num-seqs", "7", "--kv-cache-memory", "64MB", "--gpu-memory-utilization=0.5",
        "--no-enable-prefix-caching", "--dtype", "bfloat16",
    ) == EngineConfig(
        model="a/b", max_num_seqs=7, kv_cache_memory=64_000_000, gpu_memory_utilization=0.5,
        enable_prefix_caching=False, dtype="bfloat16",
    )  # fmt: skip


def test_the_preset_is_overridden_by_flags() -> None:
    preset = engine_config("--preset", "ollama")
    assert (preset.scheduler, preset.kv_allocation, preset.num_slots) == ("sequential", "contiguous", 1)
    mixed = engine_config("--kv-allocation", "paged", "--preset", "ollama")
    assert (mixed.scheduler, mixed.kv_allocation) == ("sequential", "paged")


@pytest.mark.parametrize(
    ("command", "configs"),
    [("serve", (EngineConfig, ServerConfig)), ("chat", (EngineConfig,)), ("generate", (EngineConfig,))],
)
def test_every_flag_is_explained(
    command: str, configs: tuple[type, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for config in configs:
        for field in dataclasses.fields(config):
            assert flag(field.name) in text
            has_default = "default:" in field.metadata["help"] or field.default is not None
            assert has_default, f"{field.name} says nothing about its default"


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_every_flag_of_a_benchmark_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["bench", command, "--help"])
    assert e.value.code == 0
    words = capsys.readouterr().out.split()
    assert f"minivllm bench {command}" in " ".join(words)
    assert any(word.startswith("--") for word in words)


def test_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["bench", "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for name in bench.COMMANDS:
        assert f"\n  {name} " in text or f"\n    {name} " in text


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["serve", "--max-num-seq", "3"], ["--max-num-seq;", "did you mean --max-num-seqs?"]),
        (["serve", "--zzz=3"], ["unknown argument --zzz", "serve --help"]),
        (["chat", "--temprature", "3"], ["did you mean --temperature?"]),
        (["serve", "stray"], ["unknown argument stray"]),
        (["serve", "--max-num-seqs", "0"], ["--max-num-seqs must be at least 1, got 0"]),
        (["serve", "--shutdown-timeout", "nan"], ["--shutdown-timeout must be a finite number, got nan"]),
        (["serve", "--served-model-name", ""], ["--served-model-name must be a name"]),
        (["serve", "--port", "70000"], ["--port must be from 0 to 65535, got 70000"]),
        (["serve", "--kv-cache-memory", "64QB"], ["--kv-cache-memory", "64QB", "64MB"]),
        (["serve", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["serve", "--quantization", "int3"], ["--quantization", "int3", "int8"]),
        (["serve", "--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5"]),
        (
            ["serve", "--kv-allocation", "contiguous", "--enable-prefix-caching"],
            ["--enable-prefix-caching needs --kv-allocation paged"],
        ),
        (["generate"], ["prompt"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(argv, capsys)
    for part in parts:
        assert part in line


def test_wrong_sampling_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--temperature", "-1"]) == 2
    line = capsys.readouterr().err
    assert "temperature must be at least 0.0, got -1.0" in line
    assert len(line.splitlines()) == 1


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["sevre"])
    assert e.value.code == 2
    assert "serve" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["serve"], ["bench", "serve"]])
def test_version(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([*command, "--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"minivllm {importlib.import_module('minivllm').__version__}\n"


def test_the_version_is_written_once() -> None:
    """pyproject.toml takes it from the package."""
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'version = { attr = "minivllm.__version__" }' in pyproject


def run_command(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minivllm.cli", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_generate_prints_the_completion() -> None:
    result = run_command("generate", "The capital of France is", "--max-tokens", "5")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_who_reads_the_output_may_leave() -> None:
    command = [sys.executable, "-m", "minivllm.cli", "generate", "Once upon a time", "--max-tokens", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minivllm.cli", "generate", "x", "--max-tokens", "2"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "minivllm generate: error: [Errno 28] No space left on device\n"


def test_standard_error_may_be_closed() -> None:
    script = 'exec "$0" -m minivllm.cli generate "The capital of France is" --max-tokens 5 2>&- <&-'
    result = subprocess.run(
        ["sh", "-c", script, sys.executable], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert (result.returncode, "Paris" in result.stdout) == (0, True)


def test_generate_says_what_is_wrong_with_a_prompt() -> None:
    result = run_command("generate", "")
    assert result.returncode == 2
    assert result.stderr == "minivllm generate: error: the prompt must have at least 1 token, got 0\n"


def test_a_conversation() -> None:
    """Two questions, the second of which needs the first; then a reset, which forgets."""
    talk = "Name the capital of France.\n/reset\n\nName the capital of France.\n/exit\nnever read\n"
    result = run_command("chat", stdin=talk)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The capital of France is Paris.") == 2
    assert "(forgotten)" in result.stdout


def test_a_chat_template_for_a_model_without_one(tmp_path: Path) -> None:
    model, template = write_tiny_model(tmp_path), tmp_path / "given.jinja"
    template.write_text("{{ messages[-1].content }}")
    command = ["chat", "--model", model, "--load-format", "dummy", "--device", "cpu", "--max-tokens", "2"]
    result = run_command(*command, stdin="hello\n/exit\n")
    assert "start serve or chat with --chat-template FILE" in result.stdout
    result = run_command(*command, "--chat-template", str(template), stdin="hello\n/exit\n")
    assert (result.returncode, "has no chat template" in result.stdout) == (0, False), result.stderr
    template.write_text("{% if")
    result = run_command(*command, "--chat-template", str(template))
    assert (result.returncode, "loading" in result.stdout) == (1, False)
    assert f"{template}: the chat template isn't valid Jinja, line 1" in result.stderr


def _next_char(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    char = process.stdout.read(1)
    assert char, "it has ended"
    return char


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    chat = subprocess.Popen(
        [sys.executable, "-u", "-m", "minivllm.cli", "chat", "--max-tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = threading.Timer(180, chat.kill)
    deadline.start()
    try:
        assert chat.stdin is not None
        chat.stdin.write("Write a very long story about a whale.\n")
        chat.stdin.flush()
        read = ""
        while len(read.partition("> ")[2]) < 20:  # the answer has begun
            read += _next_char(chat)
        chat.send_signal(signal.SIGINT)
        while "(stopped)" not in read:
            read += _next_char(chat)
        rest, _ = chat.communicate("Name the capital of France.\n/exit\n")
        assert chat.returncode == 0
        assert "Paris" in rest
    finally:
        deadline.cancel()
        chat.kill()
        chat.wait()
