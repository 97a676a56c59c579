// Types of the elements in memory and of the arithmetic; loads and stores.

using namespace bn;  // of the headers, which are the text before this

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// The type of the arithmetic on elements of a type: at least float32.
template <typename T> struct Number {
    typedef float Compute;
};
template <> struct Number<double> {
    typedef double Compute;
};

__device__ inline double value(double v) { return v; }
__device__ inline float value(float v) { return v; }
__device__ inline float value(Half v) { return half_to_float(v.bits); }
__device__ inline float value(BFloat16 v) { return bfloat16_to_float(v.bits); }

__device__ inline void set(double& to, double v) { to = v; }
__device__ inline void set(float& to, float v) { to = v; }
__device__ inline void set(Half& to, float v) { to.bits = float_to_half(v); }
__device__ inline void set(BFloat16& to, float v) { to.bits = float_to_bfloat16(v); }

// V contiguous elements that are loaded and stored at once: 2 to 16 bytes.
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

template <typename T, int V> __device__ inline Pack<T, V> load(const void* base, long long offset) {
    Pack<T, V> pack;
    pack.raw = *reinterpret_cast<const typename Raw<sizeof(T) * V>::Type*>((const T*)base + offset);
    return pack;
}

// Loads and stores of elements that are not needed again: the L2 cache evicts these first.
template <typename T, int V>
__device__ inline Pack<T, V> load_streaming(const void* base, long long offset) {
    Pack<T, V> pack;
    typedef typename Raw<sizeof(T) * V>::Type Type;
    pack.raw = __ldcs(reinterpret_cast<const Type*>((const T*)base + offset));
    return pack;
}
template <typename T, int V>
__device__ inline void store_streaming(void* base, long long offset, const Pack<T, V>& pack) {
    __stcs(reinterpret_cast<typename Raw<sizeof(T) * V>::Type*>((T*)base + offset), pack.raw);
}

// Weights: those of None are all 1, those of a mask 1 or 0. `Type` is the type of weighted values.
struct None {};
typedef unsigned char Mask;

template <typename W, typename A> struct Weight {  // of a mask
    typedef A Type;
    static const bool PRESENT = true;
    static __device__ A read(const void* base, long long offset) {
        return ((const Mask*)base)[offset] ? 1 : 0;
    }
};
template <typename A> struct Weight<None, A> {
    typedef A Type;
    static const bool PRESENT = false;
    static __device__ A read(const void*, long long) { return 1; }
};
template <typename A> struct Weight<double, A> {
    typedef double Type;
    static const bool PRESENT = true;
    static __device__ double read(const void* base, long long offset) {
        return ((const double*)base)[offset];
    }
};

// A per-channel vector of any floating-point dtype, at a stride. Python packs these (launches.py).
struct Vector {
    const void* data;
    long long dtype_tag;
    long long stride;  // in elements; 0 where all channels share one value
};
enum DtypeTag { NOTHING, HALF, BFLOAT16, SINGLE, DOUBLE };

__device__ inline double load_channel(const Vector& v, long long c, double default_value) {
    c *= v.stride;
    switch (v.dtype_tag) {
        case HALF: return value(((const Half*)v.data)[c]);
        case BFLOAT16: return value(((const BFloat16*)v.data)[c]);
        case SINGLE: return ((const float*)v.data)[c];
        case DOUBLE: return ((const double*)v.data)[c];
        default: return default_value;
    }
}
__device__ inline void store_channel(const Vector& v, long long c, double result) {
    c *= v.stride;
    switch (v.dtype_tag) {
        case HALF: set(((Half*)v.data)[c], (float)result); break;
        case BFLOAT16: set(((BFloat16*)v.data)[c], (float)result); break;
        case SINGLE: ((float*)v.data)[c] = (float)result; break;
        case DOUBLE: ((double*)v.data)[c] = result; break;
        default: break;
    }
}

// Pairwise summation of L values: the error grows with log L. Recursion keeps them in registers.
template <int L, typename A> __device__ __forceinline__ A pairwise_sum(const A* v) {
    if constexpr (L == 1)
        return v[0];
    else
        return pairwise_sum<L / 2>(v) + pairwise_sum<L - L / 2>(v + L / 2);
}
