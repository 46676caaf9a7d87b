"""A tokenizer of whole words, w3 being token 3."""

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers


def tiny_tokenizer(vocabulary: int = 128) -> tf.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def words(first: int, count: int, vocabulary: int = 128) -> str:
    return " ".join(f"w{3 + (first + 7 * number) % (vocabulary - 3)}" for number in range(count))
