#include "threads.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace bn {

namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How long a thread looks for a change before it sleeps, in case calls come in rows; and how long it
// looks before it lets another thread have the processor: the one that it waits for, perhaps.
constexpr std::chrono::microseconds SPIN_LIMIT{200}, YIELD_AFTER{20};

// Wait until `changed` returns true, or until the spin limit.
template <class Changed> bool spin(Changed changed) {
    auto begin = std::chrono::steady_clock::now();
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            if (changed()) return true;
            pause();
        }
        auto elapsed = std::chrono::steady_clock::now() - begin;
        if (elapsed > SPIN_LIMIT) return false;
        if (elapsed > YIELD_AFTER) std::this_thread::yield();
    }
}

// A worker's slot. Its state is four times a sequence number, and one of FREE to RUNNING: a caller leads
// it from FREE over TAKEN to SUBMITTED, the worker to RUNNING and FREE. With the number, no caller takes
// back the task of another.
enum State : uint32_t { FREE, TAKEN, SUBMITTED, RUNNING };

struct alignas(128) Slot {
    std::atomic<uint32_t> state{FREE};
    std::atomic<bool> asleep{false};
    void (*task)(void*, int);
    void* context;
    int index;
    int caller_cpu;
};

#ifdef __linux__
int current_cpu() { return sched_getcpu(); }

// Leave the caller's processor for another that this thread may use. Of two threads that slept, the second
// to wake is often put beside the first, and stays there for some ten milliseconds while another idles.
void leave_cpu(int cpu) {
    cpu_set_t allowed, others;
    if (cpu < 0 || cpu != sched_getcpu() || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
#endif

void work(Slot& slot) {
    for (;;) {
        uint32_t state = slot.state.load(std::memory_order_acquire);
        auto submitted = [&] {
            state = slot.state.load(std::memory_order_acquire);
            return (state & 3) == SUBMITTED;
        };
        if (!submitted() && !spin(submitted)) {
            slot.asleep.store(true);
            while (!submitted()) slot.state.wait(state);
            slot.asleep.store(false);
        }
        if (!slot.state.compare_exchange_strong(state, state - SUBMITTED + RUNNING)) continue;
        leave_cpu(slot.caller_cpu);
        slot.task(slot.context, slot.index);
        slot.state.store(state - SUBMITTED + 4 + FREE);
        slot.state.notify_all();
    }
}

constexpr int MOST_WORKERS = MOST_THREADS - 1;

class Pool final : public Threads {
public:
    void run(int count, void (*task)(void*, int), void* context) override {
        uint32_t submitted[MOST_WORKERS];
        Slot* used[MOST_WORKERS];
        int n = 0, cpu = -1;
        if (count > 1) {
            int workers = started(count - 1);
            cpu = current_cpu();
            for (int i = 0; i < workers && n < count - 1; ++i) {
                Slot& slot = *slots_[i];
                uint32_t state = slot.state.load(std::memory_order_relaxed);
                if ((state & 3) != FREE
                    || !slot.state.compare_exchange_strong(state, state + TAKEN))
                    continue;
                slot.task = task;
                slot.context = context;
                slot.index = n + 1;
                slot.caller_cpu = cpu;
                slot.state.store(state + SUBMITTED);
                if (slot.asleep.load()) slot.state.notify_all();
                used[n] = &slot;
                submitted[n++] = state + SUBMITTED;
            }
        }
        task(context, 0);
        for (int i = 0; i < n; ++i) {
            std::atomic<uint32_t>& state = used[i]->state;
            uint32_t expected = submitted[i];
            if (state.compare_exchange_strong(expected, submitted[i] - SUBMITTED + FREE)) continue;
            uint32_t running = submitted[i] - SUBMITTED + RUNNING;
            auto ended = [&] { return state.load(std::memory_order_acquire) != running; };
            while (!ended())
                if (!spin(ended)) state.wait(running);
        }
    }

private:
    // Start workers until there are as many; how many there are.
    int started(int wanted) {
        if (wanted > MOST_WORKERS) wanted = MOST_WORKERS;
        int count = count_.load(std::memory_order_acquire);
        if (count >= wanted || refused_) return count < wanted ? count : wanted;
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock) return count;  // another caller is about it: this one does without
        for (count = count_.load(); count < wanted; ++count) {
            try {
                slots_[count] = new Slot;
                std::thread(work, std::ref(*slots_[count])).detach();
            } catch (...) {  // no more threads for this process
                delete slots_[count];
                refused_ = true;
                break;
            }
            count_.store(count + 1, std::memory_order_release);
        }
        return count;
    }

    std::mutex mutex_;
    std::atomic<int> count_{0};
    std::atomic<bool> refused_{false};
    Slot* slots_[MOST_WORKERS] = {};
};

// Never freed: workers look at their slots until the process ends. A forked child has none of its
// parent's threads, and makes a pool of its own.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

#ifndef _WIN32
void reset_in_child() {
    pool.store(nullptr);
    forked.store(true);
}
const int registered = pthread_atfork(nullptr, nullptr, reset_in_child);
#endif

}  // namespace

