// The binding: NumPy arrays and PyTorch's CPU tensors to passes of the core.
//
// Each function takes its arguments by position and returns None for what it does not take, before
// anything is written: Python then checks the arguments, and explains or runs them in general. `trusted`
// says that it has: where values of weights and the memory of `out` have been looked at.

#include "arrays.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <thread>

#include "xla.h"

namespace {

PyObject* moments_of(Vectors& stats) {
    PyObject* fields = PyTuple_New(4);
    PyObject* arguments = fields ? PyTuple_New(1) : nullptr;
    if (!arguments) {
        Py_XDECREF(fields);
        return nullptr;
    }
    for (int i = 0; i < 4; ++i) PyTuple_SET_ITEM(fields, i, stats.release(i));
    PyTuple_SET_ITEM(arguments, 0, fields);
    PyObject* made = PyTuple_Type.tp_new((PyTypeObject*)moments_type, arguments, nullptr);
    Py_DECREF(arguments);
    return made;
}

PyObject* pair(PyObject* a, PyObject* b) {  // takes references
    PyObject* made = a && b ? PyTuple_New(2) : nullptr;
    if (!made) {
        Py_XDECREF(a);
        Py_XDECREF(b);
        return nullptr;
    }
    PyTuple_SET_ITEM(made, 0, a);
    PyTuple_SET_ITEM(made, 1, b);
    return made;
}

// Weights with as many axes as x; axes of length 1 are repeated.
struct Weights {
    Array given;
    int64_t strides[MAX_AXES];

