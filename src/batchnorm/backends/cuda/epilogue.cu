// What follows the norm: y = act(h), h = a (x - m) + b + z; and the way back, from dy to g = act'(h) dy.
//
// Whether a kernel has an epilogue is a template parameter, so that one without has the code and the
// registers that it would have if there were no epilogues. Which activation it is, and whether there is a
// residual, are parameters of the launch: with an instance for each, there would be ten times as many.

template <int ACTIVATION> struct Chosen {
    __device__ constexpr operator int() const { return ACTIVATION; }
};

// Call f with the activation, from FIRST on, as a constant: one branch for all that f computes, where the
// arithmetic on an element of 16 bits takes hardly longer than a branch for it would.
template <bool EPILOGUE, int FIRST = IDENTITY, typename F>
__device__ __forceinline__ void choose_activation(const Params& params, F f) {
    if constexpr (!EPILOGUE || FIRST + 1 == ACTIVATIONS)
        f(Chosen<FIRST>());
    else if (params.activation == FIRST)
        f(Chosen<FIRST>());
    else
        choose_activation<EPILOGUE, FIRST + 1>(params, f);
}

// What the activation is applied to, from h without the residual, and from z or y.
template <typename A> __device__ inline A before_activation(const Params& params, A h, A z) {
    if (!params.residual) return h;
    return params.phases & FROM_Y ? z : h + z;
}

template <typename T, int V>
__device__ inline void load_residual(Pack<T, V>& z, const Params& params, long long offset) {
    if (params.residual) z = load_streaming<T, V>(params.residual, offset);
}
