// The kernels for one instruction set; CMakeLists.txt has its compiler options.
#define ISA_NAME "avx2"
#define ISA_NAMESPACE avx2
#define ISA_REGISTER 32
#include "kernels_isa.h"
