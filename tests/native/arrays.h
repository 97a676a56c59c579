// Arrays with any strides between guard bytes, and the formulas of batch norm in long double. Nothing here
// calls the code under test: dtypes, strides and formulas are written once more, as simply as they can be.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core.h"

#ifdef ADDRESS_SANITIZER  // of the core: this is not instrumented, to be quick
#include <sanitizer/asan_interface.h>
#define POISON(at, size) __asan_poison_memory_region(at, size)
#define UNPOISON(at, size) __asan_unpoison_memory_region(at, size)
#else
#define POISON(at, size) (void)0
#define UNPOISON(at, size) (void)0
#endif

namespace test {

#ifdef __SANITIZE_THREAD__
constexpr bool RACES = true;  // who reads and writes when, and not which values
#else
constexpr bool RACES = false;
#endif

using bn::DType;
typedef long double Real;
typedef std::vector<int64_t> Shape;

// Failures: the first twenty are printed, and end the program.
inline std::string now;  // the case that runs
inline int failures = 0;
template <class... Args> void fail(const char* format, Args... args) {
    std::printf("FAILED %s: ", now.c_str());
    std::printf(format, args...);
    std::printf("\n");
    std::fflush(stdout);
    if (++failures == 20) std::_Exit(1);
}

// Values in memory.

constexpr int SIZE[] = {0, 2, 2, 4, 8, 1};
constexpr Real EPS[] = {0, 0x1p-10L, 0x1p-7L, 0x1p-23L, 0x1p-52L};

template <class V> V bits_at(const char* at) {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
inline double get(DType dtype, const char* at) {
    switch (dtype) {
        case bn::HALF: return (double)bits_at<_Float16>(at);
        case bn::BFLOAT16: {
            uint32_t bits = (uint32_t)bits_at<uint16_t>(at) << 16;
            return bits_at<float>((const char*)&bits);
        }
        case bn::SINGLE: return bits_at<float>(at);
        case bn::DOUBLE: return bits_at<double>(at);
        default: return *at != 0;
    }
}
inline void put(DType dtype, char* at, double v) {
    if (dtype == bn::HALF) {
        _Float16 h = (_Float16)v;
        std::memcpy(at, &h, 2);
    } else if (dtype == bn::BFLOAT16) {
        int exponent;
        double digits = std::frexp(v, &exponent);
        float f = (float)std::ldexp(std::nearbyint(std::ldexp(digits, 8)), exponent - 8);
        uint32_t bits = bits_at<uint32_t>((const char*)&f);
        uint16_t high = (uint16_t)(bits >> 16);
        std::memcpy(at, &high, 2);
    } else if (dtype == bn::SINGLE) {
        float f = (float)v;
        std::memcpy(at, &f, 4);
    } else if (dtype == bn::DOUBLE) {
        std::memcpy(at, &v, 8);
    } else {
        *at = v != 0;
    }
}

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
    double uniform() {  // in [0, 1)
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return (double)(state_ >> 11) * 0x1p-53;
    }
    double normal() {  // nearly: a sum of three
        double a = uniform(), b = uniform();
        return 2 * (a + b + uniform() - 1.5);
    }

private:
    uint64_t state_;
};

// How an array lies in memory.
enum Layout { PLAIN, LAST, REVERSED, HALVES, PADDED, MIXED, BROADCAST };
constexpr const char* LAYOUTS[] = {"plain", "last", "reversed", "halves", "padded", "mixed", "broadcast"};

class Array {
public:
    DType dtype;
    Shape shape, strides;
    char* data;

    Array(DType dtype, const Shape& shape, Layout layout, int offset = 0) : dtype(dtype), shape(shape) {
        int n = (int)shape.size(), size = SIZE[dtype];
        std::vector<int> order;  // axes from the outermost
        for (int i = 0; i < n; ++i) order.push_back(layout == MIXED ? n - 1 - i : i);
        if (layout == LAST && n > 1) order.erase(order.begin() + 1), order.push_back(1);
        strides.assign(n, 0);
        int64_t step = size * (layout == HALVES ? 2 : 1), start = 0;
        for (int k = n - 1; k >= 0; --k) {
            int i = order[k];
            if (layout == BROADCAST && i == 0) continue;
            strides[i] = step;
            step *= shape[i];
            if (layout == PADDED && k == n - 1) step += 3 * size;
            if (layout == REVERSED || (layout == MIXED && i == 0)) {
                start += strides[i] * (shape[i] - 1);
                strides[i] = -strides[i];
            }
        }
        bytes_ = 2 * GUARD + step + offset * size;
        memory_ = (char*)std::aligned_alloc(64, (bytes_ + 63) / 64 * 64);
        if (!memory_) std::abort();
        std::memset(memory_, FILL, bytes_);
        data = memory_ + GUARD + offset * size + start;
        int64_t total = 1;
        for (int64_t length : shape) total *= length;
        place_.resize(total);
        Shape index(n, 0);
        int64_t at = 0;
        for (int64_t i = 0; i < total; ++i) {
            place_[i] = at;
            for (int k = n - 1; k >= 0; --k) {
                at += strides[k];
                if (++index[k] < shape[k]) break;
                at -= strides[k] * shape[k];
                index[k] = 0;
            }
        }
        POISON(memory_, GUARD);  // so that reading there is seen, too
        POISON(memory_ + bytes_ - GUARD, GUARD);
    }
    Array(const Array&) = delete;
    ~Array() {
        UNPOISON(memory_, bytes_);
        std::free(memory_);
    }

