// Threads for the tiles of a pass: one interface, and the pools behind it.

#pragma once

#include <cstdint>

namespace bn {

// Threads of one call, the caller among them.
constexpr int MOST_THREADS = 256;

// Something to run on several threads: task(context, 0) on the caller, and task(context, k) for some
// 0 < k < count on others, each at most once. A task takes what is left to do, so that any of the others
// may be missing. `run` returns when all that were begun have ended.
class Threads {
public:
    virtual void run(int count, void (*task)(void* context, int index), void* context) = 0;

protected:
    ~Threads() = default;
};

// This package's pool. Its workers are started when first needed, and never need an interpreter.
Threads& own_threads();

// The threads of PyTorch, which look out for work after each of its operators and would be in the way of
// others; null where they cannot be reached, and in a forked child. `most` becomes how many it uses.
Threads* torch_threads(int& most);

}  // namespace bn
