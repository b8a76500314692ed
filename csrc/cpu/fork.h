// Threads after fork().
#pragma once

namespace fastvit::cpu {

// To be called at the start of every op. A forked child inherits OpenMP's record of the thread's pool but not the pool:
// its first parallel region, PyTorch's own included, would wait for ever. Where an op used that pool before the fork,
// the child's ops run on one thread, as a DataLoader's workers do. Threads that the child starts have pools of their
// own.
void survive_fork();

}  // namespace fastvit::cpu