    bool set(PyObject* object, const Array& x, Call& call) {
        if (object == Py_None) return true;
        if (!read(object, given) || !given.aligned || given.tensor != x.tensor || given.ndim > x.ndim)
            return false;
        int first = x.ndim - given.ndim;
        for (int i = 0; i < x.ndim; ++i) {
            int64_t n = i < first ? 1 : given.shape[i - first];
            if (n != 1 && n != x.shape[i]) return false;
            strides[i] = n == 1 ? 0 : given.strides[i - first];
        }
        call.weights = {given.data, given.dtype, strides};
        return true;
    }
};

// Whether `out` may be written to while the others are read. Its elements share no memory where it lies
// as a contiguous array does, or as x.
bool takes_out(PyObject* object, const Array& x, const Array* dy, bool trusted, Array& out) {
    if (!read_big(object, out) || out.tensor != x.tensor || out.dtype != x.dtype || !out.same_shape(x)
        || !out.writeable)
        return false;
    if (trusted) return true;
    if (!out.contiguous()) return false;
    if (out.overlaps(x) && !out.same_place(x)) return false;
    return !dy || !out.overlaps(*dy) || out.same_place(*dy);
}
bool apart(const Array& out, const Array& v) { return v.dtype == NONE || !out.overlaps(v); }

// The activation by its name, or a name and a slope; false where there is no such. Others than leaky_relu
// have a slope in an `Activation` only, which has been validated.
bool set_activation(PyObject* object, Call& call) {
    static const char* const NAMES[] = {"relu", "relu6", "leaky_relu", "silu"};  // as in `activations.h`
    if (object == Py_None) return true;
    PyObject* name = object;
    call.slope = 0.01;
    bool sloped = PyTuple_Check(object) && PyTuple_GET_SIZE(object) == 2;
    if (sloped) {
        name = PyTuple_GET_ITEM(object, 0);
        if (!number_at_least_0(PyTuple_GET_ITEM(object, 1), call.slope)) return false;
    }
    if (!PyUnicode_Check(name)) return false;
    for (int k = 0; k < 4; ++k)
        if (!PyUnicode_CompareWithASCIIString(name, NAMES[k])) call.activation = 1 + k;
    return call.activation && (!sloped || !PyTuple_CheckExact(object) || call.activation == LEAKY_RELU);
}

// An array like x, in the place of z.
bool set_residual(PyObject* object, const Array& x, Array& residual, Call& call) {
    if (!read_big(object, residual) || residual.dtype != x.dtype || residual.tensor != x.tensor
        || !residual.same_shape(x))
        return false;
    call.residual = residual.operand();
    return true;
}

bool set_epilogue(
    PyObject* residual, PyObject* activation, const Array& x, Array& z, Call& call) {
    z.dtype = NONE;
    return set_activation(activation, call)
        && (residual == Py_None || set_residual(residual, x, z, call));
}

// Of a backward pass: the residual is an array, or whether there was one, and y may be given in its place.
// Whether its gradient is wanted goes to `gradient`.
bool set_backward_epilogue(
    PyObject* residual, PyObject* activation, PyObject* y, const Array& x, Array& z,
    Call& call, bool& gradient) {
    z.dtype = NONE;
    gradient = residual != Py_None && residual != Py_False;
    bool array = gradient && residual != Py_True;
    if (!set_activation(activation, call)) return false;
    if (!call.activation) return !gradient && y == Py_None;
    if (y != Py_None) {
        Array unread;
        if (call.activation == SILU || (array && !set_residual(residual, x, unread, call))) return false;
        call.from_y = true;
        return set_residual(y, x, z, call);
    }
    return array ? set_residual(residual, x, z, call) : !gradient;
}

// A number of threads, which users may set as high as they like; no more than there can be.
int thread_count_of(PyObject* count) {
    int overflow;
    long n = PyLong_AsLongAndOverflow(count, &overflow);
    return overflow > 0 || n > MOST_THREADS ? MOST_THREADS : (int)n;
}

bool set_threads(Call& call, const Array& x) {
    call.kernels = kernels;
    call.threads = nullptr;
    call.thread_count = 1;
    if (x.nbytes() * MAX_OPERANDS < ALONE_BYTES) return true;  // no plan would use another
    PyObject* count = PyObject_CallNoArgs(get_num_threads);
    if (!count) return false;
    call.thread_count = thread_count_of(count);
    Py_DECREF(count);
    if (PyErr_Occurred()) return false;
    if (x.tensor) call.threads = torch_threads(call.thread_count);
    if (!call.threads) call.threads = &own_threads();
    return true;
}

// Take the interpreter's lock again. Where the interpreter has ended meanwhile, Python ends this thread by an
// exception of the system, in whose way objects would be released: it stays here instead, until the process
// ends.
void restore(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

// Run a pass, without the interpreter's lock where it takes a while.
template <class Run> bool run(const Array& x, Run pass) {
    bool failed = false;
    PyThreadState* state = x.nbytes() >= RELEASED_BYTES ? PyEval_SaveThread() : nullptr;
    try {
        pass();
    } catch (const std::bad_alloc&) {
        failed = true;
    }
    if (state) restore(state);
    if (failed) PyErr_NoMemory();
    return !failed;
}

Call call_of(const Array& x, const Channels& channels) {
    Call call = {};
    call.ndim = x.ndim;
    call.shape = x.shape;
    call.channel_axes = channels.mask;
    return call;
}

void set_statistics(Call& call, const Vectors& stats) {
    call.count = stats.doubles(0);
    call.mean = stats.doubles(1);
    call.var = stats.doubles(2);
    call.low = stats.doubles(3);
}

// The array that a pass writes to: `out`, which has been read to `array`, or a new one.
struct Result {
    PyObject* object;
    Result(const Array& x, PyObject* out, Array& array) {
        if (out != Py_None) {
            object = Py_NewRef(out);
            return;
        }
        object = new_like(x);
        if (object && !read(object, array)) {
            Py_CLEAR(object);
            PyErr_SetString(PyExc_SystemError, "no memory of a new array");
        }
    }
    ~Result() { Py_XDECREF(object); }
    PyObject* release() {
        PyObject* o = object;
        object = nullptr;
        return o;
    }
};

bool arguments(Py_ssize_t got, Py_ssize_t expected, bool subclasses) {
    reads_subclasses = subclasses;
    if (got == expected) return true;
    PyErr_Format(PyExc_TypeError, "got %zd arguments, expected %zd", got, expected);
    return false;
}

// (running_mean, running_var, r_max, d_max) of batch renormalization, or None.
struct Renorm {
    Array v[2];
    Doubles room[2];
    bool set(PyObject* object, const Channels& channels, Call& call) {
        if (object == Py_None) return true;
        if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 4) return false;
        const double** to[] = {&call.running_mean, &call.running_var};
        for (int i = 0; i < 2; ++i)
            if (!optional_vector(PyTuple_GET_ITEM(object, i), channels, v[i], room[i], *to[i])) return false;
        return call.running_mean && call.running_var
            && number_at_least_0(PyTuple_GET_ITEM(object, 2), call.r_max)
            && number_at_least_0(PyTuple_GET_ITEM(object, 3), call.d_max);
    }
};

// Gamma and beta with which a backward pass is one of batch renormalization, and dgamma of that.
struct Renormalized {
    Doubles room[4];
    double *r, *d;
    void set(Call& call, int64_t channels) {
        r = room[0].room(channels);
        d = room[1].room(channels);
        double *gamma = room[2].room(channels), *beta = room[3].room(channels);
        for (int64_t c = 0; c < channels; ++c) {
            bn::renorm_corrections(
                call.mean[c], call.low ? call.low[c] : 0.0, call.var[c], call.running_mean[c],
                call.running_var[c], call.eps, call.r_max, call.d_max, r[c], d[c]);
            double own = call.gamma ? call.gamma[c] : 1.0;
            gamma[c] = own * r[c];
            beta[c] = (call.beta ? call.beta[c] : 0.0) + own * d[c];
        }
        call.gamma = gamma;
        call.beta = beta;
        call.running_mean = nullptr;  // of forward passes only
    }
    void finish(double* dgamma, const double* dbeta, int64_t channels) const {
        for (int64_t c = 0; c < channels; ++c) dgamma[c] = r[c] * dgamma[c] + d[c] * dbeta[c];
    }
};

// forward(x, gamma, beta, axis, eps, where, residual, activation, out, trusted, renorm=None)
// -> (y, Moments) or None
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t n) {
    bool trusted = n >= 10 && args[9] == Py_True;
    if (!arguments(n, std::clamp<Py_ssize_t>(n, 10, 11), trusted)) return nullptr;
    Array x, gamma, beta, z, out;
    Channels channels;
    if (!read_big(args[0], x) || !channels.set(args[3], x) || channels.values < 2)
        return declined();
    if (x.tensor && !trusted) return declined();
    Call call = call_of(x, channels);
    Doubles gamma_room, beta_room;
    Weights weights;
    if (!number_at_least_0(args[4], call.eps)
        || !optional_vector(args[1], channels, gamma, gamma_room, call.gamma)
        || !optional_vector(args[2], channels, beta, beta_room, call.beta)
        || !weights.set(args[5], x, call) || !set_epilogue(args[6], args[7], x, z, call))
        return declined();
    if (call.weights.data && call.weights.dtype != MASK && !trusted) return declined();
    Renorm renorm;
    if (n > 10 && !renorm.set(args[10], channels, call)) return declined();
    bool given = args[8] != Py_None;
    if (given) {
        if (!takes_out(args[8], x, nullptr, trusted, out)) return declined();
        if (!trusted
            && !(apart(out, gamma) && apart(out, beta)
                 && (!call.weights.data || apart(out, weights.given))
                 && (apart(out, z) || out.same_place(z))))
            return declined();
    }
    Vectors stats;
    Result y(x, args[8], out);
    if (!y.object || !stats.make(4, channels, DOUBLE, x) || !set_threads(call, x)) return nullptr;
    set_statistics(call, stats);
    double fewest = call.weights.data && call.weights.dtype == MASK ? 2 : 0;
    bool enough = true;
    if (!run(x, [&] {
            enough = bn::forward(call, x.operand(), out.operand(), Wanted::ALL, fewest);
        }))
        return nullptr;
    return enough ? pair(y.release(), moments_of(stats)) : declined();
}

