"""Every instance of the CUDA kernels compiles, for four generations of GPUs: NVRTC needs no device."""

import re

import pytest

from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda import running as cuda

nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

# As CuPy calls it; -v reports the registers.
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
TARGETS = {75: "T4", 80: "A100", 90: "H100 and H200", 100: "B200"}
# No code depends on the target, and the 16-bit dtypes differ in their conversions only.
MORE = {75: ("float64", "bfloat16"), 100: ("float64", "float16")}
CASES = [
    (target, dtype)
    for target in TARGETS
    for dtype in launches.TYPES
    if dtype == "float32" or dtype in MORE.get(target, ())
]


def compile_all(source, names, *options):
    """Return the object file of some instances, the compiler's log and the lowered names."""

    def done(result):
        code, *values = result
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{code}: {log()}")
        return values[0] if values else None

    def text(size, get):
        buffer = bytearray(done(size(program)))
        done(get(program, buffer))
        return bytes(buffer)

    def log():
        return text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()

    program = done(nvrtc.nvrtcCreateProgram(source.encode(), b"batchnorm.cu", 0, [], []))
    for name in names:
        done(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    encoded = [option.encode() for option in options]
    done(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded))
    lowered = [done(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode() for name in names]
    return text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log(), lowered


@pytest.mark.parametrize(("target", "dtype"), CASES)
def test_every_instance(target, dtype):
    """The object file has each, and as many blocks as launches.py assumes fit on a multiprocessor."""
    names = [n for n in launches.instances() if f"<{launches.TYPES[dtype][0]}," in n]
    cubin, log, lowered = compile_all(cuda.source(), names, f"-arch=sm_{target}", *OPTIONS)
    for name, symbol in zip(names, lowered, strict=True):
        assert symbol.encode() in cubin, name
    assert "warning" not in log, log
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(names)
    assert max(registers) * launches.THREADS * launches.RESIDENT <= 65536
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert max(spilled) <= 256, "only rare instances spill, a few values at the ends of tiles"
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    assert max(shared) * launches.RESIDENT <= 64 * 2**10


def test_a_compilation_error_is_reported():
    broken = cuda.source().replace("struct Params {", "struct Params { unknown x;", 1)
    with pytest.raises(RuntimeError, match="unknown"):
        compile_all(broken, launches.instances()[:1], "-arch=sm_90", *OPTIONS)