    int64_t size() const { return (int64_t)place_.size(); }
    double operator[](int64_t i) const { return get(dtype, data + place_[i]); }
    void set(int64_t i, double v) { put(dtype, data + place_[i], v); }
    std::vector<double> values() const {
        std::vector<double> v(size());
        for (int64_t i = 0; i < size(); ++i) v[i] = (*this)[i];
        return v;
    }
    void assign(const Array& o) {
        for (int64_t i = 0; i < size(); ++i) set(i, o[i]);
    }
    bn::Operand operand() const { return {data, dtype, strides.data()}; }

    // Fail where a byte has changed that is no element's.
    void check_guards(const char* what) {
        if (RACES) return;
        UNPOISON(memory_, bytes_);
        std::vector<char> element(bytes_);
        for (int64_t at : place_)  // sanitizers make a call of memset slow
            for (int k = 0; k < SIZE[dtype]; ++k) element[data - memory_ + at + k] = 1;
        for (int64_t i = 0; i < bytes_; ++i)
            if (!element[i] && memory_[i] != FILL) {
                fail("%s: byte %ld from its first element was written", what, long(memory_ + i - data));
                break;
            }
        POISON(memory_, GUARD);
        POISON(memory_ + bytes_ - GUARD, GUARD);
    }
    bool untouched() const {
        for (int64_t i = GUARD; i < bytes_ - GUARD; ++i)
            if (memory_[i] != FILL) return false;
        return true;
    }

private:
    static constexpr int GUARD = 128;
    static constexpr char FILL = 0x5a;
    char* memory_;
    int64_t bytes_;
    std::vector<int64_t> place_;  // of each element, in the order of axes
};

// The channel of each element, and batch norm of them by the textbook.

struct Reference {
    int64_t channels = 1;
    std::vector<int> channel;
    std::vector<Real> n, first, s, var;  // the mean is first + s

    Reference(const Array& x, uint64_t axes) {
        for (size_t k = 0; k < x.shape.size(); ++k)
            if (axes >> k & 1) channels *= x.shape[k];
        channel.resize(x.size());
        for (int64_t i = 0; i < x.size(); ++i) {
            int64_t rest = i, step = 1, c = 0;
            for (int k = (int)x.shape.size() - 1; k >= 0; --k) {
                if (axes >> k & 1) c += rest % x.shape[k] * step, step *= x.shape[k];
                rest /= x.shape[k];
            }
            channel[i] = (int)c;
        }
    }
    Real difference(Real v, int64_t c) const { return v - first[c] - s[c]; }
    // From differences from each channel's first value, which lose nothing in 64 bits.
    void moments(const Array& x, const Array* w) {
        first.assign(channels, NAN);
        for (auto* v : {&n, &s, &var}) v->assign(channels, 0);
        auto weight = [&](int64_t i) { return w ? (Real)(*w)[i] : 1; };
        for (int64_t i = 0; i < x.size(); ++i) {
            int c = channel[i];
            if (!(weight(i) > 0)) continue;
            if (std::isnan(first[c])) first[c] = x[i];
            n[c] += weight(i), s[c] += weight(i) * (x[i] - first[c]);
        }
        for (int64_t c = 0; c < channels; ++c)
            if (n[c] > 0) s[c] /= n[c];
            else first[c] = 0;
        for (int64_t i = 0; i < x.size(); ++i) {
            int c = channel[i];
            Real d = difference(x[i], c);
            if (weight(i) > 0) var[c] += weight(i) * d * d / n[c];
        }
    }
};

// What an error of one unit is: `units` eps of `size`, or a unit in the last place of a 16-bit result.
inline Real tolerance(DType dtype, Real want, Real size, Real units) {
    if (dtype == bn::SINGLE || dtype == bn::DOUBLE) return units * EPS[dtype] * size;
    int exponent;
    std::frexp((double)want, &exponent);
    Real ulp = dtype == bn::HALF ? std::max(std::ldexp(1.0L, exponent - 11), 0x1p-24L)
                                 : std::max(std::ldexp(1.0L, exponent - 8), 0x1p-133L);
    return std::max(ulp, units * EPS[bn::SINGLE] * size);
}

inline void close(const char* what, int64_t i, double got, Real want, Real most) {
    if (std::isnan(want) ? std::isnan(got) : std::fabs((Real)got - want) <= most) return;
    fail("%s[%ld]: got %.17g, expected %.17Lg within %.3Lg", what, long(i), got, want, most);
}

}  // namespace test
