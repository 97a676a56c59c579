// The kernels for one instruction set; CMakeLists.txt has its compiler options.
#define ISA_NAME "baseline"
#define ISA_NAMESPACE baseline
#define ISA_REGISTER 16
#include "kernels_isa.h"