// moments(x, axis, where) -> Moments or None
PyObject* moments(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 3, true)) return nullptr;
    Array x;
    Channels channels;
    if (!read_big(args[0], x) || !channels.set(args[1], x)) return declined();
    Call call = call_of(x, channels);
    call.exact = true;  // their results are float64
    Weights weights;
    if (!weights.set(args[2], x, call)) return declined();
    Vectors stats;
    if (!stats.make(4, channels, DOUBLE, x) || !set_threads(call, x)) return nullptr;
    set_statistics(call, stats);
    if (!run(x, [&] { bn::forward(call, x.operand(), x.operand(), Wanted::STATISTICS, 0); }))
        return nullptr;
    return moments_of(stats);
}

// inference(x, mean, var, mean_lo, gamma, beta, axis, eps, residual, activation, out, trusted) -> y or None
PyObject* inference(PyObject*, PyObject* const* args, Py_ssize_t n) {
    bool trusted = n == 12 && args[11] == Py_True;
    if (!arguments(n, 12, trusted)) return nullptr;
    Array x, v[5], z, out;
    Channels channels;
    if (!read_big(args[0], x) || !channels.set(args[6], x)) return declined();
    if (x.tensor && !trusted) return declined();
    Call call = call_of(x, channels);
    Doubles room[5];
    const double* vectors[5];
    if (!number_at_least_0(args[7], call.eps) || !set_epilogue(args[8], args[9], x, z, call))
        return declined();
    for (int i = 0; i < 5; ++i)
        if (!optional_vector(args[1 + i], channels, v[i], room[i], vectors[i])) return declined();
    if (!vectors[0] || !vectors[1]) return declined();
    bool given = args[10] != Py_None;
    if (given) {
        if (!takes_out(args[10], x, nullptr, trusted, out)) return declined();
        for (int i = 0; i < 5 && !trusted; ++i)
            if (!apart(out, v[i])) return declined();
        if (!trusted && !apart(out, z) && !out.same_place(z)) return declined();
    }
    Result y(x, args[10], out);
    if (!y.object || !set_threads(call, x)) return nullptr;
    call.mean = (double*)vectors[0];
    call.var = (double*)vectors[1];
    call.low = (double*)vectors[2];
    call.gamma = vectors[3];
    call.beta = vectors[4];
    if (!run(x, [&] { bn::inference(call, x.operand(), out.operand()); })) return nullptr;
    return y.release();
}

