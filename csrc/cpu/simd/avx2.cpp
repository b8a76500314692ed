#include "../kernels.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(FASTVIT_WITHOUT_AVX2)
#define FASTVIT_ISA avx2
#define FASTVIT_REGISTER_BYTES 32
#define FASTVIT_HAS_DOT_PAIRS 0
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#include "table.h"
#pragma clang attribute pop
#else
#pragma GCC target("arch=x86-64-v3")
#include "table.h"
#endif
#else
const fastvit::cpu::Kernels* fastvit::cpu::avx2::table() { return nullptr; }
#endif
