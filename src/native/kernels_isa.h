// Compiles the kernels in a namespace of their own. Nothing here may have external linkage but `KERNELS`:
// a linker that merged two copies of an inline function would run one instruction set's on another's.

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../batchnorm/backends/activations.h"
#include "../batchnorm/backends/coefficients.h"
#include "job.h"

namespace bn::ISA_NAMESPACE {
namespace {
constexpr int REGISTER = ISA_REGISTER;
#include "vec.h"
#include "kernels.inl"
}  // namespace
extern const Kernels KERNELS;
const Kernels KERNELS = table;
}  // namespace bn::ISA_NAMESPACE
