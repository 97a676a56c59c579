// The part of XLA's foreign-function interface that the handlers use: C structs, version 0.1, the oldest that
// JAX 0.6 and later accept. Fields are only ever appended, so that a newer runtime reads these.

#pragma once

#include <cstddef>
#include <cstdint>

namespace bn::xla {

enum Type { PRED = 1, S64 = 5, F16 = 10, F32 = 11, F64 = 12, BF16 = 16 };
enum { BUFFER = 1, SCALAR = 3 };             // kinds of arguments and of attributes
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, INTERNAL = 13 };  // codes of errors
enum { METADATA = 1 };                       // a kind of extension

struct Error;
struct Context;

struct Extension {
    size_t struct_size;
    int32_t kind;
    Extension* next;
};
struct Version {
    size_t struct_size;
    Extension* extensions;
    int32_t major, minor;
};
struct Metadata {
    size_t struct_size;
    Version version;
    uint32_t traits;
};
struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

struct Buffer {
    size_t struct_size;
    Extension* extensions;
    int32_t type;
    void* data;
    int64_t rank;
    int64_t* shape;
};
struct Scalar {
    int32_t type;
    void* value;
};
struct Name {
    const char* data;
    size_t size;
};
struct Buffers {  // arguments, or results
    size_t struct_size;
    Extension* extensions;
    int64_t count;
    int32_t* kinds;
    void** items;
};
struct Attributes {
    size_t struct_size;
    Extension* extensions;
    int64_t count;
    int32_t* kinds;
    Name** names;
    void** items;
};

struct ErrorArguments {
    size_t struct_size;
    Extension* extensions;
    const char* message;
    int32_t code;
};
struct DestroyArguments {
    size_t struct_size;
    Extension* extensions;
    Error* error;
};
struct ScheduleArguments {
    size_t struct_size;
    Extension* extensions;
    Context* context;
    void (*task)(void*);
    void* data;
};
struct ThreadCountArguments {
    size_t struct_size;
    Extension* extensions;
    Context* context;
    int64_t* count;
};

struct Api {
    size_t struct_size;
    Extension* extensions;
    Version version;
    const void* internal;
    Error* (*create_error)(ErrorArguments*);
    void* get_message;
    void (*destroy_error)(DestroyArguments*);
    void* unused[8];  // of handlers, streams, types, contexts, states and device memory
    Error* (*schedule)(ScheduleArguments*);
    Error* (*thread_count)(ThreadCountArguments*);
};

struct Call {
    size_t struct_size;
    Extension* extensions;
    const Api* api;
    Context* context;
    int32_t stage;
    Buffers arguments, results;
    Attributes attributes;
};

}  // namespace bn::xla
