// What follows the norm: y = act(h), h = a (x - m) + b + z; and the way back, from dy to g = act'(h) dy.
//
// Whether a kernel has an epilogue is a template parameter, so that one without has the code and the
// registers that it would have if there were no epilogues. Which activation it is, and whether there is a
// residual, are parameters of the launch: an instance for each would be compiled at its first call.

template <int ACTIVATION> struct Chosen {
    __device__ constexpr operator int() const { return ACTIVATION; }
};

// Call f with the activation as a constant: of one branch for all that f computes, rather than one for
// each element.
template <bool EPILOGUE, int FIRST = IDENTITY, typename F>
__device__ __forceinline__ void choose_activation(const Params& params, F f) {
    if constexpr (!EPILOGUE || FIRST + 1 == ACTIVATIONS)
        f(Chosen<FIRST>());
    else if (params.activation == FIRST)
        f(Chosen<FIRST>());
    else
        choose_activation<EPILOGUE, FIRST + 1>(params, f);
}

// What the activation is applied to, from h without the residual, and the value of z, or of y in its place.
template <typename A> __device__ inline A before_activation(const Params& params, A h, A z) {
    if (!params.residual) return h;
    return params.phases & FROM_Y ? z : h + z;
}

template <typename T, int V>
__device__ inline void load_residual(Pack<T, V>& z, const Params& params, long long offset) {
    if (params.residual) z = load_streaming<T, V>(params.residual, offset);
}
