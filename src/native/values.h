// Single values of any dtype, for vectors of one number per channel.

#pragma once

#include <cstdint>
#include <cstring>

#include "../batchnorm/backends/coefficients.h"
#include "job.h"

namespace bn {

template <class V> V value_at(const char* at) {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

inline double read_value(DType dtype, const char* at) {
    switch (dtype) {
        case HALF: return half_to_float(value_at<uint16_t>(at));
        case BFLOAT16: return bfloat16_to_float(value_at<uint16_t>(at));
        case SINGLE: return value_at<float>(at);
        case DOUBLE: return value_at<double>(at);
        default: return *at ? 1.0 : 0.0;
    }
}

inline void write_values(DType dtype, char* to, const double* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        switch (dtype) {
            case HALF: ((uint16_t*)to)[i] = float_to_half((float)from[i]); break;
            case BFLOAT16: ((uint16_t*)to)[i] = float_to_bfloat16((float)from[i]); break;
            case SINGLE: ((float*)to)[i] = (float)from[i]; break;
            default: ((double*)to)[i] = from[i];
        }
    }
}

}  // namespace bn