Threads& own_threads() {
    Pool* found = pool.load(std::memory_order_acquire);
    if (!found) {
        Pool* made = new Pool;
        if (pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

namespace {

// PyTorch's, by the C interface that it keeps stable, or else by its OpenMP runtime's entrance.
class TorchThreads final : public Threads {
public:
    typedef int (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
    typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
    ParallelFor parallel_for = nullptr;
    int (*thread_count)(uint32_t*) = nullptr;
    Parallel parallel = nullptr;
    int (*most_threads)() = nullptr;

    struct Call {
        void (*task)(void*, int);
        void* context;
        std::atomic<int> next{0};
    };

    void run(int count, void (*task)(void*, int), void* context) override {
        Call call{task, context};
        if (count <= 1) {
            task(context, 0);
        } else if (parallel_for) {
            parallel_for(
                0, count, 1,
                [](int64_t begin, int64_t end, void* context) {
                    Call& call = *(Call*)context;
                    for (int64_t i = begin; i < end; ++i) call.task(call.context, (int)i);
                },
                &call);
        } else {
            parallel(
                [](void* context) {
                    Call& call = *(Call*)context;
                    call.task(call.context, call.next.fetch_add(1));
                },
                &call, (unsigned)count, 0);
        }
    }
};

void* symbol(const char* name) {
#ifdef _WIN32
    HMODULE library = GetModuleHandleA("torch_cpu.dll");
    return library ? (void*)GetProcAddress(library, name) : nullptr;
#else
    if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
#ifdef __APPLE__
    void* library = dlopen("@rpath/libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
    return library ? dlsym(library, name) : nullptr;
#endif
}

}  // namespace

Threads* torch_threads(int& most) {
    static TorchThreads* const found = []() -> TorchThreads* {
        auto* threads = new TorchThreads;
        threads->parallel_for = (TorchThreads::ParallelFor)symbol("torch_parallel_for");
        threads->thread_count = (int (*)(uint32_t*))symbol("torch_get_num_threads");
        if (threads->parallel_for && threads->thread_count) return threads;
        threads->parallel_for = nullptr;
        threads->parallel = (TorchThreads::Parallel)symbol("GOMP_parallel");
        threads->most_threads = (int (*)())symbol("omp_get_max_threads");
        if (threads->parallel && threads->most_threads) return threads;
        delete threads;
        return nullptr;
    }();
    if (!found || forked.load()) return nullptr;
    uint32_t count = 0;
    if (found->most_threads) count = (uint32_t)found->most_threads();
    else if (found->thread_count(&count)) return nullptr;
    if ((int)count < most) most = (int)count;
    return found;
}

}  // namespace bn
