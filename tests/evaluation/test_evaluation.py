"""Evaluation on no more tokens than a model takes."""

import pytest
import transformers as tf
from tiny_tokenizer import tiny_tokenizer, words

from optimum_scap import SCAPError
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.evaluation.speed import check_length


def gpt2() -> tf.GPT2LMHeadModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=20)).eval()


def test_windows_are_no_longer_than_the_model() -> None:
    model, text = gpt2(), words(0, 100)
    assert perplexity(model, tiny_tokenizer(), text) == perplexity(model, tiny_tokenizer(), text, window=20)
    samples = token_samples(tiny_tokenizer(), text, window=512, model=model)
    assert [ids.shape for ids in samples] == [(1, 20)] * 5
    assert [ids.shape for ids in token_samples(tiny_tokenizer(), text, window=64)] == [(1, 64), (1, 36)]


def test_a_benchmark_of_more_tokens_than_the_model_takes_is_refused() -> None:
    check_length("dense", gpt2(), 20)
    with pytest.raises(SCAPError, match="ask for 21 tokens in all, the dense model takes 20"):
        check_length("dense", gpt2(), 21)
