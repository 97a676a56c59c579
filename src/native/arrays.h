// Arrays as the core takes them: what of NumPy's arrays and PyTorch's tensors is read, and new ones.
//
// Included once, by the binding: NumPy's interface is a table of the file that imports it.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <cstring>
#include <limits>
#include <memory>

#include "core.h"
#include "dlpack.h"
#include "values.h"

namespace {

using namespace bn;

// What Python gives at the beginning.
PyObject* moments_type;     // a named tuple of count, mean, var and mean_lo
PyObject* get_num_threads;  // how many threads a call may use
PyObject* empty_like;       // memory for a large NumPy array, of the pool of outputs

// What PyTorch gives, once it is there: tensors and parameters, what describes their memory, and tensors that
// are large or lie in another order than that of their axes.
PyObject* tensor_types[2];
const DLPackExchangeAPI* dlpack;
PyObject* empty_tensor_like;

const Kernels* kernels;

constexpr int64_t POOLED_BYTES = 1 << 20;
// Below this, other threads wait for the interpreter no longer than a switch to them takes.
constexpr int64_t RELEASED_BYTES = 1 << 14;

struct Array {
    PyObject* object;
    char* data;
    int ndim;
    DType dtype;
    bool aligned, writeable, tensor;
    int64_t shape[MAX_AXES], strides[MAX_AXES];  // in bytes

    int itemsize() const { return ITEMSIZES[dtype]; }
    bool floating() const { return dtype != NONE && dtype != MASK; }
    int64_t size() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }
    int64_t nbytes() const { return size() * itemsize(); }
    bool same_shape(const Array& o) const {
        return ndim == o.ndim && !std::memcmp(shape, o.shape, ndim * sizeof(int64_t));
    }
    bool same_place(const Array& o) const {
        return data == o.data && dtype == o.dtype && same_shape(o)
            && !std::memcmp(strides, o.strides, ndim * sizeof(int64_t));
    }
    bool contiguous() const {
        if (!size()) return true;
        int64_t step = itemsize();
        for (int i = ndim - 1; i >= 0; step *= shape[i--])
            if (shape[i] != 1 && strides[i] != step) return false;
        return true;
    }
    void extent(char*& low, char*& high) const {
        low = data;
        high = data + itemsize();
        for (int i = 0; i < ndim; ++i) (strides[i] < 0 ? low : high) += (shape[i] - 1) * strides[i];
    }
    bool overlaps(const Array& o) const {
        char *low, *high, *other_low, *other_high;
        extent(low, high);
        o.extent(other_low, other_high);
        return low < other_high && other_low < high;
    }
    Operand operand() const { return {data, dtype, strides}; }
};

bool numpy_is_there() {
    static bool there = false;
    if (there) return true;
    PyObject* name = PyUnicode_FromString("numpy");
    PyObject* numpy = name ? PyImport_GetModule(name) : nullptr;
    Py_XDECREF(name);
    if (!numpy) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(numpy);
    there = _import_array() >= 0;
    if (!there) PyErr_Clear();
    return there;
}

DType dtype_of(PyArrayObject* a) {
    static int bfloat16 = -1;
    int type = PyArray_TYPE(a);
    switch (type) {
        case NPY_HALF: return HALF;
        case NPY_FLOAT: return SINGLE;
        case NPY_DOUBLE: return DOUBLE;
        case NPY_BOOL: return MASK;
        default: break;
    }
    if (type == bfloat16) return BFLOAT16;
    if (bfloat16 >= 0 || type < NPY_USERDEF) return NONE;
    PyObject* name = PyObject_GetAttrString((PyObject*)PyArray_DESCR(a), "name");  // that of ml_dtypes
    bool found = name && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    if (found) bfloat16 = type;
    return found ? BFLOAT16 : NONE;
}

bool read_numpy(PyObject* object, Array& to) {
    PyArrayObject* a = (PyArrayObject*)object;
    to.dtype = PyArray_ISNOTSWAPPED(a) ? dtype_of(a) : NONE;
    to.ndim = PyArray_NDIM(a);
    to.data = PyArray_BYTES(a);
    to.writeable = PyArray_ISWRITEABLE(a);
    to.aligned = PyArray_ISALIGNED(a);
    to.tensor = false;
    int64_t size = to.itemsize();
    for (int i = 0; i < to.ndim; ++i) {
        to.shape[i] = PyArray_DIM(a, i);
        to.strides[i] = PyArray_STRIDE(a, i);
        if (size && to.strides[i] % size) to.aligned = false;
    }
    return to.dtype != NONE;
}

// Whether PyTorch changes the sign of a view as it reads it.
bool is_negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* found = PyObject_CallMethodNoArgs(tensor, name);
    bool negated = found != Py_False;
    if (!found) PyErr_Clear();
    Py_XDECREF(found);
    return negated;
}

