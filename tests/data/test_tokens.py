"""Word pieces of transcripts."""

import pytest

from mvqkd.data.tokens import TokenSettings, load_tokens, train_tokens
from mvqkd.errors import RecipeError


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_pieces_in_icefalls_layout(plain_cuts, tmp_path, model_type):
    folder = tmp_path / "lang"
    train_tokens(plain_cuts, folder, TokenSettings(60, model_type))
    tokens = load_tokens(folder)
    table = [line.split() for line in (folder / "tokens.txt").read_text().splitlines()]
    assert [name for name, _ in table[:3]] == ["<blk>", "<sos/eos>", "<unk>"]
    assert [int(index) for _, index in table] == list(range(len(tokens)))
    assert len(tokens) <= 60
    for cut in plain_cuts:
        text = cut.supervisions[0].text
        assert min(tokens.encode(text)) > 2
        assert tokens.decode(tokens.encode(text)) == text


def test_more_pieces_than_the_words_yield(plain_cuts, tmp_path):
    train_tokens(plain_cuts, tmp_path / "lang", TokenSettings(5000))
    assert len(load_tokens(tmp_path / "lang")) < 5000


def test_too_few_pieces_leave_nothing(plain_cuts, tmp_path):
    with pytest.raises(RecipeError, match=r"^tokens.vocab_size: 5 does not suit") as caught:
        train_tokens(plain_cuts, tmp_path / "lang", TokenSettings(5))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"bpe.model: no such file"):
        load_tokens(tmp_path)
    (tmp_path / "bpe.model").write_bytes(b"no model")
    with pytest.raises(RecipeError, match=r"bpe.model: is no .*; remove .* run stage 0"):
        load_tokens(tmp_path)
