"""Tokenizers from a model's files, against transformers and sentencepiece, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig, RopeConfig
from minivllm.tokenizer.load import load_tokenizer
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.weights.embedded import embedded_model_path
from minivllm.weights.files import ModelFiles

from .vocabularies import HARD_TEXTS, sentencepiece_model

TEMPLATE = "{% for message in messages %}{{ bos_token }}{{ message.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
    "pad_token": None,
    "mask_token": "<mask>",
    "chat_template": TEMPLATE,
}


def load(path: Path, *, vocab_size: int = 5000, kind: Any = "safetensors", **options: Any) -> Tokenizer:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        dtype="float32",
    )
    return load_tokenizer(ModelFiles(name="m", path=path, kind=kind, config=config), **options)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def trained() -> tokenizers.Tokenizer:
    """A small byte-level tokenizer whose texts begin with ``<s>``, as a Llama 3's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(json.__file__).read_text()], trainer)
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.enable_truncation(8)
    backend.enable_padding(length=4)
    return backend


@pytest.fixture
def folder(tmp_path: Path, trained: tokenizers.Tokenizer) -> Path:
    """With ``tokenizer.json`` and ``tokenizer_config.json``."""
    trained.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", SETTINGS)
    return tmp_path


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """``tokenizer.model``, and the two files that tell transformers what it is."""
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": TEMPLATE}
    write_json(tmp_path / "tokenizer_config.json", settings)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    return tmp_path


@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_tokenizer_json_works_as_in_transformers(folder: Path, adds_bos: bool | None) -> None:
    from transformers import AutoTokenizer

    if adds_bos is not None:
        write_json(folder / "tokenizer_config.json", SETTINGS | {"add_bos_token": adds_bos})
    write_json(folder / "config.json", {"model_type": "llama"})
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = load(folder)
    for text in [*HARD_TEXTS, "a<tool>b", "a <mask> b"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert ids[0] == 0
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.special_tokens == reference.special_tokens_map
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES) == expected == "<s>hi"


def test_older_files_for_special_and_added_tokens(folder: Path, trained: tokenizers.Tokenizer) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": "<tool>"})
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    size = trained.get_vocab_size()
    write_json(folder / "added_tokens.json", {"<tool>": size - 1, "<two>": size + 1, "<one>": size})
    tokenizer = load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.encode("<one><two>", add_special_tokens=False) == [size, size + 1]
    assert tokenizer.decode([size, 0, size + 1]) == "<one><two>"


def test_added_tokens_of_the_settings_keep_their_ids(folder: Path, trained: tokenizers.Tokenizer) -> None:
    size = trained.get_vocab_size()
    listed = {str(size): {"content": "<pad>", "special": True}, "0": {"content": "<s>", "special": True}}
    write_json(folder / "tokenizer_config.json", SETTINGS | {"added_tokens_decoder": listed})
    tokenizer = load(folder, vocab_size=size)  # one row too few, for a token that no text becomes by itself
    assert tokenizer.encode("<pad>", add_special_tokens=False) == [size]
    assert size in tokenizer.special_token_ids

    listed = {str(size + 7): {"content": "<pad>"}}
    write_json(folder / "tokenizer_config.json", SETTINGS | {"added_tokens_decoder": listed})
    with pytest.raises(ModelLoadError, match=f"'<pad>' has the id {size + 7} here, but {size} in the vocab"):
        load(folder)


def test_a_token_with_a_role_is_special(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", SETTINGS | {"eos_token": "<tool>", "pad_token": "<nowhere>"})
    tokenizer = load(folder)
    (token_id,) = tokenizer.encode("<tool>", add_special_tokens=False)
    assert tokenizer.decode([token_id]) == ""
    assert len(tokenizer.encode("<nowhere>", add_special_tokens=False)) > 1


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"chat_template": TEMPLATE}, {}, "<s>hi"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "yes"},
                ]
            },
            {},
            "yes",
        ),
        ({"chat_template": [{"name": "tool_use", "template": "no"}]}, {}, None),
        ({"chat_template": None}, {"chat_template.json": '{"chat_template": "older"}'}, "older"),
        ({"chat_template": "no"}, {"chat_template.json": '{"chat_template": "older"}'}, "no"),
        ({"chat_template": "no"}, {"chat_template.jinja": "its own file"}, "its own file"),
        ({}, {}, None),
    ],
)
def test_where_chat_templates_are_found(
    folder: Path, settings: dict[str, Any], files: dict[str, str], expected: str | None
) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>"} | settings)
    for name, text in files.items():
        (folder / name).write_text(text)
    tokenizer = load(folder)
    assert (tokenizer.chat_template is None) == (expected is None)
    if expected is not None:
        assert tokenizer.apply_chat_template(MESSAGES) == expected


