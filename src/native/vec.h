// Sixteen lanes of float or double on GCC's and Clang's vector types, for registers of REGISTER bytes.
// Included once for each instruction set, inside its namespace.

constexpr int LANES = 16;

template <class C> struct Vec {
    static constexpr int WIDTH = REGISTER / sizeof(C);  // values of a register
    static constexpr int PARTS = LANES / WIDTH;
    typedef C Register __attribute__((vector_size(REGISTER)));
    Register part[PARTS];
};

#define FOR_PARTS _Pragma("GCC unroll 16") for (int p = 0; p < Vec<C>::PARTS; ++p)
#define INLINE __attribute__((always_inline)) inline

template <class C> INLINE Vec<C> splat(C v) {
    Vec<C> r;
    FOR_PARTS r.part[p] = v - typename Vec<C>::Register{};  // keeps the sign of a zero
    return r;
}
template <class C> INLINE Vec<C> operator+(Vec<C> a, const Vec<C>& b) {
    FOR_PARTS a.part[p] += b.part[p];
    return a;
}
template <class C> INLINE Vec<C> operator-(Vec<C> a, const Vec<C>& b) {
    FOR_PARTS a.part[p] -= b.part[p];
    return a;
}
template <class C> INLINE Vec<C> operator*(Vec<C> a, const Vec<C>& b) {
    FOR_PARTS a.part[p] *= b.part[p];
    return a;
}
template <class C> INLINE Vec<C> operator/(Vec<C> a, const Vec<C>& b) {
    FOR_PARTS a.part[p] /= b.part[p];
    return a;
}

// What the formulas of `activations.h` are made of.
template <class C> INLINE Vec<C> constant(Vec<C>, double c) { return splat((C)c); }
template <class C> INLINE Vec<C> at_most(Vec<C> h, Vec<C> c, Vec<C> a, Vec<C> b) {
    FOR_PARTS b.part[p] = h.part[p] <= c.part[p] ? a.part[p] : b.part[p];
    return b;
}
template <class C> INLINE Vec<C> at_least(Vec<C> h, Vec<C> c, Vec<C> a, Vec<C> b) {
    FOR_PARTS b.part[p] = h.part[p] >= c.part[p] ? a.part[p] : b.part[p];
    return b;
}
template <class C> INLINE Vec<C> above(Vec<C> h, Vec<C> c, Vec<C> a, Vec<C> b) {
    FOR_PARTS b.part[p] = h.part[p] > c.part[p] ? a.part[p] : b.part[p];
    return b;
}
template <class C> INLINE Vec<C> equal(Vec<C> h, Vec<C> c, Vec<C> a, Vec<C> b) {
    FOR_PARTS b.part[p] = h.part[p] == c.part[p] ? a.part[p] : b.part[p];
    return b;
}

