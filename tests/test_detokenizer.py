"""The detokenizer against decoding everything at once, for three kinds of tokenizer."""

import re
from codecs import getincrementaldecoder

from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.detokenizer import MAX_INCOMPLETE, WINDOW, Detokenizer

SPECIAL = b""  # decodes to nothing when special tokens are skipped


class ByteTokenizer:
    """Token i is the i-th byte string, as in byte-level BPE."""

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.num_decoded: list[int] = []

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        self.num_decoded.append(len(token_ids))
        return b"".join(self.tokens[i] for i in token_ids).decode("utf-8", "replace")


class SpaceStrippingTokenizer(ByteTokenizer):
    """Drops one space in front of whatever it decodes, as sentencepiece does."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return super().decode(token_ids, skip_special_tokens).removeprefix(" ")


class ByteFallbackTokenizer(ByteTokenizer):
    """A run of one-byte tokens is a text or, if it is none, one U+FFFD per byte, as in Llama 2."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        def run(match: re.Match[bytes]) -> bytes:
            try:
                return match[0].decode().encode()
            except UnicodeDecodeError:
                return "\ufffd".encode() * len(match[0])

        self.num_decoded.append(len(token_ids))
        text, pending = b"", b""
        for token in [*(self.tokens[i] for i in token_ids), b"  "]:
            if len(token) == 1:
                pending += token
            elif token:
                text += re.sub(b"(?s).+", run, pending) + token
                pending = b""
        return text[:-2].decode()


utf8_decoder = getincrementaldecoder("utf-8")  # gives whole characters only
texts = st.text(
    st.sampled_from("ab  \n\0éß語日本한😀👩\u200d🚀\u0301\ufe0f")
    | st.characters(exclude_categories=["Cs"]),
    max_size=40,
).map(lambda text: text.replace("\ufffd", "?"))
stops = st.lists(st.text("ab é語", min_size=1, max_size=4), max_size=3)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[bytes]:
    """Bytes of a text, cut anywhere into tokens of 0 (special) to 5 bytes."""
    data, tokens = draw(texts).encode(), []
    while data:
        size = draw(st.integers(0, 5))
        tokens.append(data[:size])
        data = data[size:]
    return tokens


def cut_at_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Reading one character at a time, what is before the first stop string to be complete."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(detokenizer: Detokenizer, num_tokens: int) -> list[str]:
    pieces = [detokenizer.push(i) for i in range(num_tokens)]
    pieces.append(detokenizer.finish())
    assert detokenizer.finish() == "" and detokenizer.text == "".join(pieces)
    return pieces


@settings(max_examples=100)
@given(tokens=cut_texts(), stop=stops)
@example(tokens=[b"aab", b"ab"], stop=["aba"])  # the held part must shrink to a later beginning
@example(tokens=[b"a", b"bab"], stop=["abab", "ba"])  # the one that ends first counts
@example(tokens=["語".encode()[:2], "語".encode()[2:] + b"a"], stop=["語a"])
def test_text_is_everything_decoded_up_to_the_stop(tokens: list[bytes], stop: list[str]) -> None:
    detokenizer = Detokenizer(ByteTokenizer(tokens), stop)
    run(detokenizer, len(tokens))
    wanted = cut_at_stop(b"".join(tokens).decode(), stop)
    assert (detokenizer.text, detokenizer.stopped) == wanted


@settings(max_examples=100)
@given(tokens=cut_texts(), stop=stops)
def test_what_is_shown_never_belongs_to_a_stop_string(tokens: list[bytes], stop: list[str]) -> None:
    detokenizer, decoder = Detokenizer(ByteTokenizer(tokens), stop), utf8_decoder()
    beginnings = {s[:n] for s in stop for n in range(1, len(s))}
    for i in range(len(tokens)):
        detokenizer.push(i)
        shown = detokenizer.text
        text, _ = cut_at_stop(decoder.decode(b"".join(tokens[: i + 1])), stop)
        decoder.reset()
        assert text.startswith(shown)
        assert shown == text or text[len(shown) :] in beginnings


@settings(max_examples=100)
@given(tokens=cut_texts(), stop=stops, num_pushed=st.just(0) | st.integers(0, 60))
@example(tokens=[b"a"] * 40 + [b"\xe8", b"\xaa\x9e"], stop=[], num_pushed=41)  # amid a character
def test_the_last_tokens_come_with_the_end(
    tokens: list[bytes], stop: list[str], num_pushed: int
) -> None:
    tokenizer, token_ids = ByteTokenizer(tokens), list(range(len(tokens)))
    detokenizer = Detokenizer(tokenizer, stop)
    for token_id in token_ids[:num_pushed]:
        detokenizer.push(token_id)
    num_before = len(tokenizer.num_decoded)
    detokenizer.finish(*token_ids[num_pushed:])
    assert len(tokenizer.num_decoded) <= num_before + 1
    assert detokenizer.finish() == ""
    wanted = cut_at_stop(b"".join(tokens).decode(), stop)
    assert (detokenizer.text, detokenizer.stopped) == wanted


@settings(max_examples=100)
@given(tokens=cut_texts(), prompt=cut_texts())
@example(tokens=[b"\x80\x80"], prompt=[b"a", b"\xf0\x9f\x98"[:1] + b"\x9f"])  # half in the prompt
def test_whole_characters_are_shown_at_once(tokens: list[bytes], prompt: list[bytes]) -> None:
    tokenizer = ByteTokenizer(tokens + prompt)
    prompt_ids = list(range(len(tokens), len(tokens) + len(prompt)))
    detokenizer = Detokenizer(tokenizer, (), prompt_ids)
    decoder = utf8_decoder()
    decoder.decode(b"".join(prompt))
    for i, token in enumerate(tokens):
        assert detokenizer.push(i) == decoder.decode(token)


