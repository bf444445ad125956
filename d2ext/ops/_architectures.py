"""Which GPUs the compiled CUDA kernels run on.

A build holds machine code for some architectures, and for some PTX, which the driver compiles for
newer ones. The list is that of `TORCH_CUDA_ARCH_LIST`: "8.0,9.0+PTX".
"""

import re

_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def fits(built: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `built` run on a GPU of `capability` (major, minor).

    Machine code runs on its own major version from its minor version on, with the suffix "a" on
    nothing else; PTX on everything not older. An entry of another form, such as "Hopper", is
    taken to fit: nothing is known about it.
    """
    for entry in re.split(r"[;,\s]+", built.strip()):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            return True
        made, suffix = (int(match[1]), int(match[2])), match[3]
        if capability == made:
            return True
        if suffix == "a" or capability < made:
            continue
        if capability[0] == made[0] or (match[4] and not suffix):
            return True
    return False