// The exponential function of numbers <= 0: 2^n e^r, with |r| <= log(2)/2 and Taylor's polynomial of e^r.
template <class C> struct Exponential;
template <> struct Exponential<float> {
    typedef int32_t Integer;
    static constexpr int DEGREE = 7, FRACTION = 23, BIAS = 127, EXTRA = 64;
    static constexpr float LEAST = -104, MAGIC = 0x1.8p23f, HIGH = 0x1.62e4p-1f, LOW = 0x1.7f7d1cp-20f;
    static constexpr float DOWN = 0x1p-64f;
};
template <> struct Exponential<double> {
    typedef int64_t Integer;
    static constexpr int DEGREE = 13, FRACTION = 52, BIAS = 1023, EXTRA = 128;
    static constexpr double LEAST = -746, MAGIC = 0x1.8p52, HIGH = 0x1.62e42feep-1, LOW = 0x1.a39ef35793c76p-33;
    static constexpr double DOWN = 0x1p-128;
};
constexpr double inverse_factorial(int n) {
    double f = 1;
    for (int k = 2; k <= n; ++k) f *= k;
    return 1 / f;
}
template <class C> INLINE Vec<C> exponential(Vec<C> v) {
    typedef Exponential<C> E;
    typedef typename E::Integer Integers __attribute__((vector_size(REGISTER)));
    const C log2e = C(0x1.71547652b82fep0);
    Vec<C> r;
    FOR_PARTS {
        auto x = v.part[p], least = E::LEAST - typename Vec<C>::Register{};
        x = x <= least ? least : x;  // NaN stays
        auto shifted = x * log2e + E::MAGIC, n = shifted - E::MAGIC;
        auto rest = x - n * E::HIGH - n * E::LOW;
        auto sum = (C)inverse_factorial(E::DEGREE) - typename Vec<C>::Register{};
        for (int k = E::DEGREE - 1; k >= 0; --k) sum = sum * rest + (C)inverse_factorial(k);
        Integers bits, zero;
        C magic = E::MAGIC;
        typename E::Integer whole;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        __builtin_memcpy(&whole, &magic, sizeof whole);
        zero = Integers{} + whole;
        bits = (bits - zero + (E::BIAS + E::EXTRA)) << E::FRACTION;
        typename Vec<C>::Register power;
        __builtin_memcpy(&power, &bits, sizeof power);
        r.part[p] = sum * power * E::DOWN;
    }
    return r;
}

