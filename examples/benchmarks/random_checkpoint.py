"""Writes a sparse PyTorch checkpoint of a well-known shape with random weights, to measure how checkpoints run.

    python examples/benchmarks/random_checkpoint.py FOLDER --shape llama-7b --layers 12 --weights int4
    optimum-cli scap benchmark FOLDER --prompt-tokens 128 512
    python examples/generate_gpu.py FOLDER "w3 w4 w5"

Thresholds are calibrated on random tokens, so that the sparsity is real. Its tokenizer knows the words w3, w4, ...
"""

from pathlib import Path

import torch
from gpu_decode import QUANTIZED, SPECS
from random_models import SHAPES, random_llama
from random_quantized import quantize
from scaffold import new_parser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_scap import SCAPConfig, sparsify_activations


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Of whole words, w3 being token 3."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="instead of those of the shape")
    parser.add_argument("--weights", choices=("dense", *QUANTIZED), default="dense")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--scap", default=next(iter(SPECS.values())))
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_llama(arguments.shape, device, getattr(torch, arguments.dtype), arguments.layers)
    if arguments.weights in QUANTIZED:
        quantize(model, QUANTIZED[arguments.weights])
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    calibration = [{"input_ids": torch.randint(vocabulary, (1, 512), generator=generator)} for _ in range(4)]
    sparsify_activations(model, SCAPConfig.from_spec(arguments.scap), calibration)
    model.save_pretrained(arguments.folder)
    word_tokenizer(vocabulary).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
