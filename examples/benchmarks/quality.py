"""Perplexity and realized sparsity of SCAP at several targets, against the dense model, on held-out text.

The protocol of the table in docs/results: windows of 512 tokens, no BOS token, all tokens sparse, calibration and
evaluation texts that share no passage. Runs at f32 so that only SCAP differs; prints a table, writes JSON with --json.
Files given by --parameters, such as learning in PyTorch gives, are applied with thresholds calibrated anew.
"""

from pathlib import Path

from optimum.intel import OVModelForCausalLM
from scaffold import add_texts, new_parser, write
from transformers import AutoTokenizer

from optimum_scap import SCAPConfig, SCAPParameters, load_parameters, sparsify_activations
from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.sparsity import RealizedSparsity, realized_by_openvino
from optimum_scap.openvino.inference import EXACT


SPECS = ("up=0.35,gate=0.35,down=0.55", "up=0.4,gate=0.4,down=0.7", "0.5")


def main() -> None:
    parser = new_parser(__doc__)
    add_texts(parser, "exported dense OpenVINO folder")
    parser.add_argument("--parameters", type=Path, nargs="+", default=[], help="files of known parameters")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    perplexities: dict[str, tuple[float]] = {}
    sparsity: dict[str, RealizedSparsity] = {}
    known = {file.stem: load_parameters(file) for file in arguments.parameters}
    wanted: dict[str, SCAPConfig | SCAPParameters | None] = {"dense": None}
    for spec in arguments.scap or SPECS:
        wanted[spec] = SCAPConfig.from_spec(spec, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
    for name, what in {**wanted, **known}.items():
        model = OVModelForCausalLM.from_pretrained(arguments.model, compile=False, ov_config=dict(EXACT))
        if what is not None:
            again = isinstance(what, SCAPParameters)
            sparsify_activations(model, what, arguments.calibration, tokenizer=tokenizer, recalibrate=again)
        perplexities[name] = (perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens),)
        if what is not None:
            sparsity[name] = _sparsity(model, tokenizer, text, arguments.max_tokens)
    report = Report(
        machine=describe_machine(),
        settings={name: getattr(arguments, name) for name in ("num_samples", "seq_len", "max_tokens")},
        contestants=dict.fromkeys(perplexities, arguments.model.name),
        baseline="dense",
        quantities=(Quantity(name="perplexity", values=perplexities),),
        sparsity=sparsity,
    )
    print_report(report, targets=True)
    write(arguments.json, report)


def _sparsity(model: OVModelForCausalLM, tokenizer: AutoTokenizer, text: str, max_tokens: int) -> RealizedSparsity:
    import torch

    samples = [
        model.prepare_inputs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
        for ids in token_samples(tokenizer, text, window=512, max_tokens=max_tokens)
    ]
    return realized_by_openvino(model.model, samples, len(samples))


if __name__ == "__main__":
    main()
