"""Launches that are planned once: what they keep, and when Triton is asked anew."""

from typing import Any

import torch

from optimum_scap.torch.kernels.plans import Launch


class Kernel:
    """Counts what is compiled, and notes what is launched."""

    arg_names = ("x", "count", "SIZE", "KIND")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]):
        def run(*arguments: Any, **options: Any):
            self.compiled.append(options)
            self.launched.append((grid, *arguments))
            return Compiled(self.launched)

        return run


class Compiled:
    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self._launched = launched

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self._launched.append((grid, *arguments))


def test_a_launch_compiles_once_per_type_and_alignment() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (4, 2), {"KIND": "k", "SIZE": 8}, num_warps=4)
    memory = torch.zeros(64)
    aligned, another, shifted, other_type = memory[:16], memory[16:32], memory[1:17], memory[:16].half()
    for tensor in (aligned, another, shifted, shifted, other_type, aligned):
        launch((tensor,), tensor, 16)
    assert kernel.compiled == [{"num_warps": 4}] * 3  # aligned, shifted, of another type
    assert [entry[0] for entry in kernel.launched] == [(4, 2, 1)] * 6
    assert all(entry[2:] == (16, 8, "k") for entry in kernel.launched)
    assert [entry[1].data_ptr() for entry in kernel.launched] == [
        tensor.data_ptr() for tensor in (aligned, another, shifted, shifted, other_type, aligned)
    ]


def test_an_absent_tensor_is_a_kind_of_its_own() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (1,), {"SIZE": 8, "KIND": "k"})
    for bias in (None, torch.ones(4), None):
        launch((bias,), bias, 4)
    assert len(kernel.compiled) == 2


def test_what_the_interpreter_returns_is_not_kept() -> None:
    calls = []

    class Interpreted(Kernel):
        def __getitem__(self, grid: tuple[int, int, int]):
            return lambda *arguments, **options: calls.append(arguments)

    launch = Launch(Interpreted(), (1,), {"SIZE": 8, "KIND": "k"})
    for _ in range(2):
        launch((), 4)
    assert calls == [(4, 8, "k")] * 2
