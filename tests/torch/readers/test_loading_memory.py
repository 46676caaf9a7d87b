"""What loading a quantized and sparse checkpoint holds in memory at most."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_scap import sparsify_activations
from optimum_scap.torch.quantize import quantize_weights


MIB = 2**20
SHARD = 16 * MIB
# Pages of the file itself come and go as the system likes: only memory of the process's own is counted.
LOAD = """
import json, sys, threading, time
import torch, optimum_scap
from transformers import AutoModelForCausalLM

def own() -> int:
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what is imported and compiled on the way stays out
before, seen, done = own(), [], False

def watch() -> None:
    while not done:
        seen.append(own())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
done = True
thread.join()
storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
print(json.dumps({"peak": max(seen) - before, "size": sum(sizes.values())}))
"""


def write(folder: Path, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).half()
    quantize_weights(model, "int4", 128)
    sparsify_activations(model, "0.5", [{"input_ids": torch.arange(16)[None]}])
    model.save_pretrained(folder, max_shard_size=SHARD)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_little_more_than_the_model(tmp_path: Path) -> None:
    write(tmp_path / "small", 128, 1)
    write(tmp_path / "large", 1024, 12)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 4
    result = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["size"] > 100 * MIB
    assert found["size"] <= found["peak"] <= 1.2 * found["size"] + SHARD