// dy and x, of one library, dtype and shape: the first arguments of a backward pass.
bool read_gradient(PyObject* const* args, Array& dy, Array& x) {
    return read_big(args[0], dy) && read_big(args[1], x) && dy.dtype == x.dtype && dy.tensor == x.tensor
        && dy.same_shape(x);
}

// Statistics of a backward pass. A count may be one number, for all channels.
struct Statistics {
    Array v[4];
    Doubles room[4];
    bool set(PyObject* stats, const Channels& channels, Call& call) {
        if ((PyObject*)Py_TYPE(stats) != moments_type) return false;
        const double* at[4];
        double one;
        bool same = number(PyTuple_GET_ITEM(stats, 0), one);
        if (same) {
            if (!at_least_0(one)) return false;
            double* to = room[0].room(channels.count);
            for (int64_t c = 0; c < channels.count; ++c) to[c] = one;
            at[0] = to;
            v[0].dtype = NONE;
        }
        for (int i = same ? 1 : 0; i < 4; ++i)
            if (!optional_vector(PyTuple_GET_ITEM(stats, i), channels, v[i], room[i], at[i])) return false;
        if (!at[0] || !at[1] || !at[2]) return false;
        call.count = (double*)at[0];
        call.mean = (double*)at[1];
        call.var = (double*)at[2];
        call.low = (double*)at[3];
        return true;
    }
};

