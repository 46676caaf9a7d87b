"""Every family of architectures in PyTorch: roles, sites, realized sparsity, save and load, the sparse operations."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, Family
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.core.roles import ROLES, find_role
from optimum_scap.torch.backend import TorchBackend, measure_sparsity, pruned_layers, read_parameters


SPEC = ",".join(f"{role}=0.3" for role in ROLES)


class SparseLayers(TorchDispatchMode):
    """Counts the layers that sparse operations compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("sparse_"):
            self.count[name] += {
                "sparse_linear_group": len(args[1]),
                "sparse_gated_linear": 2,
                "sparse_experts": 3,
            }.get(name, 1)
        return func(*args, **(kwargs or {}))


def collapsed(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)


def outputs_of(model: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**sample)
    return next(outputs[name] for name in ("logits", "logits_per_image") if name in outputs)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found = FAMILIES[request.param]
    if not hasattr(tf, found.model):
        pytest.skip(f"transformers {tf.__version__} has no {found.model}")
    return found


def test_a_family_is_pruned_saved_and_loaded(family: Family, tmp_path: Path) -> None:
    model, samples = family.build(), family.samples()
    layers = TorchBackend(model).layers()
    found = {collapsed(path): layer.role for path, layer in layers.prunable.items()}
    found.update({collapsed(path): find_role(path) for path in layers.dense})
    assert found == family.expected
    assert {collapsed(path) for path in layers.dense} == set(family.dense)

    sparsify_activations(model, SCAPConfig.from_spec(SPEC), samples)
    parameters = read_parameters(model)
    wanted = {path for path, layer in layers.prunable.items() if layer.role is not None}
    assert parameters.layers.keys() == wanted == pruned_layers(model).keys()
    sites = {frozenset(map(collapsed, site.layers)) for site in parameters.found_sites()}
    assert sites == {site - set(family.dense) for site in family.sites} - {frozenset()}

    sparsity = measure_sparsity(model, samples)
    assert sparsity.keys() == wanted
    for path, fraction in sparsity.items():
        # all roles of a small random model at once: what is in front of a layer moves more than in a trained one
        assert abs(fraction - 0.3) <= 0.015 or fraction > 0.3 and not family.exact, path

    before = outputs_of(model, samples[0])
    model.save_pretrained(tmp_path)
    again = getattr(tf, family.auto).from_pretrained(tmp_path)
    assert type(again) is type(model) and read_parameters(again) == parameters
    assert torch.equal(outputs_of(again, samples[0]), before)

    if family.inputs != "images":  # which are never of few rows
        with SparseLayers() as operations:
            outputs_of(model, family.one_token())
        sparse = [path for path in wanted if re.search(family.sparse, path)]
        assert sum(operations.count.values()) == len(sparse), operations.count
