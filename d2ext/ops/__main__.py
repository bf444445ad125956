"""`python -m d2ext.ops`: which implementation of each operator runs on which device, and why."""

import torch

import d2ext.ops  # noqa: F401  defines the operators
from d2ext.ops import _library


def table() -> list[tuple[str, str, str, str]]:
    """Rows of operator, device, implementation ("native" or "pytorch") and reason."""
    if torch.cuda.is_available():
        torch.cuda.init()  # which checks that the kernels run on these GPUs
    rows = []
    for name in _library.operators():
        for device in ("cpu", "cuda"):
            kind, reason = _library.implementation(name, device)
            if device == "cuda" and not torch.cuda.is_available():
                reason += "; no GPU here"
            rows.append((name, device, kind, reason))
    return rows


def main() -> None:
    rows = table()
    built = f", CUDA kernels for {_library.ARCHITECTURES}" if _library.ARCHITECTURES else ""
    print(f"torch {torch.__version__}, extension {_library.EXTENSION_STATE}{built}")
    for name, device, kind, reason in rows:
        print(f"{name:28} {device:5} {kind:8} {reason}")


if __name__ == "__main__":
    main()