bool read_tensor(PyObject* object, Array& to) {
    DLTensor t;
    if (is_negated(object)) return false;
    if (dlpack->dltensor_from_py_object_no_sync(object, &t)) {
        PyErr_Clear();
        return false;
    }
    if (t.device.device_type != DL_CPU || t.ndim > MAX_AXES || t.dtype.lanes != 1) return false;
    switch (t.dtype.code) {
        case DL_FLOAT: to.dtype = t.dtype.bits == 16 ? HALF : t.dtype.bits == 32 ? SINGLE
                                : t.dtype.bits == 64 ? DOUBLE : NONE; break;
        case DL_BFLOAT: to.dtype = t.dtype.bits == 16 ? BFLOAT16 : NONE; break;
        case DL_BOOL: to.dtype = MASK; break;
        default: to.dtype = NONE;
    }
    to.ndim = t.ndim;
    to.data = (char*)t.data + t.byte_offset;
    to.writeable = to.tensor = true;
    int64_t size = to.itemsize(), step = size;
    to.aligned = !size || (uintptr_t)to.data % size == 0;
    for (int i = t.ndim - 1; i >= 0; --i) {
        to.shape[i] = t.shape[i];
        to.strides[i] = t.strides ? t.strides[i] * size : step;
        step *= t.shape[i];
    }
    if (!to.data && step) return false;  // a tensor of zeros without memory
    return to.dtype != NONE;
}

// Whether subclasses of NumPy's arrays are read, which may have meanings of their own (a mask, say): where the
// general path has looked at them. Set by each function, under the interpreter's lock.
bool reads_subclasses;

// Whether an object is an array that the core reads.
bool read(PyObject* object, Array& to) {
    to.object = object;
    PyObject* type = (PyObject*)Py_TYPE(object);
    if (dlpack && (type == tensor_types[0] || type == tensor_types[1])) return read_tensor(object, to);
    return numpy_is_there() && (reads_subclasses ? PyArray_Check(object) : PyArray_CheckExact(object))
        && read_numpy(object, to);
}

bool read_big(PyObject* object, Array& to) {
    return read(object, to) && to.floating() && to.aligned;
}