// backward(dy, x, stats, gamma, beta, axis, eps, where, residual, activation, y, out, trusted, renorm=None)
// -> (dx, dgamma, dbeta), and with a residual dresidual; or None
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
    bool trusted = n >= 13 && args[12] == Py_True;
    if (!arguments(n, std::clamp<Py_ssize_t>(n, 13, 14), trusted)) return nullptr;
    Array dy, x, gamma, beta, z, out, g;
    Channels channels;
    if (!read_gradient(args, dy, x) || !channels.set(args[5], x)) return declined();
    if (x.tensor && !trusted) return declined();
    Call call = call_of(x, channels);
    Doubles gamma_room, beta_room, dgamma_room, dbeta_room;
    Statistics stats;
    Weights weights;
    bool with_residual;
    if (!stats.set(args[2], channels, call)
        || !optional_vector(args[3], channels, gamma, gamma_room, call.gamma)
        || !optional_vector(args[4], channels, beta, beta_room, call.beta)
        || !number_at_least_0(args[6], call.eps) || !weights.set(args[7], x, call)
        || !set_backward_epilogue(args[8], args[9], args[10], x, z, call, with_residual))
        return declined();
    if (call.weights.data && call.weights.dtype != MASK && !trusted) return declined();
    Renorm renorm;
    std::optional<Renormalized> renormalized;
    if (n > 13 && !renorm.set(args[13], channels, call)) return declined();
    if (call.running_mean) renormalized.emplace().set(call, channels.count);
    bool given = args[11] != Py_None;
    if (given) {
        if (!takes_out(args[11], x, &dy, trusted, out)) return declined();
        if (!trusted) {
            if (!apart(out, gamma) || !apart(out, beta) || !apart(out, z)
                || (call.weights.data && !apart(out, weights.given)))
                return declined();
            for (const Array& v : stats.v)
                if (!apart(out, v)) return declined();
        }
    }
    call.exact = gamma.dtype == DOUBLE;
    DType dtype = gamma.dtype != NONE ? gamma.dtype : x.dtype == DOUBLE ? DOUBLE : SINGLE;
    Vectors grads;
    Result dx(x, args[11], out);
    std::optional<Result> dresidual;
    if (with_residual) dresidual.emplace(x, Py_None, g);
    if (!dx.object || (dresidual && !dresidual->object) || !grads.make(2, channels, dtype, x, &gamma)
        || !set_threads(call, x))
        return nullptr;
    if (with_residual) call.g = g.operand();
    double* dgamma = dgamma_room.room(channels.count);
    double* dbeta = dbeta_room.room(channels.count);
    if (!run(x, [&] {
            bn::backward(call, dy.operand(), x.operand(), out.operand(), dgamma, dbeta);
        }))
        return nullptr;
    if (renormalized) renormalized->finish(dgamma, dbeta, channels.count);
    write_values(dtype, grads.data[0], dgamma, channels.count);
    write_values(dtype, grads.data[1], dbeta, channels.count);
    PyObject* result = PyTuple_New(with_residual ? 4 : 3);
    if (!result) return nullptr;
    PyTuple_SET_ITEM(result, 0, dx.release());
    PyTuple_SET_ITEM(result, 1, grads.release(0));
    PyTuple_SET_ITEM(result, 2, grads.release(1));
    if (with_residual) PyTuple_SET_ITEM(result, 3, dresidual->release());
    return result;
}

