"""Prompts to token ids: what a tokenizer puts around them, and what a chat template asks for."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.text import chat_token_ids, encode_prompt, load_tokenizer

VOCAB = {"<s>": 0, "</s>": 1, "[": 2, "]": 3, ">": 4, "a": 5, ",": 6, "<unk>": 7}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} [ {{ m['content'] }} ]{% endfor %}"
    "{% if add_generation_prompt %} >{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As of Llama 3: <s> in front of every text, and in the template too."""
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, clean_up_tokenization_spaces=True, **special
    )
    fast.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("words")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def test_a_prompt_has_what_the_tokenizer_puts_around_it(tokenizer):
    assert encode_prompt("a , a", tokenizer, len(VOCAB)).tolist() == [0, 5, 6, 5]


def test_a_chat_begins_once_and_asks_for_the_answer(tokenizer):
    assert chat_token_ids("a", tokenizer) == [0, 2, 5, 3, 4]


def test_text_is_not_tidied_up(tokenizer):
    """It would rewrite what was shown already."""
    assert tokenizer.decode([5, 6, 5]) == "a , a"


def test_there_may_be_no_tokenizer_and_no_template(tokenizer, tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match="chat needs a checkpoint with a tokenizer"):
        chat_token_ids("a", None)