bool number(PyObject* object, double& v) {
    if (PyFloat_Check(object)) {
        v = PyFloat_AsDouble(object);
        return true;
    }
    if (!PyLong_CheckExact(object)) return false;
    v = PyLong_AsDouble(object);
    if (v == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

bool at_least_0(double v) { return v >= 0 && v <= std::numeric_limits<double>::max(); }
bool number_at_least_0(PyObject* object, double& v) { return number(object, v) && at_least_0(v); }

// The channel axes of an array of some shape.
struct Channels {
    uint64_t mask = 0;
    int ndim = 0;
    int64_t shape[MAX_AXES];
    int64_t count = 1, values = 1;
    bool tensor = false;  // vectors are of the library of x

    bool set(PyObject* axis, const Array& x) {
        tensor = x.tensor;
        if (PyTuple_CheckExact(axis)) {
            long last = -1;
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(axis); ++i)
                if (!add(PyTuple_GET_ITEM(axis, i), x, last)) return false;
        } else {
            long last = -1;
            if (!add(axis, x, last)) return false;
        }
        for (int i = 0; i < x.ndim; ++i)
            if (!(mask >> i & 1)) values *= x.shape[i];
        return true;
    }
    // Whether a vector has one value for each channel.
    bool fits(const Array& v) const {
        return v.ndim == ndim && !std::memcmp(v.shape, shape, ndim * sizeof(int64_t));
    }

private:
    bool add(PyObject* object, const Array& x, long& last) {
        if (!PyLong_CheckExact(object)) return false;
        int overflow;
        long axis = PyLong_AsLongAndOverflow(object, &overflow);
        if (overflow || axis < -x.ndim || axis >= x.ndim) return false;
        if (axis < 0) axis += x.ndim;
        if (axis <= last) return false;
        last = axis;
        mask |= uint64_t(1) << axis;
        shape[ndim++] = x.shape[axis];
        count *= x.shape[axis];
        return true;
    }
};

// A vector as C doubles: where it is, or copied.
class Doubles {
public:
    double* room(int64_t n) {
        if (n <= SMALL) return small_;
        large_.reset(new double[n]);
        return large_.get();
    }
    const double* of(const Array& v) {
        if (!v.size()) return small_;  // an empty tensor has no address
        if (v.dtype == DOUBLE && v.aligned && v.contiguous()) return (const double*)v.data;
        int64_t n = v.size();
        double* to = room(n);
        if (v.dtype == SINGLE && v.aligned && v.contiguous()) {
            const float* from = (const float*)v.data;
            for (int64_t i = 0; i < n; ++i) to[i] = from[i];
        } else {
            int64_t index[MAX_AXES] = {};
            const char* at = v.data;
            for (int64_t i = 0; i < n; ++i) {
                to[i] = read_value(v.dtype, at);
                next(v, index, at);
            }
        }
        return to;
    }

private:
    // The place of the next element in the order of axes.
    static void next(const Array& v, int64_t* index, const char*& at) {
        for (int k = v.ndim - 1; k >= 0; --k) {
            at += v.strides[k];
            if (++index[k] < v.shape[k]) return;
            at -= v.strides[k] * v.shape[k];
            index[k] = 0;
        }
    }
    static constexpr int SMALL = 512;
    double small_[SMALL];
    std::unique_ptr<double[]> large_;
};

// Where an argument is None, or fits: null, or its values.
bool optional_vector(
    PyObject* object, const Channels& channels, Array& v, Doubles& room, const double*& to) {
    to = nullptr;
    v.dtype = NONE;
    if (object == Py_None) return true;
    if (!read(object, v) || !v.floating() || v.tensor != channels.tensor || !channels.fits(v)) return false;
    to = room.of(v);
    return true;
}

PyObject* declined() { Py_RETURN_NONE; }

// New arrays, of the library of x.

// A tensor with memory of its own, and where that is.
PyObject* new_tensor(int ndim, const int64_t* shape, DType dtype, char*& data) {
    static const DLDataType TYPES[DTYPES] = {
        {}, {DL_FLOAT, 16, 1}, {DL_BFLOAT, 16, 1}, {DL_FLOAT, 32, 1}, {DL_FLOAT, 64, 1}, {DL_BOOL, 8, 1}};
    DLTensor like = {nullptr, {DL_CPU, 0}, ndim, TYPES[dtype], const_cast<int64_t*>(shape), nullptr, 0};
    auto failed = [](void*, const char*, const char* message) {
        PyErr_SetString(PyExc_MemoryError, message);
    };
    DLManagedTensorVersioned* made = nullptr;
    void* object = nullptr;
    if (dlpack->managed_tensor_allocator(&like, &made, nullptr, failed)) return nullptr;
    data = (char*)made->tensor.data + made->tensor.byte_offset;
    if (dlpack->managed_tensor_to_py_object_no_sync(made, &object)) return nullptr;
    return (PyObject*)object;
}

PyObject* new_like(const Array& x) {
    char* data;
    if (x.tensor)
        return x.contiguous() && x.nbytes() < POOLED_BYTES ? new_tensor(x.ndim, x.shape, x.dtype, data)
                                                          : PyObject_CallOneArg(empty_tensor_like, x.object);
    if (x.nbytes() >= POOLED_BYTES) return PyObject_CallOneArg(empty_like, x.object);
    return PyArray_NewLikeArray((PyArrayObject*)x.object, NPY_KEEPORDER, nullptr, 0);
}

// Some vectors of one number per channel, and where their values are.
struct Vectors {
    static constexpr int MOST = 4;
    int count = 0;
    PyObject* object[MOST] = {};
    char* data[MOST];

    ~Vectors() {
        for (PyObject* o : object) Py_XDECREF(o);
    }
    PyObject* release(int i) {
        PyObject* o = object[i];
        object[i] = nullptr;
        return o;
    }
    double* doubles(int i) const { return (double*)data[i]; }

    // False with a Python exception. bfloat16 arrays of NumPy have the dtype of `example`.
    bool make(int n, const Channels& channels, DType dtype, const Array& x, const Array* example = nullptr) {
        count = n;
        return x.tensor ? tensors(channels, dtype) : arrays(channels, dtype, example);
    }

private:
    bool arrays(const Channels& channels, DType dtype, const Array* example) {
        static const int TYPES[DTYPES] = {NPY_DOUBLE, NPY_HALF, NPY_HALF, NPY_FLOAT, NPY_DOUBLE, NPY_BOOL};
        npy_intp shape[MAX_AXES];
        for (int i = 0; i < channels.ndim; ++i) shape[i] = channels.shape[i];
        for (int k = 0; k < count; ++k) {
            PyArray_Descr* descr;
            if (example && example->dtype == dtype) {
                descr = PyArray_DESCR((PyArrayObject*)example->object);
                Py_INCREF(descr);
            } else {
                descr = PyArray_DescrFromType(TYPES[dtype]);
            }
            object[k] = PyArray_NewFromDescr(
                &PyArray_Type, descr, channels.ndim, shape, nullptr, nullptr, 0, nullptr);
            if (!object[k]) return false;
            data[k] = PyArray_BYTES((PyArrayObject*)object[k]);
        }
        return true;
    }
    bool tensors(const Channels& channels, DType dtype) {
        for (int k = 0; k < count; ++k)
            if (!(object[k] = new_tensor(channels.ndim, channels.shape, dtype, data[k]))) return false;
        return true;
    }
};

}  // namespace
