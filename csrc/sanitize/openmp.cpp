// What ThreadSanitizer has to be told about OpenMP: part of FASTVIT_SANITIZE=thread only, linked with
// --wrap=GOMP_parallel.
//
// libgomp is not instrumented, so its thread pool's waiting is invisible and every value handed to a task would be
// reported. A parallel region comes after what was done before it and ends before what follows: these two edges, and
// nothing between its threads.
#include <sanitizer/tsan_interface.h>

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  char begin, end;
};

__attribute__((no_sanitize("thread"))) void run(void* argument) {
  auto* region = static_cast<Region*>(argument);
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

}  // namespace

extern "C" {

using Parallel = void(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Parallel __real_GOMP_parallel, __wrap_GOMP_parallel;

__attribute__((no_sanitize("thread"))) void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                                                 unsigned flags) {
  Region region{body, data, 0, 0};
  __tsan_release(&region.begin);
  __real_GOMP_parallel(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
}
