"""Perplexity of a sparse OpenVINO model by how wide groups of activations are, which share a scale in one byte each.

    python examples/benchmarks/activation_groups.py SPARSE evaluation.txt --max-tokens 6144

OpenVINO's DYNAMIC_QUANTIZATION_GROUP_SIZE says it, for its own layers and for the C++ operations; 0 is no quantization
in the former and two bytes in the latter. `default` says nothing. All are compared with float32 throughout.
"""

from pathlib import Path

from scaffold import new_parser, write
from transformers import AutoTokenizer

from optimum_scap import OVModelForCausalLM
from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.perplexity import perplexity
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.openvino.inference import EXACT


FLOAT32, DEFAULT = "float32", "default"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="sparse OpenVINO folder")
    parser.add_argument("evaluation", type=Path, help="text file")
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 32, 128])
    arguments = parser.parse_args()

    configs = {FLOAT32: dict(EXACT), DEFAULT: {}} | {
        f"groups of {size}": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(size)} for size in arguments.groups
    }
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    found: dict[str, tuple[float]] = {}
    for name, config in configs.items():
        model = OVModelForCausalLM.from_pretrained(arguments.model, ov_config=config)
        found[name] = (perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens),)
        print(f"{name}: {found[name][0]:.4f}, {found[name][0] / found[FLOAT32][0] - 1:+.2%}", flush=True)
    report = Report(
        machine=describe_machine(),
        settings={"max_tokens": arguments.max_tokens},
        contestants=dict.fromkeys(found, arguments.model.name),
        baseline=FLOAT32,
        quantities=(Quantity(name="perplexity", values=found),),
    )
    print_report(report)
    write(arguments.json, report)


if __name__ == "__main__":
    main()