def test_a_chat_template_may_be_given(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.jinja"
    source = "given: {{ messages[0].content }}é{% if tools %}with tools{% endif %}"
    given.write_text(source, encoding="utf-8")
    tokenizer = load(folder, chat_template=given)
    assert tokenizer.apply_chat_template(MESSAGES) == "given: hié"
    assert tokenizer.chat_template == source
    assert tokenizer.chat_template_takes_tools
    assert not load(folder).chat_template_takes_tools


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        (b"{% if", "isn't valid Jinja, line 1"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_bad_given_chat_template_is_refused(folder: Path, content: bytes | None, message: str) -> None:
    given = folder / "given.jinja"
    if content is not None:
        given.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message) as e:
        load(folder, chat_template=given)
    assert str(e.value).startswith(f"{given}: ")


def test_sentencepiece_model_works_as_in_sentencepiece(sentencepiece_folder: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=sentencepiece_model())
    tokenizer = load(sentencepiece_folder)
    assert tokenizer.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for text in HARD_TEXTS:
        # transformers takes a leading space for the one that SentencePiece puts before every text.
        if "<s>" not in text and not text.startswith(" "):
            ids = tokenizer.encode(text)
            assert ids == [1, *processor.encode(text)]
            assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>hi"


def test_one_of_several_templates_beside_a_sentencepiece_model(sentencepiece_folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": named}
    write_json(sentencepiece_folder / "tokenizer_config.json", settings)
    assert load(sentencepiece_folder).apply_chat_template(MESSAGES) == "<s>hi"


def test_other_files_go_through_transformers(tmp_path: Path, trained: tokenizers.Tokenizer) -> None:
    trained.model.save(str(tmp_path))  # vocab.json and merges.txt
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
        | {"chat_template": TEMPLATE},
    )
    tokenizer = load(tmp_path)
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        if "<" not in text:
            assert ids == load_plain(trained).encode(text).ids
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>hi"


def load_plain(trained: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary without BOS, truncation and padding."""
    plain = tokenizers.Tokenizer(trained.model)
    plain.pre_tokenizer = trained.pre_tokenizer
    return plain


def test_a_tokenizer_model_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("this is no model")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(ModelLoadError, match="transformers can't read the tokenizer") as e:
        load(tmp_path)
    assert str(e.value).startswith(f"{tmp_path}: ")


def test_a_gguf_file_brings_its_tokenizer() -> None:
    path = embedded_model_path()
    for kind in ("gguf", "dummy"):
        tokenizer = load(path, vocab_size=49152, kind=kind)
        assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
        assert tokenizer.chat_template is not None
    with pytest.raises(ModelLoadError, match="49152 tokens, but the embedding only 49151 rows") as e:
        load(path, vocab_size=49151, kind="gguf")
    assert str(e.value).startswith(f"{path}: ")


def test_random_weights_need_no_tokenizer(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, vocab_size=1000, kind="dummy")
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("é a") == list("é a".encode())
    assert tokenizer.decode([*"é".encode(), 999]) == "é<999>"
    with pytest.raises(ModelLoadError, match=r"no tokenizer found: there must be one of tokenizer\.json"):
        load(tmp_path, kind="safetensors")


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"600 tokens, but the embedding only 599 rows") as e:
        load(folder, vocab_size=599)
    assert str(e.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", '{"model": 7}', "not a tokenizer"),
        ("tokenizer.json", "", "not a tokenizer"),
        ("tokenizer_config.json", "{", "malformed JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder is malformed"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {"text": "a"}}}',
            "added_tokens_decoder is malf",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is malformed"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template must be a string, got int"),
        ("special_tokens_map.json", "nonsense", "malformed JSON"),
    ],
)
def test_malformed_files_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match=message) as e:
        load(folder)
    assert name in str(e.value)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_sentencepiece_model_is_refused(sentencepiece_folder: Path, cut: int) -> None:
    write_json(sentencepiece_folder / "config.json", {"model_type": "llama"})
    (sentencepiece_folder / "tokenizer.model").write_bytes(sentencepiece_model()[:cut])
    with pytest.raises(ModelLoadError) as e:
        load(sentencepiece_folder)
    assert str(e.value).startswith(str(sentencepiece_folder))


def test_importing_is_light() -> None:
    code = (
        "import sys, minivllm.tokenizer, minivllm.completion;"
        "print([m for m in ('torch', 'transformers', 'jinja2', 'gguf', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
