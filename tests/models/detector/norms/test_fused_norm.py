"""The Triton kernels on the CPU: in Triton's interpreter, and compiled for a GPU that is not there."""

import os
import re
import subprocess
import sys

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for Linux")


def test_the_kernels_in_tritons_interpreter(repo_root):
    if Version(triton.__version__) < Version("3.9") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4")
    # Triton reads the variable when it is imported, so in another process.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "tests/models/detector/norms/interpreted_norms.py",
        ],
        cwd=repo_root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-500:]  # none skipped


@pytest.mark.parametrize(
    ("name", "loads", "constants"),
    [
        ("partial_statistics", 1, {"ROWS": 32, "COLS": 64, "EVEN": True}),
        ("merged_statistics", 2, {"ROWS": 32, "SPLITS": 128, "COLS": 16}),
        ("normalized_map", 2, {"ACT": 1, "RESIDUAL": True, "UPDATE": True, "ROWS": 64, "COLS": 128}),
        (
            "partial_gradients",
            4,
            {"ACT": 1, "RESIDUAL": True, "OTHER": True, "ROWS": 32, "COLS": 64, "STAGES": 3},
        ),
        ("merged_gradients", 2, {"SPLITS": 128, "COLS": 16}),
        ("input_gradient", 2, {"ACT": 2, "ROWS": 64, "COLS": 128}),
        ("pooled_map", 9, {"ROWS": 32, "COLS": 64}),
        ("unpooled_map", 4, {"ROWS": 32, "COLS": 64}),
    ],
)
def test_a_kernel_compiles_for_an_h100_with_accesses_of_16_bytes(
    name, loads, constants, tmp_path, monkeypatch
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.detector.norms import fused_kernels, pool_kernels

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(fused_kernels, name, None) or getattr(pool_kernels, name)
    maps = {"other_ptr", "x_ptr", "residual_ptr", "y_ptr", "dy_ptr", "saved_ptr", "dz_ptr", "dx_ptr"}
    kinds, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        pointer = argument.endswith("_ptr")
        kinds[argument] = ("*bf16" if argument in maps else "*fp32") if pointer else "i32"
        if argument == "winner_ptr":
            kinds[argument] = "*u8"
        if argument in ("eps", "momentum"):
            kinds[argument] = "fp32"
        if argument in constants:
            kinds[argument] = "constexpr"
        if pointer or argument == "channels":  # as PyTorch's tensors and ResNet's widths
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    source = ASTSource(kernel, kinds, constexprs=values, attrs=aligned)
    done = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": True}
    )
    ptx = done.asm["ptx"]
    wide = re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c\w\.\S+ \[[^]]+\], \[[^]]+\], 0x10", ptx)
    assert len(wide) >= loads
    assert re.findall(r"(?:ld|st)\.global\S*\.[bu]16", ptx) == []  # no access of a single value
    assert re.findall(r"\b(?:red|atom)\.", ptx) == []  # bits repeat
