// The kernels for one instruction set; CMakeLists.txt has its compiler options.
#define ISA_NAME "avx512"
#define ISA_NAMESPACE avx512
#define ISA_REGISTER 64
#include "kernels_isa.h"
