#include "fork.h"

#include <ATen/Parallel.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastvit::cpu {
namespace {

thread_local bool pool_used = false, pool_lost = false;

bool watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  return pthread_atfork(nullptr, nullptr, [] { pool_lost = pool_used; }) == 0;
#else
  return false;
#endif
}

}  // namespace

void survive_fork() {
  static const bool watched = watch_forks();
  (void)watched;
  if (at::get_num_threads() == 1) return;
  if (pool_lost) at::set_num_threads(1);
  pool_used = true;
}

}  // namespace fastvit::cpu
