// What the compiler takes for granted: SSE2 on x86-64, NEON on ARM.
#include "../kernels.h"

#ifndef FASTVIT_WITHOUT_BASELINE
#define FASTVIT_ISA baseline
#define FASTVIT_REGISTER_BYTES 16
#define FASTVIT_HAS_DOT_PAIRS 0
#include "table.h"
#else
const fastvit::cpu::Kernels* fastvit::cpu::baseline::table() { return nullptr; }
#endif
