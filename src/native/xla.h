// Passes for XLA on the CPU: handlers of its foreign-function interface, which JAX registers.

#pragma once

#include "job.h"

namespace bn::xla {

struct Handler {
    const char* name;
    void* function;
};
extern const Handler HANDLERS[];  // a null name after the last

// The kernels that handlers run, and how many threads a call may use at most.
void use(const Kernels* kernels);
void set_thread_count(int count);

}  // namespace bn::xla