// `v` where w > 0, and 0 elsewhere: an element of zero weight may be NaN.
template <class C> INLINE Vec<C> where_positive(const Vec<C>& w, Vec<C> v) {
    FOR_PARTS v.part[p] = w.part[p] > 0 ? v.part[p] : typename Vec<C>::Register{};
    return v;
}
// `v` where w > 0 or g is not 0.
template <class C> INLINE Vec<C> where_used(const Vec<C>& w, const Vec<C>& g, Vec<C> v) {
    FOR_PARTS v.part[p] = ((w.part[p] > 0) | (g.part[p] != 0)) ? v.part[p] : typename Vec<C>::Register{};
    return v;
}
// The sum of all lanes, pairwise.
template <class C> INLINE C total(const Vec<C>& v) {
    C lane[LANES];
    __builtin_memcpy(lane, &v, sizeof v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
    return lane[0];
}

// Types in memory, and the type of the arithmetic on them.

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
template <class T> struct Arithmetic {
    typedef float Type;
};
template <> struct Arithmetic<double> {
    typedef double Type;
};
template <class T> using Compute = typename Arithmetic<T>::Type;

INLINE float value(float v) { return v; }
INLINE double value(double v) { return v; }
INLINE float value(Half v) { return half_to_float(v.bits); }
INLINE float value(BFloat16 v) { return bfloat16_to_float(v.bits); }
INLINE void set(float& to, float v) { to = v; }
INLINE void set(double& to, double v) { to = v; }
INLINE void set(Half& to, float v) { to.bits = float_to_half(v); }
INLINE void set(BFloat16& to, float v) { to.bits = float_to_bfloat16(v); }

// Sixteen values of memory that need not be aligned.

INLINE Vec<float> load(const float* at) {
    Vec<float> v;
    __builtin_memcpy(&v, at, sizeof v);
    return v;
}
INLINE Vec<double> load(const double* at) {
    Vec<double> v;
    __builtin_memcpy(&v, at, sizeof v);
    return v;
}
INLINE void store(float* at, const Vec<float>& v) { __builtin_memcpy(at, &v, sizeof v); }
INLINE void store(double* at, const Vec<double>& v) { __builtin_memcpy(at, &v, sizeof v); }

typedef uint32_t Words __attribute__((vector_size(REGISTER)));
typedef uint16_t Shorts __attribute__((vector_size(REGISTER / 2)));

INLINE Vec<float> load(const BFloat16* at) {
    Vec<float> v;
    for (int p = 0; p < Vec<float>::PARTS; ++p) {
        Shorts bits;
        __builtin_memcpy(&bits, at + p * Vec<float>::WIDTH, sizeof bits);
        Words wide = __builtin_convertvector(bits, Words) << 16;
        __builtin_memcpy(&v.part[p], &wide, sizeof wide);
    }
    return v;
}
INLINE void store(BFloat16* at, const Vec<float>& v) {
    for (int p = 0; p < Vec<float>::PARTS; ++p) {
        Words bits;
        __builtin_memcpy(&bits, &v.part[p], sizeof bits);
        Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to even
        rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (Words{} + 0x7fc0u) : rounded;
        Shorts narrow = __builtin_convertvector(rounded, Shorts);
        __builtin_memcpy(at + p * Vec<float>::WIDTH, &narrow, sizeof narrow);
    }
}

// Without conversions in hardware these are functions: inlined everywhere, sixteen conversions by bits each
// take half of the time that a file of kernels is compiled in, and are not faster.
#if defined(__F16C__) || defined(__aarch64__)
#define HALF_INLINE INLINE
#else
#define HALF_INLINE __attribute__((noinline))
#endif

HALF_INLINE Vec<float> load(const Half* at) {
    Vec<float> v;
#if defined(__AVX512F__)
    __m256i bits;
    __builtin_memcpy(&bits, at, 32);
    v.part[0] = (Vec<float>::Register)_mm512_cvtph_ps(bits);
#elif defined(__F16C__)
    for (int p = 0; p < 2; ++p) {
        __m128i bits;
        __builtin_memcpy(&bits, at + 8 * p, 16);
        v.part[p] = (Vec<float>::Register)_mm256_cvtph_ps(bits);
    }
#elif defined(__aarch64__)
    for (int p = 0; p < 4; ++p) {
        float16x4_t bits;
        __builtin_memcpy(&bits, at + 4 * p, 8);
        v.part[p] = (Vec<float>::Register)vcvt_f32_f16(bits);
    }
#else
    float lane[LANES];
    for (int i = 0; i < LANES; ++i) lane[i] = value(at[i]);
    v = load(lane);
#endif
    return v;
}
HALF_INLINE void store(Half* at, const Vec<float>& v) {
#if defined(__AVX512F__)
    __m256i bits = _mm512_cvtps_ph((__m512)v.part[0], _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(at, &bits, 32);
#elif defined(__F16C__)
    for (int p = 0; p < 2; ++p) {
        __m128i bits = _mm256_cvtps_ph((__m256)v.part[p], _MM_FROUND_TO_NEAREST_INT);
        __builtin_memcpy(at + 8 * p, &bits, 16);
    }
#elif defined(__aarch64__)
    for (int p = 0; p < 4; ++p) {
        float16x4_t bits = vcvt_f16_f32((float32x4_t)v.part[p]);
        __builtin_memcpy(at + 4 * p, &bits, 8);
    }
#else
    float lane[LANES];
    store(lane, v);
    for (int i = 0; i < LANES; ++i) set(at[i], lane[i]);
#endif
}

// In double.

INLINE Vec<double> wide(const Vec<double>& v) { return v; }
INLINE Vec<double> wide(const Vec<float>& v) {
    typedef Vec<double>::Register R;
#if defined(__AVX512F__)
    __m512 all = (__m512)v.part[0];
    return {{(R)_mm512_cvtps_pd(_mm512_castps512_ps256(all)),
             (R)_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1))}};
#elif defined(__AVX__)
    __m256 low = (__m256)v.part[0], high = (__m256)v.part[1];
    return {{(R)_mm256_cvtps_pd(_mm256_castps256_ps128(low)),
             (R)_mm256_cvtps_pd(_mm256_extractf128_ps(low, 1)),
             (R)_mm256_cvtps_pd(_mm256_castps256_ps128(high)),
             (R)_mm256_cvtps_pd(_mm256_extractf128_ps(high, 1))}};
#else
    typedef float HalfRegister __attribute__((vector_size(REGISTER / 2)));
    float lane[LANES];
    __builtin_memcpy(lane, &v, sizeof v);
    Vec<double> r;
    _Pragma("GCC unroll 16") for (int p = 0; p < Vec<double>::PARTS; ++p) {
        HalfRegister h;
        __builtin_memcpy(&h, lane + p * Vec<double>::WIDTH, sizeof h);
        r.part[p] = __builtin_convertvector(h, R);
    }
    return r;
#endif
}

