"""Compiles the kernels for an H100, which needs none, and prints their PTX as one JSON object; see test_compiled.py."""

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cascade.kernels import per_image
from cascade.kernels import triton as swap


def ptx(kernel: Any, types: dict[str, str], aligned: str, constants: dict[str, Any], warps: int = 4) -> str:
    """A kernel's code, with integers where ``types`` and ``constants`` name nothing else; some divisible by 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    divisible: dict[Any, Any] = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned.split()}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, values, divisible)
    options = {"num_warps": warps, "num_stages": 3}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def main() -> None:
    found = {}
    for dtype in ("fp32", "bf16"):
        types = {"bits": "*i16", "weights": "*fp32", "table": "*i32", "scales": "*fp32", "out": f"*{dtype}"}
        found[f"swap, {dtype}"] = ptx(swap._masked, types, "bits weights table scales out", {"TILE": swap.TILE})
        steps = "bits weights table scales steps out"
        found[f"delta, {dtype}"] = ptx(swap._signed, {**types, "steps": "*fp32"}, steps, {"TILE": swap.TILE})
        types = {"x": f"*{dtype}", "weights": f"*{dtype}", "table": "*i64", "out": f"*{dtype}"}
        aligned = "x weights table out place rows"
        found[f"depthwise, {dtype}"] = ptx(per_image._depthwise, types, aligned, {"PIXELS": 32, "ROWS": 64})
        for words in (True, False):
            sizes = {"PIXELS": 64, "ROWS": 64, "DEEP": 32, "PRECISION": "tf32x3", "WIDEN": False}
            more = f"{aligned} channels columns" if words else aligned
            constants = {**sizes, "ONE_TAP": words, "WORDS": words}
            name = f"product, {dtype}{'' if words else ', odd'}"
            found[name] = ptx(per_image._product, types, more, constants)
        ones = dict.fromkeys(
            ["groups", "width", "width_out", "across", "stride_y", "stride_x", "apart_y", "apart_x"], 1
        )
        sizes |= {"ONE_TAP": True, "WORDS": True, **ones}  # Triton compiles arguments of 1 as constants
        found[f"linear, {dtype}"] = ptx(per_image._product, types, f"{aligned} channels columns", sizes)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