// update_running(mean, var, stats, momentum, correction, in_place) -> (mean, var) or None
PyObject* update_running(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 6, false)) return nullptr;
    bool in_place = args[5] == Py_True;
    Array mean, var;
    double momentum, correction;
    if (!read(args[0], mean) || !read(args[1], var) || mean.tensor != var.tensor || !mean.floating()
        || !var.floating() || !mean.same_shape(var) || !number_at_least_0(args[3], momentum)
        || momentum > 1 || !number_at_least_0(args[4], correction))
        return declined();
    if (in_place && !(mean.contiguous() && var.contiguous() && mean.writeable && var.writeable))
        return declined();
    Channels channels;
    channels.ndim = mean.ndim;
    std::memcpy(channels.shape, mean.shape, mean.ndim * sizeof(int64_t));
    channels.count = mean.size();
    channels.tensor = mean.tensor;
    Call call = {};
    Statistics stats;
    if (!stats.set(args[2], channels, call)) return declined();
    Doubles mean_room, var_room, new_mean, new_var;
    const double *old_mean = mean_room.of(mean), *old_var = var_room.of(var);
    double *to_mean = new_mean.room(channels.count), *to_var = new_var.room(channels.count);
    for (int64_t c = 0; c < channels.count; ++c) {
        double count = call.count[c], freedom = count > correction ? count - correction : count;
        double m = count > 0 ? momentum : 0;
        if (!(freedom > 0)) freedom = 1;
        to_mean[c] = (1 - m) * old_mean[c] + m * call.mean[c];
        to_var[c] = (1 - m) * old_var[c] + m * (call.var[c] * (count / freedom));
    }
    Vectors made[2];
    const Array* old[2] = {&mean, &var};
    const double* to[2] = {to_mean, to_var};
    for (int i = 0; i < 2; ++i) {
        char* data = old[i]->data;
        if (in_place) {
            made[i].object[0] = Py_NewRef(old[i]->object);
        } else {
            if (!made[i].make(1, channels, old[i]->dtype, *old[i], old[i])) return nullptr;
            data = made[i].data[0];
        }
        write_values(old[i]->dtype, data, to[i], channels.count);
    }
    return pair(made[0].release(0), made[1].release(0));
}

// The kernels of `Backend`. Vectors come in the type of the arithmetic, contiguous, with C values.

const void* vector(PyObject* object, const Channels& channels, DType dtype) {
    Array v;
    bool fits = read(object, v) && v.dtype == (dtype == DOUBLE ? DOUBLE : SINGLE) && v.aligned
        && v.contiguous() && v.size() == channels.count;
    static const double nothing = 0;  // an empty tensor has no address
    return !fits ? nullptr : v.data ? (const void*)v.data : &nothing;
}

// scale_shift(x, m, a, b, axis, residual, activation, out) -> y or None
PyObject* scale_shift(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 8, true)) return nullptr;
    Array x, z, out;
    Channels channels;
    if (!read_big(args[0], x) || !channels.set(args[4], x)) return declined();
    const void* vectors[3];
    for (int k = 0; k < 3; ++k)
        if (!(vectors[k] = vector(args[1 + k], channels, x.dtype))) return declined();
    bool given = args[7] != Py_None;
    if (given && !takes_out(args[7], x, nullptr, true, out)) return declined();
    Call call = call_of(x, channels);
    if (!set_epilogue(args[5], args[6], x, z, call)) return declined();
    Result y(x, args[7], out);
    if (!y.object || !set_threads(call, x)) return nullptr;
    if (!run(x, [&] { bn::scale_shift(call, x.operand(), vectors, out.operand()); })) return nullptr;
    return y.release();
}

// activation_gradient(dy, x, m, a, b, axis, residual, activation, y) -> g or None
PyObject* activation_gradient(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 9, true)) return nullptr;
    Array dy, x, z, out;
    Channels channels;
    if (!read_gradient(args, dy, x) || !channels.set(args[5], x)) return declined();
    const void* vectors[3];
    for (int k = 0; k < 3; ++k)
        if (!(vectors[k] = vector(args[2 + k], channels, x.dtype))) return declined();
    Call call = call_of(x, channels);
    call.from_y = args[8] != Py_None;
    if (!set_epilogue(call.from_y ? args[8] : args[6], args[7], x, z, call)) return declined();
    Result g(x, Py_None, out);
    if (!g.object || !set_threads(call, x)) return nullptr;
    if (!run(x, [&] {
            bn::activation_gradient(call, dy.operand(), x.operand(), vectors, out.operand());
        }))
        return nullptr;
    return g.release();
}

