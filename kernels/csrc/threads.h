// How many threads share a kernel's work.
#pragma once

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

}  // namespace minivllm::ISA