any_bytes = st.binary(min_size=1, max_size=3) | st.sampled_from(
    [b"\xff", b"\xe8\xaa", b"\x9e", b"a\xe8"]
)


@settings(max_examples=100)
@given(tokens=st.lists(any_bytes, max_size=80))
@example(tokens=[b"\xff"] * 60 + [b"\xe8", b"\xaa", b"\x9e", b"a"])  # garbage, then a character
@example(tokens=[b"\x9ea\xe8\xaa"] * 60)  # no token ever ends a character
@example(tokens=["\ufffd".encode()] * 60)  # the character itself
def test_any_bytes_cost_a_bounded_window(tokens: list[bytes]) -> None:
    tokenizer = ByteTokenizer(tokens)
    detokenizer = Detokenizer(tokenizer)
    run(detokenizer, len(tokens))
    assert detokenizer.text == b"".join(tokens).decode("utf-8", "replace")
    assert max(tokenizer.num_decoded) <= 3 * WINDOW + 2
    assert len(tokenizer.num_decoded) <= 2 * len(tokens) + 3 + MAX_INCOMPLETE


def test_many_special_tokens_cost_a_bounded_window() -> None:
    tokenizer = ByteTokenizer([b"a", *[SPECIAL] * 60, b"b"])
    assert "".join(run(Detokenizer(tokenizer), 62)) == "ab"
    assert max(tokenizer.num_decoded) <= 3 * WINDOW + 2


@given(words=st.lists(st.sampled_from([" a", " b", "c", " ", "é"]), max_size=40))
def test_spaces_survive_a_tokenizer_that_strips_them(words: list[str]) -> None:
    tokenizer = SpaceStrippingTokenizer([word.encode() for word in words])
    pieces = run(Detokenizer(tokenizer), len(words))
    assert "".join(pieces) == "".join(words).removeprefix(" ")


def test_leading_space_is_kept_after_a_prompt() -> None:
    tokenizer = SpaceStrippingTokenizer([b" is", b" Paris", b" The"])
    assert Detokenizer(tokenizer, (), [2, 0]).push(1) == " Paris"
    assert Detokenizer(tokenizer).push(1) == "Paris"


@given(text=texts, data=st.data())
def test_byte_fallback_runs(text: str, data: st.DataObject) -> None:
    tokens: list[bytes] = []
    for word in re.findall(r"(?s).{1,3}", text):
        word_bytes = word.encode()
        is_run = len(word_bytes) == 1 or data.draw(st.booleans())
        tokens += [bytes([b]) for b in word_bytes] if is_run else [word_bytes]
    run(detokenizer := Detokenizer(ByteFallbackTokenizer(tokens)), len(tokens))
    assert detokenizer.text == text


runs = st.text("ab 語日éß😀", min_size=1, max_size=12)


@given(prompt=runs, text=runs, is_text=st.booleans(), num_pushed=st.integers(0, 50))
@example(prompt="a 語語語", text="語語b", is_text=True, num_pushed=50)
@example(prompt="😀😀😀", text="😀", is_text=False, num_pushed=0)
def test_a_run_of_bytes_goes_on_from_the_prompt(prompt, text, is_text, num_pushed) -> None:
    """Where the window begins in a character the run is no text, whatever comes."""
    tokens = [bytes([b]) for b in (prompt + text).encode()]
    ids = range(len(tokens))
    first = len(prompt.encode())
    detokenizer = Detokenizer(ByteFallbackTokenizer(tokens), (), ids[:first], is_text=is_text)
    for i in ids[first : first + num_pushed]:
        detokenizer.push(i)
    detokenizer.finish(*ids[first + num_pushed :])
    assert detokenizer.text == text


@given(text=runs, last=st.sampled_from("語é😀"), data=st.data())
@example(text="xx語語語", last="語", data=None)
def test_an_end_in_a_character_costs_that_character_alone(text, last, data) -> None:
    num_bytes = len(last.encode())
    num_left = 1 if data is None else data.draw(st.integers(1, num_bytes - 1))
    tokens = [bytes([b]) for b in (text + last).encode()][:-num_left]
    num_pushed = len(tokens) if data is None else data.draw(st.integers(0, len(tokens)))
    detokenizer = Detokenizer(ByteFallbackTokenizer(tokens))
    for i in range(num_pushed):
        detokenizer.push(i)
    detokenizer.finish(*range(num_pushed, len(tokens)))
    assert detokenizer.text.rstrip("\ufffd") == text
    assert 1 <= len(detokenizer.text) - len(text) <= num_bytes - num_left


def test_held_back_text_comes_at_the_end() -> None:
    detokenizer = Detokenizer(ByteTokenizer([b"x<|e", b"nd", b"\xe8\xaa"]), ["<|end|>"])
    assert [detokenizer.push(i) for i in range(3)] == ["x", "", ""]
    assert detokenizer.finish() == "<|end\ufffd" and detokenizer.stopped is None


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(ByteTokenizer([b"a#", b"#b", b"c"]), ["##"])
    assert [detokenizer.push(i) for i in (0, 1, 2)] == ["a", "", ""]
    assert (detokenizer.stopped, detokenizer.finish(), detokenizer.text) == ("##", "", "a")


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, ["a"], [1])
    assert (detokenizer.push(1), detokenizer.finish(), detokenizer.text) == ("", "", "")
