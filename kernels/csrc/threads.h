// How many threads share a kernel's work, and the memory that each of them works in.
#pragma once

#include <cstdint>
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

// Grow-only memory that a thread keeps from call to call.
template <class T>
T* scratch(std::vector<T>& memory, int64_t size) {
    if (int64_t(memory.size()) < size) memory.resize(size);
    return memory.data();
}

}  // namespace minivllm::ISA
