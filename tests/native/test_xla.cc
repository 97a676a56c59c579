// The handlers for XLA, called as XLA calls them, on pools of the test's own: one whose threads take tasks late,
// one that runs a task in the caller, one that keeps tasks until all calls have returned. Arguments: an instruction
// set.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core.h"
#include "xla.h"
#include "xla_abi.h"

namespace {

using namespace bn::xla;

enum Kind { LATE, INLINE, STALLED, ABSENT };
constexpr int64_t N = 4, C = 8, P = 3000, SIZE = N * C * P;  // 384 KB: several threads

struct Task {
    void (*run)(void*);
    void* data;
};

struct Pool {
    Kind kind;
    std::mutex mutex;
    std::vector<std::thread> threads;
    std::vector<Task> kept;

    ~Pool() {
        for (std::thread& t : threads) t.join();
        for (Task& t : kept) t.run(t.data);  // long after their calls
    }
    void schedule(Task task) {
        if (kind == INLINE) return task.run(task.data);
        std::lock_guard<std::mutex> lock(mutex);
        if (kind == STALLED) return kept.push_back(task);
        threads.emplace_back([task, delay = threads.size() % 4 * 50] {
            std::this_thread::sleep_for(std::chrono::microseconds(delay));
            task.run(task.data);
        });
    }
};

std::string last_error;
Error* create_error(ErrorArguments* a) {
    last_error = a->message;
    return (Error*)&last_error;
}
void destroy_error(DestroyArguments*) {}
Error* schedule(ScheduleArguments* a) {
    ((Pool*)a->context)->schedule({a->task, a->data});
    return nullptr;
}
Error* thread_count(ThreadCountArguments* a) {
    if (((Pool*)a->context)->kind == ABSENT) return (Error*)&last_error;
    *a->count = 4;
    return nullptr;
}

Error* call(const char* name, Pool& pool, std::vector<Buffer> in, std::vector<Buffer> out, int64_t given) {
    Api api = {};
    api.create_error = create_error;
    api.destroy_error = destroy_error;
    api.schedule = schedule;
    api.thread_count = thread_count;
    std::vector<void*> arguments, results;
    for (Buffer& b : in) arguments.push_back(&b);
    for (Buffer& b : out) results.push_back(&b);
    std::vector<int32_t> buffers(16, BUFFER), scalars(5, SCALAR);
    int64_t activation = 0, axes = 2;
    double eps = 1e-5, slope = 0;
    Name names[] = {{"activation", 10}, {"axes", 4}, {"eps", 3}, {"given", 5}, {"slope", 5}};
    Scalar values[] = {{S64, &activation}, {S64, &axes}, {F64, &eps}, {S64, &given}, {F64, &slope}};
    Name* named[5];
    void* valued[5];
    for (int i = 0; i < 5; ++i) named[i] = names + i, valued[i] = values + i;
    Call frame = {};
    frame.api = &api;
    frame.context = (Context*)&pool;
    frame.arguments = {0, nullptr, (int64_t)in.size(), buffers.data(), arguments.data()};
    frame.results = {0, nullptr, (int64_t)out.size(), buffers.data(), results.data()};
    frame.attributes = {0, nullptr, 5, scalars.data(), named, valued};
    for (const Handler* h = HANDLERS; h->name; ++h)
        if (!std::strcmp(h->name, name)) return ((Error * (*)(Call*)) h->function)(&frame);
    std::abort();
}

void fail(const std::string& what) {
    std::printf("FAILED %s\n", what.c_str());
    std::exit(1);
}

void expect(double got, double right, const char* what) {
    if (!(std::fabs(got - right) <= 2e-4 * (1 + std::fabs(right))))
        fail(std::string(what) + ": " + std::to_string(got) + ", expected " + std::to_string(right));
}

int64_t shape[] = {N, C, P}, vector_shape[] = {C};
Buffer big(std::vector<float>& v) { return {0, nullptr, F32, v.data(), 3, shape}; }
Buffer vec(std::vector<float>& v) { return {0, nullptr, F32, v.data(), 1, vector_shape}; }

// Forward and backward on data of its own, against sums in long double.
void passes(Pool& pool, unsigned seed) {
    std::vector<float> x(SIZE), dy(SIZE), y(SIZE), dx(SIZE), gamma(C), beta(C);
    std::vector<float> stats[4], grads[2];
    for (auto& v : stats) v.resize(C);
    for (auto& v : grads) v.resize(C);
    unsigned state = seed * 2654435761u + 1;
    auto next = [&] { return (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f; };
    for (int64_t i = 0; i < SIZE; ++i) x[i] = 3 + next() + next(), dy[i] = next() - 0.5f;
    for (int64_t c = 0; c < C; ++c) gamma[c] = 0.5f + next(), beta[c] = next();
    if (call("forward", pool, {big(x), vec(gamma), vec(beta)},
             {big(y), vec(stats[0]), vec(stats[1]), vec(stats[2]), vec(stats[3])}, 2 | 4))
        fail(last_error);
    if (call("backward", pool,
             {big(dy), big(x), vec(stats[0]), vec(stats[1]), vec(stats[2]), vec(gamma), vec(stats[3])},
             {big(dx), vec(grads[0]), vec(grads[1])}, 2 | 8))
        fail(last_error);
    for (int64_t c = 0; c < C; ++c) {
        long double s = 0, q = 0, g = 0, gx = 0, n = N * P;
        auto each = [&](auto body) {
            for (int64_t i = 0; i < N; ++i)
                for (int64_t p = 0; p < P; ++p) body((i * C + c) * P + p);
        };
        each([&](int64_t i) { s += x[i]; });
        long double mean = s / n;
        each([&](int64_t i) { q += (x[i] - mean) * (x[i] - mean); });
        long double rstd = 1 / std::sqrt(q / n + 1e-5L);
        each([&](int64_t i) { g += dy[i], gx += dy[i] * (x[i] - mean) * rstd; });
        expect(stats[0][c], n, "count");
        expect(stats[1][c] + stats[3][c], mean, "mean");
        expect(stats[2][c], q / n, "var");
        expect(grads[0][c], gx, "dgamma");
        expect(grads[1][c], g, "dbeta");
        each([&](int64_t i) {
            long double hat = (x[i] - mean) * rstd;
            expect(y[i], gamma[c] * hat + beta[c], "y");
            expect(dx[i], gamma[c] * rstd * (dy[i] - (g + hat * gx) / n), "dx");
        });
    }
}

}  // namespace

int main(int argc, char** argv) {
    use(bn::kernels_for(argc > 1 ? argv[1] : nullptr));
    set_thread_count(4);
    for (Kind kind : {LATE, INLINE, STALLED, ABSENT}) {
        Pool pool{kind, {}, {}, {}};
        std::vector<std::thread> callers;
        for (unsigned i = 0; i < 6; ++i)
            callers.emplace_back([&pool, i] {
                for (unsigned k = 0; k < 3; ++k) passes(pool, 10 * i + k);
            });
        for (std::thread& t : callers) t.join();
    }
    std::printf("done\n");
}