// The first n < 16 values; the lanes after them are 0.
template <class T> INLINE Vec<Compute<T>> load(const T* at, int n) {
    T lane[LANES] = {};
    for (int i = 0; i < n; ++i) lane[i] = at[i];
    return load(lane);
}
template <class T> INLINE void store(T* at, const Vec<Compute<T>>& v, int n) {
    T lane[LANES];
    store(lane, v);
    for (int i = 0; i < n; ++i) at[i] = lane[i];
}
#if defined(__AVX512F__)
INLINE Vec<float> load(const float* at, int n) {
    return {{(Vec<float>::Register)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), at)}};
}
INLINE Vec<double> load(const double* at, int n) {
    unsigned mask = (1u << n) - 1;
    return {{(Vec<double>::Register)_mm512_maskz_loadu_pd((__mmask8)mask, at),
             (Vec<double>::Register)_mm512_maskz_loadu_pd((__mmask8)(mask >> 8), at + 8)}};
}
INLINE void store(float* at, const Vec<float>& v, int n) {
    _mm512_mask_storeu_ps(at, (__mmask16)((1u << n) - 1), (__m512)v.part[0]);
}
#endif

// Past the caches, which a large result would only flush. The address is a multiple of `STREAM_BYTES`.
#if defined(__AVX512F__)
constexpr bool STREAMS = true;
INLINE void stream_register(void* at, __m512i v) { _mm512_stream_si512((__m512i*)at, v); }
INLINE void stream_fence() { _mm_sfence(); }
#elif defined(__AVX__)
constexpr bool STREAMS = true;
INLINE void stream_register(void* at, __m256i v) { _mm256_stream_si256((__m256i*)at, v); }
INLINE void stream_fence() { _mm_sfence(); }
#elif defined(__SSE2__)
constexpr bool STREAMS = true;
INLINE void stream_register(void* at, __m128i v) { _mm_stream_si128((__m128i*)at, v); }
INLINE void stream_fence() { _mm_sfence(); }
#else
constexpr bool STREAMS = false;
INLINE void stream_fence() {}
#endif

template <class T> constexpr int stream_bytes() {
    return LANES * sizeof(T) < 64 ? LANES * sizeof(T) : 64;  // a cache line, or half of one
}

template <class T> INLINE void stream(T* at, const Vec<Compute<T>>& v) {
    if constexpr (!STREAMS) {
        store(at, v);
    } else if constexpr (sizeof(T) == sizeof(Compute<T>)) {
#if defined(__AVX512F__)
        for (int p = 0; p < Vec<Compute<T>>::PARTS; ++p)
            stream_register((char*)at + p * REGISTER, (__m512i)v.part[p]);
#elif defined(__AVX__)
        for (int p = 0; p < Vec<Compute<T>>::PARTS; ++p)
            stream_register((char*)at + p * REGISTER, (__m256i)v.part[p]);
#elif defined(__SSE2__)
        for (int p = 0; p < Vec<Compute<T>>::PARTS; ++p)
            stream_register((char*)at + p * REGISTER, (__m128i)v.part[p]);
#endif
    } else {
#if defined(__SSE2__)
        alignas(32) T lane[LANES];
        store(lane, v);
        for (int p = 0; p < 2; ++p) {
            __m128i bits;
            __builtin_memcpy(&bits, lane + 8 * p, 16);
            _mm_stream_si128((__m128i*)at + p, bits);
        }
#endif
    }
}
