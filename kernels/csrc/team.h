// How threads share work, and the memory that each of them works in.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace minivllm::ISA {

inline int num_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One thread of a team that does one piece of work after the other. All of its threads go through the same pieces
// in the same order. Of each they take items while there are any, and the next piece begins when all items are
// done, whether or not every thread has come by: one that is just waking up, or that has no core because another
// program has it, holds nobody up, and skips what was done without it. OpenMP's barriers wait for threads
// instead: those that give up spinning fall asleep just before a late one arrives, which then waits for them and does
// the same.
class Team {
   public:
    struct State {
        alignas(64) std::atomic<uint64_t> next{0};  // the piece's number, then the first item that nobody has taken
        alignas(64) std::atomic<int64_t> num_done{0};
    };

    explicit Team(State& state) : state_(state) {}

    // body(item) for the items [0, count), some at a time.
    template <class Body>
    void share(int64_t count, int64_t at_a_time, Body body) {
        if (count == 0) return;
        const uint64_t piece = num_pieces_++;
        for (int spins = 0;;) {
            uint64_t next = state_.next.load(std::memory_order_acquire);
            if (next >> 32 != piece) return;
            const int64_t begin = int64_t(next & 0xFFFFFFFF), end = std::min(begin + at_a_time, count);
            if (begin == count) {
                wait(spins++);
                continue;
            }
            if (!state_.next.compare_exchange_weak(next, next + (end - begin), std::memory_order_relaxed)) continue;
            for (int64_t item = begin; item < end; ++item) body(item);
            const int64_t num_done = state_.num_done.fetch_add(end - begin, std::memory_order_acq_rel) + (end - begin);
            if (num_done == count) {
                state_.num_done.store(0, std::memory_order_relaxed);
                state_.next.store((piece + 1) << 32, std::memory_order_release);
                return;
            }
        }
    }

   private:
    // What is waited for is another thread's last item, mostly a matter of microseconds. If not, it has no core, and
    // may get this one.
    static void wait(int num_spins) {
        if (num_spins < kSpins)
            pause();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(20));
    }

    static constexpr int kSpins = 2000;

    State& state_;
    uint64_t num_pieces_ = 0;
};

// work(team) on every thread, or on this one alone.
template <class Work>
void run_team(bool is_parallel, Work work) {
    Team::State state;
#pragma omp parallel if (is_parallel)
    {
        Team team(state);
        work(team);
    }
}

constexpr int64_t kLineBytes = 64;  // of a cache

// What begins with the first whole line of some memory.
template <class T>
T* aligned(std::vector<T>& memory) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
}

// Grow-only memory that a thread keeps from call to call, from the start of a line on: a vector of AVX-512 that
// crosses into the next line takes two loads.
template <class T>
T* scratch(std::vector<T>& memory, int64_t size) {
    size += kLineBytes / int64_t(sizeof(T));
    if (int64_t(memory.size()) < size) memory.resize(size);
    return aligned(memory);
}

}  // namespace minivllm::ISA
