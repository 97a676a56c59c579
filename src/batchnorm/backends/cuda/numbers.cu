// Values as they lie in memory, and as they are worked on.

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// What values of a type are worked on in: at least float32.
template <typename T> struct Number {
    typedef float Compute;
};
template <> struct Number<double> {
    typedef double Compute;
};

#ifdef __CUDACC__  // any other compiler brings the two of its own
__device__ inline float half_to_float(unsigned short bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
__device__ inline unsigned short float_to_half(float v) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
#endif

__device__ inline double value(double v) { return v; }
__device__ inline float value(float v) { return v; }
__device__ inline float value(Half v) { return half_to_float(v.bits); }
__device__ inline float value(BFloat16 v) { return __uint_as_float((unsigned)v.bits << 16); }

__device__ inline void set(double& to, double v) { to = v; }
__device__ inline void set(float& to, float v) { to = v; }
__device__ inline void set(Half& to, float v) { to.bits = float_to_half(v); }
__device__ inline void set(BFloat16& to, float v) {
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        to.bits = 0x7fc0;  // NaN: rounding could carry it into infinity
    else
        to.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to even
}

// V neighbours that are loaded and stored at once: 2 to 16 bytes.
template <int BYTES> struct Raw;
template <> struct Raw<2> {
    typedef unsigned short Type;
};
template <> struct Raw<4> {
    typedef unsigned int Type;
};
template <> struct Raw<8> {
    typedef uint2 Type;
};
template <> struct Raw<16> {
    typedef uint4 Type;
};

template <typename T, int V> union Pack {
    typename Raw<sizeof(T) * V>::Type raw;
    T item[V];
};

template <typename T, int V> __device__ inline Pack<T, V> load(const void* base, long long at) {
    Pack<T, V> pack;
    pack.raw = *reinterpret_cast<const typename Raw<sizeof(T) * V>::Type*>((const T*)base + at);
    return pack;
}

// Loads and stores of what is not needed again: the first to go from the L2 cache.
template <typename T, int V> __device__ inline Pack<T, V> load_last(const void* base, long long at) {
    Pack<T, V> pack;
    pack.raw = __ldcs(reinterpret_cast<const typename Raw<sizeof(T) * V>::Type*>((const T*)base + at));
    return pack;
}
template <typename T, int V>
__device__ inline void store(void* base, long long at, const Pack<T, V>& pack) {
    __stcs(reinterpret_cast<typename Raw<sizeof(T) * V>::Type*>((T*)base + at), pack.raw);
}

// Weights: None weighs every value 1, a mask 1 or 0. `Type` is what weighted sums are kept in.
struct None {};
typedef unsigned char Mask;

template <typename W, typename A> struct Weight {  // of a mask
    typedef A Type;
    static const bool THERE = true;
    static __device__ A read(const void* base, long long at) { return ((const Mask*)base)[at] ? 1 : 0; }
};
template <typename A> struct Weight<None, A> {
    typedef A Type;
    static const bool THERE = false;
    static __device__ A read(const void*, long long) { return 1; }
};
template <typename A> struct Weight<double, A> {
    typedef double Type;
    static const bool THERE = true;
    static __device__ double read(const void* base, long long at) { return ((const double*)base)[at]; }
};

// A number for each channel, of whatever type the caller has it in. Python writes these (launches.py).
struct Vector {
    const void* data;
    long long kind;
    long long step;  // in values; 0 where one number stands for all
};
enum Kind { NOTHING, HALF, BFLOAT16, SINGLE, DOUBLE };

__device__ inline double given(const Vector& v, long long c, double otherwise) {
    c *= v.step;
    switch (v.kind) {
        case HALF: return value(((const Half*)v.data)[c]);
        case BFLOAT16: return value(((const BFloat16*)v.data)[c]);
        case SINGLE: return ((const float*)v.data)[c];
        case DOUBLE: return ((const double*)v.data)[c];
        default: return otherwise;
    }
}
__device__ inline void give(const Vector& v, long long c, double number) {
    c *= v.step;
    switch (v.kind) {
        case HALF: set(((Half*)v.data)[c], (float)number); break;
        case BFLOAT16: set(((BFloat16*)v.data)[c], (float)number); break;
        case SINGLE: ((float*)v.data)[c] = (float)number; break;
        case DOUBLE: ((double*)v.data)[c] = number; break;
        default: break;
    }
}

// The sum of L numbers, as a tree: its error grows with log L. Recursion leaves them in registers.
template <int L, typename A> __device__ __forceinline__ A tree(const A* v) {
    if constexpr (L == 1)
        return v[0];
    else
        return tree<L / 2>(v) + tree<L - L / 2>(v + L / 2);
}