// grad_sums(dy, x, m, where, axis) -> (sum_dy, sum_dy_d) or None
PyObject* grad_sums(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 5, true)) return nullptr;
    Array dy, x;
    Channels channels;
    if (!read_gradient(args, dy, x) || !channels.set(args[4], x)) return declined();
    Call call = call_of(x, channels);
    call.exact = true;  // their results are float64
    Weights weights;
    const void* m = vector(args[2], channels, x.dtype);
    if (!m || !weights.set(args[3], x, call)) return declined();
    Vectors sums;
    if (!sums.make(2, channels, DOUBLE, x) || !set_threads(call, x)) return nullptr;
    if (!run(x, [&] {
            bn::grad_sums(call, dy.operand(), x.operand(), m, sums.doubles(0), sums.doubles(1));
        }))
        return nullptr;
    return pair(sums.release(0), sums.release(1));
}

// grad_input(dy, x, m, a, b, c, where, axis, out) -> dx or None
PyObject* grad_input(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 9, true)) return nullptr;
    Array dy, x, out;
    Channels channels;
    if (!read_gradient(args, dy, x) || !channels.set(args[7], x)) return declined();
    const void* vectors[4];
    for (int k = 0; k < 4; ++k)
        if (!(vectors[k] = vector(args[2 + k], channels, x.dtype))) return declined();
    Call call = call_of(x, channels);
    Weights weights;
    if (!weights.set(args[6], x, call)) return declined();
    bool given = args[8] != Py_None;
    if (given && !takes_out(args[8], x, &dy, true, out)) return declined();
    Result dx(x, args[8], out);
    if (!dx.object || !set_threads(call, x)) return nullptr;
    if (!run(x, [&] {
            bn::grad_input(call, dy.operand(), x.operand(), vectors, out.operand());
        }))
        return nullptr;
    return dx.release();
}

// setup(Moments, get_num_threads, empty_like)
PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 3, false)) return nullptr;
    moments_type = Py_NewRef(args[0]);
    get_num_threads = Py_NewRef(args[1]);
    empty_like = Py_NewRef(args[2]);
    Py_RETURN_NONE;
}

// use_tensors(Tensor, Parameter, DLPack's exchange interface, empty_like)
PyObject* use_tensors(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!arguments(n, 4, false)) return nullptr;
    auto* found = (const DLPackExchangeAPI*)PyCapsule_GetPointer(args[2], "dlpack_exchange_api");
    if (!found) return nullptr;
    if (found->header.version.major != 1) {
        PyErr_SetString(PyExc_ImportError, "another version of DLPack than 1");
        return nullptr;
    }
    tensor_types[0] = Py_NewRef(args[0]);
    tensor_types[1] = Py_NewRef(args[1]);
    empty_tensor_like = Py_NewRef(args[3]);
    dlpack = found;
    Py_RETURN_NONE;
}

// fits(x, axis, *vectors) -> whether each vector is None, or has one number for each channel of x
PyObject* fits(PyObject*, PyObject* const* args, Py_ssize_t n) {
    reads_subclasses = false;
    Array x, v;
    Channels channels;
    if (n < 2 || !read_big(args[0], x) || !channels.set(args[1], x)) Py_RETURN_FALSE;
    for (Py_ssize_t i = 2; i < n; ++i)
        if (args[i] != Py_None
            && (!read(args[i], v) || !v.floating() || v.tensor != x.tensor || !channels.fits(v)))
            Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

// instruction_sets() -> names, from the oldest, and the one in use
PyObject* isas(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const char* const* name = instruction_sets(); names && *name; ++name) {
        PyObject* v = PyUnicode_FromString(*name);
        if (!v || PyList_Append(names, v)) Py_CLEAR(names);
        Py_XDECREF(v);
    }
    return names ? pair(names, PyUnicode_FromString(kernels->name)) : nullptr;
}

