// The CUDA features that the kernels need, emulated on a CPU.
//
// Each block runs in a thread of the host, so that blocks run concurrently. The threads of a block are
// fibers, which run one after the other up to the next barrier, in an order that is drawn again after
// every barrier. If a thread reads what another one writes, without a barrier in between, then some
// orders read it before it is written.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct Index {
    unsigned x;
};
static thread_local Index threadIdx, blockIdx, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T v) { *p = v; }

inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicExch(unsigned* p, unsigned v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { std::this_thread::yield(); }

namespace gpu {

struct Fiber {
    std::unique_ptr<char[]> stack{new char[SIZE]};
    static const size_t SIZE = 48 * 1024;
    jmp_buf context;
    bool started, ended;
};

struct Block {
    std::vector<Fiber> fibers;
    const std::function<void()>* kernel;
    jmp_buf scheduler;
    Fiber* running;
};
static thread_local Block* block;
static std::atomic<int> unmet_barriers;  // which some threads of a block never reached

inline void yield_to_scheduler() {
    if (!_setjmp(block->running->context)) _longjmp(block->scheduler, 1);
}

inline void start() {
    (*block->kernel)();
    block->running->ended = true;
    _longjmp(block->scheduler, 1);
}

inline void resume(Fiber& fiber) {
    if (_setjmp(block->scheduler)) return;
    block->running = &fiber;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t started, unused;
    getcontext(&started);
    started.uc_stack.ss_sp = fiber.stack.get();
    started.uc_stack.ss_size = Fiber::SIZE;
    started.uc_link = nullptr;
    makecontext(&started, start, 0);
    swapcontext(&unused, &started);
}

inline void run_block(Block& mine, std::mt19937& random) {
    block = &mine;
    std::vector<int> order(mine.fibers.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (Fiber& fiber : mine.fibers) fiber.started = fiber.ended = false;
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        for (int i : order) {
            threadIdx.x = i;
            resume(mine.fibers[i]);
        }
        size_t ended = 0;
        for (Fiber& fiber : mine.fibers) ended += fiber.ended;
        if (ended == order.size()) return;
        if (ended) {
            ++unmet_barriers;
            return;
        }
    }
}

// Run a kernel and return the number of blocks in which some threads ended while others waited.
inline int launch(const std::function<void()>& kernel, unsigned blocks, int threads, unsigned seed) {
    const unsigned at_once = std::min(blocks, 3u);
    std::atomic<unsigned> next{0};
    unmet_barriers = 0;
    auto work = [&](unsigned worker) {
        std::mt19937 random(seed * 97 + worker);
        static thread_local Block mine;
        mine.fibers.resize(threads);
        mine.kernel = &kernel;
        gridDim.x = blocks;
        for (unsigned i; (i = next++) < blocks;) {
            blockIdx.x = i;
            run_block(mine, random);
        }
    };
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < at_once; ++i) workers.emplace_back(work, i);
    for (std::thread& worker : workers) worker.join();
    return unmet_barriers;
}

}  // namespace gpu

__attribute__((noinline)) inline void __syncthreads() { gpu::yield_to_scheduler(); }
