"""gelu_mlp's products as cuBLASLt gets them: right by a model of it, chosen once, and left out where it can't."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stand_in import driver

ROWS, DEEP, WIDE = 512, 1152, 4608  # XL/2: 2 images of 256 tokens, its width, its MLP's
MIB = 2**20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_asked_for_is_the_definition(check, dtype):
    found = check("emulated", dtype)
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert found["products"] == 2
    assert all(0 < off <= unit for off in found["off"].values()), found["off"]


def matrix(rows, columns):
    return {"type": 14, "rows": rows, "columns": columns, "ld": rows}


def test_the_products_of_xl_2_are_described_as_derived_and_their_algorithms_chosen_once(check):
    found = check("asked")
    forward, backward = found["products"]
    x, w1, b1, w2, _ = found["leaves"]
    for product in (forward, backward):
        assert (product["compute"], product["scale"], product["trans_b"], product["aux_ld"]) == (68, 0, 0, WIDE)
        assert product["c"] == product["d"] == matrix(WIDE, ROWS)
        assert product["workspace"] == 3000 and product["pointers"][4] % 256 == 0 < product["pointers"][4]
    assert (forward["epilogue"], forward["trans_a"]) == (164, 1)
    assert (forward["a"], forward["b"]) == (matrix(DEEP, WIDE), matrix(DEEP, ROWS))
    assert forward["pointers"][:2] == [w1, x] and forward["bias"] == b1
    assert (backward["epilogue"], backward["trans_a"]) == (208, 0)
    assert (backward["a"], backward["b"]) == (matrix(WIDE, DEEP), matrix(DEEP, ROWS))
    assert backward["pointers"][0] == w2 and backward["aux"] == forward["aux"] != 0  # h is what was kept
    assert backward["bias"] not in (0, b1)  # a gradient of its own
    for choice in found["choices"]:
        assert choice["workspace"] == 32 * MIB and choice["scheme"] == 2 and choice["alignments"] == [256] * 4
    assert len(found["choices"]) == 2 and found["asked_again"] == 0 and found["streams"] == [True, True]


def test_a_frozen_mlp_is_two_products_and_nothing_else(check):
    found = check("asked")
    assert found["frozen"][0] == 36 and found["frozen_launches"] == 2


def test_what_cublaslt_can_not_do_is_plain_pytorch_and_said_once(check):
    found = check("fallbacks")
    assert found["counts"] == {
        "refused": 0, "asked_again": 0, "odd size": 0, "odd address": 0, "float32": 0, "empty": 0,
        "new in a graph": 0, "known": 1, "known in a graph": 1, "captured": 2,
    }  # fmt: skip
    rows, start = 24, "st_fast: gelu_mlp in plain PyTorch for"
    multiples = "sizes must be multiples of 8 and addresses of 16 bytes."
    assert found["said"] == [
        f"{start} {rows} rows with a weight 24×40 in bfloat16: cuBLASLt has no algorithm for it here.",
        f"{start} {rows} rows with a weight 36×16 in bfloat16: {multiples}",
        f"{start} {rows} rows with a weight 40×16 in bfloat16: {multiples}",
        f"{start} {rows} rows with a weight 40×16 in bfloat16: this shape is new while a CUDA graph is being captured.",
    ]


NAMES = """
#include <cublasLt.h>
#include "{header}"
namespace ours = st_fast::lt;
template <class R, class... A>
constexpr int count(R (*)(A...)) {{ return sizeof...(A); }}
template <class F>
constexpr int taken = count(static_cast<F>(nullptr));
static_assert(taken<decltype(ours::Library::choose)> == taken<decltype(&cublasLtMatmulAlgoGetHeuristic)>, "");
static_assert(taken<decltype(ours::Library::multiply)> == taken<decltype(&cublasLtMatmul)>, "");
static_assert(taken<decltype(ours::Library::lay_out)> == taken<decltype(&cublasLtMatrixLayoutCreate)>, "");
static_assert(taken<decltype(ours::Library::describe)> == taken<decltype(&cublasLtMatmulDescCreate)>, "");
static_assert(taken<decltype(ours::Library::set)> == taken<decltype(&cublasLtMatmulDescSetAttribute)>, "");
static_assert(taken<decltype(ours::Library::prefer)> == taken<decltype(&cublasLtMatmulPreferenceCreate)>, "");
static_assert(ours::kSuccess == CUBLAS_STATUS_SUCCESS && ours::kCompute32F == CUBLAS_COMPUTE_32F, "");
static_assert(ours::kTranspose == CUBLAS_OP_T, "");
static_assert(ours::kGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS, "");
static_assert(ours::kDGeluBGrad == CUBLASLT_EPILOGUE_DGELU_BGRAD, "");
static_assert(ours::kTransA == CUBLASLT_MATMUL_DESC_TRANSA && ours::kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE, "");
static_assert(ours::kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER, "");
static_assert(ours::kAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, "");
static_assert(ours::kAuxLd == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, "");
static_assert(ours::kMaxWorkspaceBytes == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, "");
static_assert(ours::kReductionSchemeMask == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, "");
static_assert(ours::kReduceInComputeType == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, "");
static_assert(ours::kMinAlignmentABytes == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, "");
static_assert(ours::kMinAlignmentBBytes == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, "");
static_assert(ours::kMinAlignmentCBytes == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, "");
static_assert(ours::kMinAlignmentDBytes == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, "");
static_assert(sizeof(ours::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t), "");
static_assert(offsetof(ours::Heuristic, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize), "");
static_assert(offsetof(ours::Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state), "");
static_assert(sizeof(ours::Algorithm) == sizeof(cublasLtMatmulAlgo_t), "");
static_assert(CUDA_R_16BF == 14 && CUDA_R_16F == 2 && CUDA_R_32F == 0, "");
"""


def test_names_and_numbers_are_those_of_cublaslts_own_header(found, tmp_path):
    own = next(iter(sorted(found.torch.parent.glob("nvidia/**/cublasLt.h"))), None)
    compiler = shutil.which("g++")
    if own is None or compiler is None:
        pytest.skip("no cublasLt.h beside torch, or no g++")
    source = tmp_path / "names.cpp"
    source.write_text(NAMES.format(header=Path(driver.ROOT) / "csrc" / "cuda" / "cublaslt.h"))
    includes = [f"-isystem{own.parent}", f"-isystem{driver.headers()}"]
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *includes, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
