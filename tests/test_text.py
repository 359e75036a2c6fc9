"""Offsets cut the response back into its tokens, whatever the tokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts.text import EncodedText, TextEncoder, TextError
from tests.tiny import byte_fallback_tokenizer, byte_level_tokenizer, save_tokenizer

RESPONSES = [
    "The capital of Japan is Tokyo.",
    "  two  spaces\n\nand lines\t",
    "日本の首都は東京です。",
    "party 🎉🎉 done 👩‍👩‍👧",
    "é",
    "🎉",
    "<|im_end|>",
    "x" * 300,
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("byte-level")
    save_tokenizer(folder, byte_level_tokenizer())
    _write_config(folder)
    return TextEncoder(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("byte-fallback")
    save_tokenizer(folder, byte_fallback_tokenizer(), bos="<s>")
    _write_config(folder)
    return TextEncoder(folder)


def _write_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _check_cut(text: EncodedText, response: str) -> None:
    pieces = [response[token.start : token.end] for token in text.tokens]
    assert "".join(pieces) == response
    assert [token.token_id for token in text.tokens] == text.token_ids[text.response_start :]
    position = 0
    for token in text.tokens:
        assert token.start == position
        position = token.end


@pytest.mark.parametrize("response", RESPONSES)
def test_byte_level(byte_level: TextEncoder, response: str) -> None:
    text = byte_level.encode("Q: ", response, rendered=False)
    _check_cut(text, response)
    assert b"".join(token.raw for token in text.tokens) == response.encode()


@pytest.mark.parametrize("response", RESPONSES)
def test_byte_fallback(byte_fallback: TextEncoder, response: str) -> None:
    text = byte_fallback.encode("the ", response, rendered=False)
    _check_cut(text, response)


def test_lone_byte_fallback_token(byte_fallback: TextEncoder) -> None:
    # One character, three byte tokens: the last one has it, the others are empty.
    text = byte_fallback.encode("the", "東", rendered=False)
    tokens = [token for token in text.tokens if token.raw != b""]
    assert [token.raw for token in tokens][-3:] == [b"\xe6", b"\x9d", b"\xb1"]
    assert [(token.start, token.end) for token in text.tokens][-3:] == [(0, 0), (0, 0), (0, 1)]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_cut_whole(byte_level: TextEncoder, response: str) -> None:
    _check_cut(byte_level.encode("Q: ", response, rendered=False), response)


def test_the_prompt_keeps_its_own_tokens(byte_level: TextEncoder) -> None:
    # " capital" is one token in a text; cut within it, the prompt's tokens must stay as they are.
    alone = byte_level.encode("The cap", "x", rendered=False)
    joined = byte_level.encode("The cap", "ital of", rendered=False)
    start = alone.response_start
    assert joined.token_ids[:start] == alone.token_ids[:start]
    _check_cut(joined, "ital of")


def test_chat_template(byte_level: TextEncoder) -> None:
    prompt = byte_level.render([{"role": "user", "content": "Hi"}])
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.encode(prompt, "Hello", rendered=True).tokens[0].start == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('roles must alternate') }}", "must alternate"), (None, "send a prompt")],
)
def test_template_errors_are_the_authors(
    byte_level: TextEncoder, monkeypatch: pytest.MonkeyPatch, template: str | None, message: str
) -> None:
    monkeypatch.setattr(byte_level._tokenizer, "chat_template", template)
    with pytest.raises(TextError, match=message):
        byte_level.render([{"role": "user", "content": "Hi"}])


def test_an_empty_prompt_begins_with_the_beginning(byte_level: TextEncoder) -> None:
    text = byte_level.encode("", "Tokyo", rendered=False)
    assert text.response_start == 1
    assert text.token_ids[0] == 0  # <|im_start|>, this tokenizer's beginning-of-text token