// xla_handlers() -> capsules of XLA's handlers, by name
PyObject* xla_handlers(PyObject*, PyObject*) {
    PyObject* found = PyDict_New();
    for (const bn::xla::Handler* h = bn::xla::HANDLERS; found && h->name; ++h) {
        PyObject* capsule = PyCapsule_New(h->function, nullptr, nullptr);
        if (!capsule || PyDict_SetItemString(found, h->name, capsule)) Py_CLEAR(found);
        Py_XDECREF(capsule);
    }
    return found;
}

// set_xla_threads(count): how many threads of XLA a call may use
PyObject* set_xla_threads(PyObject*, PyObject* count) {
    int n = thread_count_of(count);
    if (PyErr_Occurred()) return nullptr;
    bn::xla::set_thread_count(n);
    Py_RETURN_NONE;
}

#define FUNCTION(name, function, doc) {name, (PyCFunction)(void (*)())function, METH_FASTCALL, doc}
PyMethodDef METHODS[] = {
    FUNCTION("setup", setup, "setup(Moments, get_num_threads, empty_like)"),
    FUNCTION("forward", forward, 
             "forward(x, gamma, beta, axis, eps, where, residual, activation, out, trusted, renorm=None)"),
    FUNCTION("moments", moments, "moments(x, axis, where)"),
    FUNCTION("inference", inference,
             "inference(x, mean, var, mean_lo, gamma, beta, axis, eps, residual, activation, out, trusted)"),
    FUNCTION("backward", backward, 
             "backward(dy, x, stats, gamma, beta, axis, eps, where, residual, activation, y, out, trusted, "
             "renorm=None)"),
    FUNCTION("update_running", update_running, "update_running(mean, var, stats, momentum, correction, in_place)"),
    FUNCTION("scale_shift", scale_shift, "scale_shift(x, m, a, b, axis, residual, activation, out)"),
    FUNCTION("activation_gradient", activation_gradient,
             "activation_gradient(dy, x, m, a, b, axis, residual, activation, y)"),
    FUNCTION("grad_sums", grad_sums, "grad_sums(dy, x, m, where, axis)"),
    FUNCTION("grad_input", grad_input, "grad_input(dy, x, m, a, b, c, where, axis, out)"),
    FUNCTION("use_tensors", use_tensors, "use_tensors(Tensor, Parameter, exchange, empty_like)"),
    FUNCTION("fits", fits, "fits(x, axis, *vectors)"),
    {"xla_handlers", xla_handlers, METH_NOARGS, "xla_handlers() -> capsules, by name"},
    {"set_xla_threads", set_xla_threads, METH_O, "set_xla_threads(count)"},
    {"instruction_sets", isas, METH_NOARGS, "instruction_sets() -> (names, the one in use)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_core", "The compiled core of batchnorm.", -1, METHODS,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

// By this, threadpoolctl knows the library.
extern "C" __attribute__((visibility("default"))) const int batchnorm_core = 1;

PyMODINIT_FUNC PyInit__core() {
    const char* isa = std::getenv("BATCHNORM_ISA");
    kernels = kernels_for(isa && *isa ? isa : nullptr);
    if (!kernels) {
        std::string names;
        for (const char* const* name = instruction_sets(); *name; ++name)
            names += (names.empty() ? "" : ", ") + std::string(*name);
        PyErr_Format(
            PyExc_ImportError, "BATCHNORM_ISA: got '%s', expected one that this processor has: %s", isa,
            names.c_str());
        return nullptr;
    }
    bn::xla::use(kernels);
    return PyModule_Create(&MODULE);
}
