// Rows shared out over threads. bindings.cpp gives it torch's thread pool, the stand-alone driver a plain loop.
#pragma once
#include <cstdint>
#include <functional>

namespace minivlm::cpu {

// Calls body(begin, end) for disjoint pieces of [0, count), each of at least `grain`.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// As many rows as are worth a thread of their own: 32 k elements, about 10 microseconds.
inline int64_t grain_of(int64_t elements_per_row) { return 1 + 32768 / (elements_per_row + 1); }

}  // namespace minivlm::cpu
