// The part of DLPack's C exchange interface (version 1.2 and later) that the binding uses: what describes
// a tensor's memory without a Python object in between.

#pragma once

#include <cstdint>

enum { DL_CPU = 1 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

struct DLDevice {
    int32_t device_type, device_id;
};
struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
    struct {
        uint32_t major, minor;
    } version;
    void* manager;
    void (*deleter)(DLManagedTensorVersioned*);
    uint64_t flags;
    DLTensor tensor;
};

struct DLPackExchangeHeader {
    struct {
        uint32_t major, minor;
    } version;
    DLPackExchangeHeader* previous;
};
struct DLPackExchangeAPI {
    DLPackExchangeHeader header;
    int (*managed_tensor_allocator)(
        DLTensor*, DLManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
    int (*managed_tensor_from_py_object_no_sync)(void*, DLManagedTensorVersioned**);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**);
    int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);
    int (*current_work_stream)(int32_t, int32_t, void**);
};
