"""Weight quantization and SCAP in one script: INT8 or INT4 weights, then activation sparsity on top of them.

With `--framework torch` the result is a PyTorch checkpoint with weights as compressed-tensors stores them.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_scap import SCAPConfig, sparsify_activations


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model on the Hub or a local folder")
parser.add_argument("output", type=Path)
parser.add_argument("--framework", choices=("openvino", "torch"), default="openvino")
parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
parser.add_argument("--group-size", type=int, default=128, help="group size of INT4 weights")
parser.add_argument("--scap", default="up=0.35,gate=0.35,down=0.55")
parser.add_argument("--dataset", default="auto", help="a dataset name, a text file, or auto")
parser.add_argument("--num-samples", type=int, default=64)
arguments = parser.parse_args()

# 1. Compress the weights. (A PyTorch model that is quantized already is loaded as ever.)
if arguments.framework == "openvino":
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(
        bits=arguments.bits, group_size=arguments.group_size if arguments.bits == 4 else -1
    )
    model = OVModelForCausalLM.from_pretrained(arguments.model, export=True, quantization_config=quantization)
else:
    from optimum_scap.torch.quantize import quantize_weights

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    quantize_weights(model, f"int{arguments.bits}", arguments.group_size if arguments.bits == 4 else None)

# 2. Sparsify the activations: calibrated on the quantized model, which is the one that will run.
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
config = SCAPConfig.from_spec(arguments.scap, num_samples=arguments.num_samples)
sparsify_activations(model, config, arguments.dataset, tokenizer=tokenizer)

# 3. Save: a folder that stock OVModelForCausalLM loads, or, once optimum_scap is imported, AutoModelForCausalLM.
model.save_pretrained(arguments.output)
tokenizer.save_pretrained(arguments.output)

inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
